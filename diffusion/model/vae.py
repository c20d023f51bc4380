"""The autoencoder that is trained here: from a config to its loss and its experiment; a trained one from its folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import autoencoding, training
from diffusion.data.images import to_float, to_uint8
from diffusion.data.sources import Source
from diffusion.files import replacing
from diffusion.model.batches import check_batches, training_batches
from diffusion.model.choices import pick
from diffusion.model.config import Config, check_ranges, dtype_of, from_plain, make_settings
from diffusion.model.optimizers import make_optimizer
from diffusion.networks.patch_discriminator import PatchDiscriminator
from diffusion.networks.vae import Autoencoder, Posterior, sample
from diffusion.pretrained.vae import PublishedAutoencoder
from diffusion.training import Experiment, Mean, RunError, make_mesh
from diffusion.training.checkpoints import open_existing

NAME = "autoencoder"  # of the experiment


class Trained(NamedTuple):
    """What a run made: an autoencoder, its averaged weights, in the memory of the host, and after how many steps."""

    module: Autoencoder
    params: Any
    step: int


class Latents(NamedTuple):
    """How the latents of a trained autoencoder become the x_0 of a diffusion model: (z - shift) * scale.

    Attributes:
      shift: one per channel.
      scale: the same.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]


def make_autoencoder(config: Config) -> Autoencoder:
    """Returns the network of `config.network`. Raises ValueError, naming the field, where there is none."""
    check_ranges(config)
    if not config.network.channels:
        raise ValueError("network.channels is (): name the channels of at least one level, as (32, 64, 64)")
    block = {**config.network, "name": "vae", "dtype": dtype_of(config)}
    return pick({"vae": Autoencoder}, block, "network")()


def make_discriminator(config: Config) -> PatchDiscriminator | None:
    """Returns the network of `config.discriminator`; None where loss.adversarial is 0."""
    if not config.loss.adversarial:
        return None
    return PatchDiscriminator(**config.discriminator, dtype=dtype_of(config))


def autoencoder_loss(
    config: Config, autoencoder: Autoencoder, discriminator: PatchDiscriminator | None
) -> training.Loss:
    """Returns loss(params, batch, key) -> (float32[B], metrics), latent diffusion's divided by the numbers per image.

    With a discriminator both losses of the game are added, each with a gradient for its own side alone, so that one
    step of one optimizer teaches both. A batch holds "image" and "step", the number of the batch.

    Source: Rombach et al. (2022), appendix G; Esser et al. (2021), eqs. 5-7.
    """
    settings = config.loss

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        x = to_float(batch["image"])
        numbers = math.prod(x.shape[1:])
        posterior: Any = autoencoder.apply(params["autoencoder"], x, method="encode")
        decode, kernel = decoder_of(autoencoder, params["autoencoder"], sample(posterior, key))
        x_hat, pull = jax.vjp(decode, kernel)
        kl = autoencoding.kl_to_unit_normal(*posterior)
        reconstruction = autoencoding.reconstruction_loss(x, x_hat) / numbers
        ones = jnp.ones_like(kl)
        metrics = {
            "loss_part_reconstruction": Mean(reconstruction, ones),
            "kl": Mean(kl, ones),
            "psnr": Mean(autoencoding.psnr(x, x_hat), ones),
        }
        losses = reconstruction + settings.kl_weight * kl / numbers
        if discriminator is None:
            return losses, metrics
        play = make_game(discriminator, params["discriminator"], x, x_hat, pull)
        on = batch["step"][0] >= settings.adversarial_start
        nothing = (jnp.zeros_like(kl), jnp.zeros_like(kl), jnp.zeros(()))
        generator, told_apart, weight = jax.lax.cond(on, play, lambda: nothing)
        metrics |= {
            "loss_part_generator": Mean(generator, ones * on),
            "loss_part_discriminator": Mean(told_apart, ones * on),
            "adversarial_weight": Mean(weight * ones, ones * on),
        }
        return losses + settings.adversarial * weight * generator + told_apart, metrics

    return loss


