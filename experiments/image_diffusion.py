"""What the image experiments share: from a config and a source of images to training, samples and a report.

This is where the parts meet. A new idea usually is a line in one of the `make_` functions below, or a function of your
own handed to `Experiment` in their place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import guidance, losses, predictions, samplers, schedules
from diffusion.data.batches import make_batches
from diffusion.data.images import to_float, to_uint8
from diffusion.data.sources import Source
from diffusion.networks.unet import UNet
from diffusion.training import Experiment, Loss, Mean, Settings, fully_sharded, replicated, run_key
from experiments.command_line import Config


class Diffusion(NamedTuple):
    """A process, and how it is trained and sampled.

    Attributes:
      process: time -> (signal, noise); time is what the network is given.
      times: (key, B) -> float32[B], the times that training draws.
      level: time -> [0, 1], how far along the process a time is; only for the metrics.
      grid: number of steps -> the grid that sampling follows.
      time_scale: what the network's embedding multiplies time by.
    """

    process: predictions.Process
    times: Callable[[jax.Array, int], jax.Array]
    level: Callable[[jax.Array], jax.Array]
    grid: Callable[[int], schedules.Grid]
    time_scale: float


def make_diffusion(config: Config) -> Diffusion:
    """Returns DDPM's discrete chain as `config.process` says.

    Raises:
      ValueError: a name, a number of steps or a beta that cannot be.
    """
    num_steps = config.process.num_steps
    match config.process.beta:
        case "linear":
            beta = schedules.linear_beta(num_steps, config.process.first, config.process.last)
        case "cosine":
            beta = schedules.cosine_beta(num_steps)
        case name:
            raise ValueError(f"process.beta is {name!r}: choose linear or cosine")
    schedule = schedules.make_schedule(beta)

    def times(key: jax.Array, batch_size: int) -> jax.Array:
        return jax.random.randint(key, (batch_size,), 0, num_steps).astype(jnp.float32)

    return Diffusion(
        schedules.discrete_process(schedule),
        times,
        lambda time: time / num_steps,
        partial(schedules.ddpm_grid, schedule),
        time_scale=1.0,
    )


def make_network(config: Config, source: Source, diffusion: Diffusion) -> UNet:
    """Returns the U-Net of `config.network` for the images of `source`."""
    settings = dict(config.network)
    class_conditional = settings.pop("class_conditional")
    if class_conditional and source.num_classes is None:
        raise ValueError(f"network.class_conditional needs labels, and {source.name} has none")
    return UNet(
        **{**settings, "dtype": jnp.dtype(settings["dtype"])},
        num_classes=source.num_classes if class_conditional else None,
        time_scale=diffusion.time_scale,
    )


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns Adam with warm-up and clipping, and its learning rate as a function of the step."""
    settings = config.optimizer
    peak = settings.learning_rate
    parts = [optax.linear_schedule(0.0, peak, settings.warmup_steps)]
    match settings.decay:
        case "constant":
            parts.append(optax.constant_schedule(peak))
        case "cosine":
            parts.append(optax.cosine_decay_schedule(peak, config.training.num_steps - settings.warmup_steps))
        case name:
            raise ValueError(f"optimizer.decay is {name!r}: choose constant or cosine")
    # From 1, so that the first update is not lost to a rate of zero.
    rate = optax.join_schedules(parts, [settings.warmup_steps])
    learning_rate = lambda step: rate(step + 1)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adam(learning_rate, b1=settings.b1, b2=settings.b2, eps=settings.eps),
    )
    return optimizer, learning_rate


def make_loss(config: Config, network: UNet, diffusion: Diffusion) -> Loss:
    """Returns DDPM's Algorithm 1: loss(params, batch, key) -> (float32[B], metrics)."""
    kind = config.loss.prediction
    num_classes = network.num_classes

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        time_key, eps_key, dropout_key, label_key = jax.random.split(key, 4)
        x_0 = to_float(batch["image"])
        time = diffusion.times(time_key, len(x_0))
        eps = jax.random.normal(eps_key, x_0.shape)
        signal, noise = diffusion.process(time)
        x_t = predictions.per_example(signal, x_0) * x_0 + predictions.per_example(noise, x_0) * eps
        label = None
        if num_classes is not None:
            dropped = jax.random.bernoulli(label_key, config.loss.label_dropout, time.shape)
            label = jnp.where(dropped, num_classes, batch["label"])
        output: Any = network.apply(
            params,
            predictions.network_input(kind, x_t, signal, noise),
            time,
            label,
            train=True,
            rngs={"dropout": dropout_key},
        )
        error = losses.simple_loss(predictions.target(kind, x_0, eps, signal, noise), output)
        return error, mean_by_level("loss", error, diffusion.level(time))

    return loss


