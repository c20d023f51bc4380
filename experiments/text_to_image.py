"""What the text-to-image experiments share: from a config and captioned images to a loss, a sampler, an experiment.

The parameters are {"network": ..., "text": ...}. A frozen text encoder stands there too, under `stop_gradient` and
without an optimizer's moments: so the loss is a function of its arguments alone, a checkpoint is the whole experiment,
and a batch carries token ids, which are some hundred times smaller than their features. Or it carries the features, of
a frozen encoder that is too dear to be asked at every step (text.precomputed).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import losses, predictions, samplers, weightings
from diffusion.data.batches import batch_indices, make_batches
from diffusion.data.images import to_float, to_uint8
from diffusion.data.sources import Source
from diffusion.networks.mmdit import MMDiT
from diffusion.networks.unet import UNet
from diffusion.training import Experiment, Loss, Mean, run_key
from experiments import image_diffusion
from experiments.command_line import Config
from experiments.image_diffusion import Diffusion
from experiments.optimizers import make_optimizer
from experiments.text_encoders import Text, TextEncoder, encode, make_text_encoder


def make_network(config: Config, channels: int, encoder: TextEncoder, diffusion: Diffusion) -> MMDiT | UNet:
    """Returns the network of `config.network`; both kinds are applied to (x_t, time, context=, pooled=)."""
    settings = dict(config.network)
    settings["dtype"] = jnp.dtype(settings["dtype"])
    match settings.pop("name"):
        case "mmdit":
            return MMDiT(
                **settings,
                channels=channels,
                context_width=encoder.context_width,
                pooled_width=encoder.pooled_width,
                time_scale=diffusion.time_scale,
            )
        case "unet":
            return UNet(**settings, out_channels=channels, time_scale=diffusion.time_scale)
        case name:
            raise ValueError(f"network.name is {name!r}: choose mmdit or unet")


def make_loss(config: Config, network: MMDiT | UNet, encoder: TextEncoder, diffusion: Diffusion) -> Loss:
    """Returns loss(params, batch, key): a share of the prompts is dropped, for guidance.

    A batch holds "image", and either "text", token ids int32[B, L], or the features "context" and "pooled".
    """
    kind = config.loss.prediction
    weight = image_diffusion.make_weight(config, diffusion)
    draw = {"uniform": weightings.uniform, "stratified": weightings.stratified}.get(config.loss.draw)
    if draw is None:
        raise ValueError(f"loss.draw is {config.loss.draw!r}: choose uniform or stratified")
    if not 0 <= config.loss.caption_dropout <= 1:
        raise ValueError(f"loss.caption_dropout is {config.loss.caption_dropout}: it has to lie in [0, 1]")
    (empty,) = encoder.tokenize([""])

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        time_key, eps_key, drop_key = jax.random.split(key, 3)
        x_0 = to_float(batch["image"])
        eps = jax.random.normal(eps_key, x_0.shape)
        u = draw(time_key, len(x_0))
        time = diffusion.quantile(u)
        signal, noise = diffusion.process(time)
        x_t = predictions.per_example(signal, x_0) * x_0 + predictions.per_example(noise, x_0) * eps
        dropped = jax.random.bernoulli(drop_key, config.loss.caption_dropout, (len(x_0), 1))
        if "text" in batch:
            text = encode(encoder, params, jnp.where(dropped, empty, batch["text"]))
        else:
            nothing = encode(encoder, params, empty[None])
            text = Text(
                jnp.where(dropped[..., None], nothing.context, batch["context"]),
                jnp.where(dropped, nothing.pooled, batch["pooled"]),
            )
        output: Any = network.apply(params["network"], x_t, time, context=text.context, pooled=text.pooled)
        total = losses.weighted_mse(weight(time), predictions.target(kind, x_0, eps, signal, noise), output)
        return total, image_diffusion.mean_by_part("loss", total, u)

    return loss


def make_text_optimizer(config: Config, encoder: TextEncoder) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of `config`, which leaves a frozen encoder alone, and its learning rate."""
    optimizer, learning_rate = make_optimizer(config)
    if encoder.frozen:
        parts: dict[Any, Any] = {"network": optimizer, "text": optax.set_to_zero()}
        optimizer = optax.multi_transform(parts, {name: name for name in parts})
    return optimizer, learning_rate


def make_denoise(
    config: Config, network: MMDiT | UNet, diffusion: Diffusion, params: Any, text: Text, negative: Text
) -> samplers.Denoise:
    """Returns denoise(x_t, time) -> x_0_hat, led to `text` and away from `negative` as `config.sampling` says."""

    def denoise_of(text: Text) -> samplers.Denoise:
        def apply(x_t: jax.Array, time: jax.Array) -> Any:
            return network.apply(params["network"], x_t, time, context=text.context, pooled=text.pooled)

        return predictions.denoiser(config.loss.prediction, apply, diffusion.process)

    denoise = image_diffusion.guided(config, denoise_of(text), denoise_of(negative))
    return image_diffusion.thresholded(config, denoise)