def decoder_of(
    autoencoder: Autoencoder, params: Any, z: jax.Array
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Returns the images of z as a function of the decoder's last kernel, and that kernel."""
    groups = params["params"]
    decoder = groups["decoder"]
    last = decoder["conv_out"]

    def decode(kernel: jax.Array) -> jax.Array:
        changed = {**decoder, "conv_out": {**last, "kernel": kernel}}
        image: Any = autoencoder.apply({**params, "params": {**groups, "decoder": changed}}, z, method="decode")
        return image

    return decode, last["kernel"]


def make_game(
    discriminator: PatchDiscriminator, params: Any, x: jax.Array, x_hat: jax.Array, pull: Callable[[jax.Array], Any]
) -> Callable[[], tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns () -> the generator's loss [B], the discriminator's [B], and the weight of the former.

    Args:
      discriminator: the network.
      params: of it; the generator's loss has no gradient for them, and the discriminator's none for x_hat.
      x: images.
      x_hat: reconstructions.
      pull: from a gradient by x_hat to that by the decoder's last kernel.
    """

    def judge(params: Any, image: jax.Array) -> jax.Array:
        logits: Any = discriminator.apply(params, image)
        return logits

    fixed, made = jax.lax.stop_gradient((params, x_hat))
    numbers = math.prod(x.shape[1:])

    def play() -> tuple[jax.Array, jax.Array, jax.Array]:
        of_pixels = jax.grad(lambda image: autoencoding.reconstruction_loss(x, image).sum() / numbers)(made)
        of_logits = jax.grad(lambda image: autoencoding.generator_loss(judge(fixed, image)).sum())(made)
        weight = autoencoding.adaptive_weight(pull(of_pixels), pull(of_logits))
        generator = autoencoding.generator_loss(judge(fixed, x_hat))
        told_apart = autoencoding.discriminator_loss(judge(params, x), judge(params, made))
        return generator, told_apart, weight

    return play


def make_learner(config: Config) -> Experiment:
    """Returns the experiment of `config` without data: all that the state of a training depends on."""
    autoencoder, discriminator = make_autoencoder(config), make_discriminator(config)
    optimizer, learning_rate = make_optimizer(config)
    if discriminator is not None:  # each side's gradient is clipped by its own norm
        sides: dict[Any, Any] = {"autoencoder": optimizer, "discriminator": optimizer}
        optimizer = optax.multi_transform(sides, {name: name for name in sides})

    def init(key: jax.Array) -> Any:
        side = autoencoder.factor
        params = {"autoencoder": autoencoder.init(key, jnp.zeros((1, side, side, 3)))}
        if discriminator is not None:
            side = 3 * 2**discriminator.layers
            params["discriminator"] = discriminator.init(jax.random.fold_in(key, 1), jnp.zeros((1, side, side, 3)))
        return params

    def batches(start_step: int) -> Any:
        raise ValueError("this experiment was made without data")

    loss = autoencoder_loss(config, autoencoder, discriminator)
    return Experiment(init, loss, optimizer, learning_rate, batches, config.data.batch_size)


def make_experiment(config: Config, source: Source) -> Experiment:
    """Returns the experiment of `config` on the images of `source`.

    Raises:
      ValueError: whatever does not fit together; nothing has been allocated or written by then.
    """
    learner, autoencoder = make_learner(config), make_autoencoder(config)
    check_fits(autoencoder, source)

    def batches(start_step: int) -> Any:
        rows = training_batches(config, source, start_step)
        try:
            for step, batch in enumerate(rows, start_step):
                yield {"image": batch["image"], "step": np.full(len(batch["image"]), step, np.int32)}
        finally:
            rows.close()

    check_batches(config, source)
    shapes = jax.eval_shape(learner.init, jax.random.key(0))
    jax.eval_shape(learner.loss, shapes, abstract_batch(config, source.image_shape), jax.random.key(0))
    shown = source.read(np.arange(min(config.training.num_previews, source.num_examples)))["image"]
    reconstruct = make_reconstruct(autoencoder)

    def preview(params: Any) -> jax.Array:
        return jnp.concatenate([shown, reconstruct(params["autoencoder"], shown)[0]])

    return learner._replace(batches=batches, preview=jax.jit(preview) if len(shown) else None)


def check_fits(autoencoder: Autoencoder, source: Source) -> None:
    """Raises ValueError, saying what to do, unless the autoencoder takes the images of `source`."""
    height, width, channels = source.image_shape
    if channels != 3:
        raise ValueError(
            f"{source.name} has images of {channels} channels: the autoencoder takes RGB; set data.channels=3, or "
            "choose other data"
        )
    if height % autoencoder.factor or width % autoencoder.factor:
        raise ValueError(
            f"{source.name} has images of {height}x{width}: {len(autoencoder.channels)} levels of network.channels "
            f"need sides divisible by {autoencoder.factor}; set data.image_size"
        )


def abstract_batch(config: Config, image_shape: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Returns the shapes of a global batch, of images as small as they can be where no shape is given."""
    if image_shape is None:
        side = make_autoencoder(config).factor * 3 * 2**config.discriminator.layers
        image_shape = (side, side, 3)
    batch = config.data.batch_size
    return {
        "image": jax.ShapeDtypeStruct((batch, *image_shape), np.uint8),
        "step": jax.ShapeDtypeStruct((batch,), np.int32),
    }


def make_reconstruct(autoencoder: Autoencoder) -> Callable[[Any, Any], tuple[jax.Array, Posterior]]:
    """Returns (params, uint8 images) -> the images decoded from the mode, uint8, and the posterior. May be jitted."""

    def reconstruct(params: Any, image: Any) -> tuple[jax.Array, Posterior]:
        outputs: Any = autoencoder.apply(params, to_float(image))
        x_hat, posterior = outputs
        return to_uint8(x_hat), posterior

    return reconstruct


def make_trained(config: Config, mesh: Mesh, state: training.TrainState) -> Trained:
    """Returns what `state` has learned; every process of a run calls this."""
    training.check_finite(state.ema, f"the averaged weights after {int(state.step)} steps")
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_get(jax.jit(lambda params: params, out_shardings=whole)(state.ema["autoencoder"]))
    return Trained(make_autoencoder(config), params, int(state.step))


def open_trained(workdir: Path, mesh: Mesh | None = None, step: int | None = None) -> Trained:
    """Returns the autoencoder of a work folder of this experiment: averaged weights, the newest or of `step`.

    Raises:
      RunError: there is no checkpoint, or it is another experiment's.
    """
    mesh = mesh or make_mesh()
    with open_existing(workdir, step) as checkpoints:
        stored = checkpoints.description()
        if stored["experiment"] != NAME:
            raise RunError(f"{workdir} holds experiment {stored['experiment']}, not {NAME}")
        config = from_plain(stored["config"])
        state = checkpoints.restore(training.abstract_weights(make_learner(config), make_settings(config), mesh))
    return make_trained(config, mesh, state)


def open_published(workdir: Path, mesh: Mesh | None = None) -> PublishedAutoencoder:
    """Returns the newest autoencoder of a work folder with its shift and scale, in the form of published ones.

    Raises:
      RunError: there is no checkpoint, it is another experiment's, or its latents have not been fitted yet.
    """
    trained = open_trained(workdir, mesh)
    latents = read_latents(workdir, trained.step)
    if latents is None:
        raise RunError(
            f"{workdir} has no shift and scale of its latents after step {trained.step}: finish its training, or run "
            "--mode=evaluate there"
        )
    return as_published(trained, latents)


def as_published(trained: Trained, latents: Latents) -> PublishedAutoencoder:
    """Returns a trained autoencoder in the form of published ones."""
    shift, scale = (np.asarray(numbers, np.float32) for numbers in latents)
    return PublishedAutoencoder(trained.module, trained.params, shift, scale, patch=1, sampled=True)


def write_latents(workdir: Path, step: int, latents: Latents) -> None:
    """Writes shift and scale of the weights after `step` into a work folder."""
    with replacing(_latents_file(workdir, step)) as temporary:
        temporary.write_text(json.dumps(latents._asdict(), indent=2) + "\n")


def read_latents(workdir: Path, step: int) -> Latents | None:
    """Returns what `write_latents` wrote; None where it did not. Raises RunError where it cannot be read."""
    path = _latents_file(workdir, step)
    if not path.exists():
        return None
    try:
        return Latents(**{name: tuple(numbers) for name, numbers in json.loads(path.read_text()).items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}): remove it, and run --mode=evaluate") from error


def _latents_file(workdir: Path, step: int) -> Path:
    return workdir / "latents" / f"{step}.json"