def mean_by_level(name: str, values: jax.Array, level: jax.Array, parts: int = 4) -> dict[str, Mean]:
    """Returns `values` [B] as one `Mean` for each of `parts` equal ranges of `level` [B] in [0, 1]."""
    part = jnp.clip((level * parts).astype(jnp.int32), 0, parts - 1)
    inside = {i: (part == i).astype(jnp.float32) for i in range(parts)}
    return {f"{name}_t_{i}_of_{parts}": Mean(values * inside[i], inside[i]) for i in range(parts)}


Generate = Callable[[Any, Any, Any], jax.Array]


def make_generate(config: Config, source: Source, network: UNet, diffusion: Diffusion, mesh: Mesh) -> Generate:
    """Returns generate(params, seed, index int32[B]) -> uint8[B, H, W, C], jitted, spread over the mesh.

    Image number i is a pure function of (params, seed, i), whatever batch it is made in. With a class-conditional
    network image i is of class i mod num_classes.

    Raises:
      ValueError: an unknown sampler, or a grid it cannot follow.
    """
    settings = config.sampling
    sampler = make_sampler(settings)
    grid = diffusion.grid(settings.num_steps)
    kind = config.loss.prediction
    num_classes = network.num_classes

    def denoise_with(params: Any, label: jax.Array | None) -> predictions.Denoise:
        apply = lambda x_t, time: network.apply(params, x_t, time, label)  # noqa: E731
        return predictions.denoiser(kind, apply, diffusion.process)  # type: ignore[arg-type]

    def generate(params: Any, seed: Any, index: Any) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.split(run_key(seed, "sample", i)))(index)
        eps = jax.vmap(lambda key: jax.random.normal(key, source.image_shape))(keys[:, 0])
        label = None if num_classes is None else index % num_classes
        denoise = denoise_with(params, label)
        if settings.guidance != 1.0:
            if num_classes is None:
                raise ValueError("sampling.guidance needs network.class_conditional")
            denoise = guidance.classifier_free(denoise, denoise_with(params, None), settings.guidance)
        if settings.clip:
            denoise = guidance.clip(denoise)
        return to_uint8(sampler(denoise, grid.noise[0] * eps, grid, keys[:, 1]))

    return jax.jit(generate, out_shardings=NamedSharding(mesh, PartitionSpec("data")))


def make_sampler(settings: Config) -> Callable[..., Any]:
    """Returns sampler(denoise, x_T, grid, key) for `config.sampling`."""
    match settings.sampler:
        case "ancestral":
            return partial(samplers.ancestral, variance=settings.variance)
        case "ddim":
            return partial(samplers.ddim, eta=settings.eta)
        case name:
            raise ValueError(f"sampling.sampler is {name!r}: choose ancestral or ddim")


def make_experiment(config: Config, source: Source, mesh: Mesh) -> Experiment:
    """Returns the experiment of `config` on the images of `source`.

    Raises:
      ValueError: whatever cannot be built; nothing has been allocated or written by then.
    """
    diffusion = make_diffusion(config)
    network = make_network(config, source, diffusion)
    optimizer, learning_rate = make_optimizer(config)
    generate = make_generate(config, source, network, diffusion, mesh)
    batch_size = config.data.batch_size
    num_previews = round_up(config.training.num_previews, mesh.size)

    def init(key: jax.Array) -> Any:
        x_t = jnp.zeros((1, *source.image_shape))
        label = None if network.num_classes is None else jnp.zeros((1,), jnp.int32)
        return network.init(key, x_t, jnp.zeros((1,)), label)

    def batches(start_step: int) -> Any:
        return make_batches(
            source,
            config.seed,
            batch_size,
            start_step=start_step,
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    jax.eval_shape(init, run_key(config.seed, "init"))  # a network that does not fit the images is told here
    return Experiment(
        init=init,
        loss=make_loss(config, network, diffusion),
        optimizer=optimizer,
        learning_rate=learning_rate,
        batches=batches,
        batch_size=batch_size,
        preview=lambda params: generate(params, np.uint32(config.seed), np.arange(num_previews)),
    )


def make_settings(config: Config) -> Settings:
    """Returns how long, and with which reports, `config.training` asks to train."""
    settings = dict(config.training)
    del settings["num_previews"]
    match settings.pop("sharding"):
        case "replicated":
            rule = replicated
        case "full":
            rule = fully_sharded
        case name:
            raise ValueError(f"training.sharding is {name!r}: choose replicated or full")
    return Settings(seed=config.seed, rule=rule, **settings)


def round_up(count: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