class Parts(NamedTuple):
    """What a config stands for, before any data is read."""

    config: Config
    image_shape: tuple[int, int, int]
    encoder: TextEncoder
    diffusion: Diffusion
    network: MMDiT | UNet


def make_parts(
    config: Config,
    image_shape: tuple[int, int, int],
    vocabulary: Sequence[str],
    stored: Mapping[str, Any] | None = None,
) -> Parts:
    """Returns the encoder (described by a checkpoint where there is one), the process and the network of `config`."""
    encoder = make_text_encoder(config, vocabulary, stored)
    diffusion = image_diffusion.make_diffusion(config)
    return Parts(config, image_shape, encoder, diffusion, make_network(config, image_shape[-1], encoder, diffusion))


# A way to use a model: (sampler, denoise, grid, keys [B], *images) -> images.
Use = Callable[..., jax.Array]


def sample(sampler: Any, denoise: Any, grid: Any, keys: jax.Array, eps: jax.Array) -> jax.Array:
    """The plainest `Use`: from noise to images."""
    return sampler(denoise, grid.noise[0] * eps, grid, keys)


def make_generate(parts: Parts, mesh: Mesh, use: Use = sample) -> Callable[..., jax.Array]:
    """Returns generate(params, ids int32[B, L], negative int32[B, L], keys [B], *images) -> uint8, jitted.

    With `sample`, images are the noise, float [B, H, W, C]. Spread over the mesh, which has to divide B.

    Raises:
      ValueError: an unknown sampler, or a grid it cannot follow.
    """
    config, _, encoder, diffusion, network = parts
    sampler = image_diffusion.make_sampler(config)
    grid = diffusion.grid(config.sampling.num_steps)

    def generate(params: Any, ids: jax.Array, negative: jax.Array, keys: jax.Array, *images: jax.Array) -> jax.Array:
        # Prompts are encoded once, not at every step.
        text, other = encode(encoder, params, ids), encode(encoder, params, negative)
        denoise = make_denoise(config, network, diffusion, params, text, other)
        return to_uint8(use(sampler, denoise, grid, keys, *images))

    return jax.jit(generate, out_shardings=NamedSharding(mesh, PartitionSpec("data")))


def draw_noise(seed: Any, index: Any, image_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(keys [B], noise [B, H, W, C]) of images number `index`: pure functions of the seed and the number."""
    keys = jax.vmap(lambda i: jax.random.split(run_key(seed, "sample", i)))(jnp.asarray(index))
    return keys[:, 1], jax.vmap(lambda key: jax.random.normal(key, image_shape))(keys[:, 0])


def make_experiment(parts: Parts, source: Source, preview_prompts: Sequence[str], mesh: Mesh) -> Experiment:
    """Returns the experiment on a source that reads what `make_loss` takes; each preview shows the prompts in turn.

    Raises:
      ValueError: whatever cannot be built; nothing has been allocated or written by then.
    """
    config, image_shape, encoder, diffusion, network = parts
    optimizer, learning_rate = make_text_optimizer(config, encoder)
    batch_size = config.data.batch_size
    num_previews = image_diffusion.round_up(config.training.num_previews, mesh.size)
    prompts = [preview_prompts[i % len(preview_prompts)] for i in range(num_previews)]
    ids, empty = encoder.tokenize(prompts), encoder.tokenize([""] * num_previews)
    generate = make_generate(parts, mesh)

    def init(key: jax.Array) -> Any:
        text_key, network_key = jax.random.split(key)
        of_text = encoder.init(text_key)
        text = encoder.encode(of_text, jnp.asarray(ids[:1]))
        of_network = network.init(network_key, jnp.zeros((1, *image_shape)), jnp.zeros((1,)), **text._asdict())
        return {"network": of_network, "text": of_text}

    def batches(start_step: int) -> Any:
        return make_batches(
            source,
            config.seed,
            batch_size,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def preview(params: Any) -> jax.Array:
        return generate(params, ids, empty, *draw_noise(config.seed, np.arange(num_previews), image_shape))

    # What does not fit together is told here, before anything is written: the data, the network, the sampler.
    batch_indices(config.seed, 0, batch_size, source.num_examples)
    jax.eval_shape(preview, jax.eval_shape(init, run_key(config.seed, "init")))
    return Experiment(
        init=init,
        loss=make_loss(config, network, encoder, diffusion),
        optimizer=optimizer,
        learning_rate=learning_rate,
        batches=batches,
        batch_size=batch_size,
        preview=preview,
    )
