"""What the image experiments share: from a config and a source of images to a loss, a sampler, an experiment.

This is where the parts meet. A new idea usually is a line in one of the `make_` functions below, or a function of your
own handed to `Experiment` in their place.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import guidance, losses, predictions, samplers, schedules, weightings
from diffusion.data.batches import batch_indices, make_batches
from diffusion.data.images import to_float, to_uint8
from diffusion.data.sources import Source
from diffusion.networks.unet import UNet
from diffusion.training import Experiment, Loss, Mean, Settings, fully_sharded, replicated, run_key
from experiments.command_line import Config
from experiments.optimizers import make_optimizer


class Diffusion(NamedTuple):
    """A process, and how it is trained and sampled.

    Attributes:
      process: time -> (signal, noise); time is what the network is given.
      quantile: u in (0, 1) -> time, monotonous; training draws u evenly.
      grid: number of steps -> the grid that sampling follows.
      time_scale: what the network's embedding multiplies time by.
      schedule: DDPM's chain, where the process is one.
    """

    process: predictions.Process
    quantile: Callable[[jax.Array], jax.Array]
    grid: Callable[[int], schedules.Grid]
    time_scale: float
    schedule: schedules.Schedule | None = None


def make_diffusion(config: Config) -> Diffusion:
    """Returns the process that `config.process` names, its training times and its sampling grid.

    Raises:
      ValueError: an unknown name, or a number that cannot be.
    """
    match config.process.name:
        case "ddpm":
            return make_ddpm(config)
        case "vp":
            process = schedules.vp_process(schedules.cosine_log_snr())
            even = partial(schedules.process_grid, process)
            return Diffusion(process, lambda u: u, make_grid(config, even, even(1000)), time_scale=1000.0)
        case "flow":
            process = schedules.flow_process
            shift = config.sampling.shift

            def even(num_steps: int, power: float = 1.0) -> schedules.Grid:
                if power == 1.0:
                    return schedules.flow_grid(num_steps, shift)
                return schedules.process_grid(process, num_steps, power)

            grid = make_grid(config, even, schedules.flow_grid(1000))
            return Diffusion(process, flow_quantile(config.loss.times), grid, time_scale=1000.0)
        case "edm":
            if config.sampling.grid not in ("karras", "log_snr"):
                raise ValueError(f"sampling.grid is {config.sampling.grid!r}: an edm process has karras or log_snr")
            rho = 7.0 if config.sampling.grid == "karras" else math.inf
            grid = partial(schedules.karras_grid, rho=rho)
            return Diffusion(schedules.edm_process, weightings.log_normal_quantile, grid, time_scale=1.0)
        case name:
            raise ValueError(f"process.name is {name!r}: choose ddpm, vp, flow or edm")


def make_ddpm(config: Config) -> Diffusion:
    """Returns DDPM's discrete chain; the network's time is t - 1."""
    num_steps = config.process.num_steps
    match config.process.beta:
        case "linear":
            beta = schedules.linear_beta(num_steps, config.process.first, config.process.last)
        case "cosine":
            beta = schedules.cosine_beta(num_steps)
        case name:
            raise ValueError(f"process.beta is {name!r}: choose linear or cosine")
    schedule = schedules.make_schedule(beta)
    even = partial(schedules.ddpm_grid, schedule)

    def quantile(u: jax.Array) -> jax.Array:
        return (weightings.step_quantile(u, num_steps) - 1).astype(jnp.float32)

    return Diffusion(
        schedules.discrete_process(schedule), quantile, make_grid(config, even, even(num_steps)), 1.0, schedule
    )


def make_grid(
    config: Config, even: Callable[..., schedules.Grid], fine: schedules.Grid
) -> Callable[[int], schedules.Grid]:
    """Returns number of steps -> grid, spaced as `config.sampling.grid` says: `even` in time, or picked from `fine`."""
    match config.sampling.grid:
        case "uniform":
            return even
        case "quadratic":
            return partial(even, power=2.0)
        case "log_snr":
            return partial(schedules.respace, fine)
        case "karras":
            return partial(schedules.respace, fine, rho=7.0)
        case name:
            raise ValueError(f"sampling.grid is {name!r}: choose uniform, quadratic, log_snr or karras")


def flow_quantile(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the quantile function of SD3's distributions over flow times."""
    match name:
        case "uniform":
            return lambda u: u
        case "logit_normal":
            return weightings.logit_normal_quantile
        case "mode":
            return weightings.mode_quantile
        case "cosmap":
            return weightings.cosmap_quantile
    raise ValueError(f"loss.times is {name!r}: choose uniform, logit_normal, mode or cosmap")


def make_weight(config: Config, diffusion: Diffusion) -> Callable[[jax.Array], Any]:
    """Returns time -> the weight of the mean squared error of the network's output, as `config.loss.weighting` says."""
    kind = config.loss.prediction

    def by_level(weight: Callable[..., jax.Array]) -> Callable[[jax.Array], Any]:
        return lambda time: weight(kind, *diffusion.process(time))

    match config.loss.weighting:
        case "none":
            return lambda time: 1.0
        case "simple":
            return by_level(weightings.simple)
        case "min_snr":
            return by_level(weightings.min_snr)
        case "p2":
            return by_level(weightings.p2)
        case "edm":
            return by_level(weightings.edm)
        case "vlb":
            schedule = diffusion.schedule
            if schedule is None:
                raise ValueError("loss.weighting=vlb weighs the steps of a chain: it needs process.name=ddpm")
            return lambda time: weightings.vlb(kind, schedule, time.astype(jnp.int32) + 1)
        case name:
            raise ValueError(f"loss.weighting is {name!r}: choose none, simple, min_snr, p2, edm or vlb")


def make_network(config: Config, source: Source, diffusion: Diffusion) -> UNet:
    """Returns the U-Net of `config.network` for the images of `source`."""
    settings = dict(config.network)
    class_conditional = settings.pop("class_conditional")
    if class_conditional and source.num_classes is None:
        raise ValueError(f"network.class_conditional needs labels, and {source.name} has none")
    if config.loss.learned_variance and diffusion.schedule is None:
        raise ValueError("loss.learned_variance is that of a chain's steps: it needs process.name=ddpm")
    channels = source.image_shape[-1]
    return UNet(
        **{**settings, "dtype": jnp.dtype(settings["dtype"])},
        num_classes=source.num_classes if class_conditional else None,
        out_channels=2 * channels if config.loss.learned_variance else channels,
        time_scale=diffusion.time_scale,
    )


def make_loss(config: Config, network: UNet, diffusion: Diffusion) -> Loss:
    """Returns loss(params, batch, key) -> (float32[B], metrics): DDPM's Algorithm 1, for any process."""
    kind = config.loss.prediction
    weight = make_weight(config, diffusion)
    draw = {"uniform": weightings.uniform, "stratified": weightings.stratified}.get(config.loss.draw)
    if draw is None:
        raise ValueError(f"loss.draw is {config.loss.draw!r}: choose uniform or stratified")

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        time_key, eps_key, dropout_key, label_key = jax.random.split(key, 4)
        x_0 = to_float(batch["image"])
        eps = jax.random.normal(eps_key, x_0.shape)
        u = draw(time_key, len(x_0))
        time = diffusion.quantile(u)
        signal, noise = diffusion.process(time)
        x_t = predictions.per_example(signal, x_0) * x_0 + predictions.per_example(noise, x_0) * eps
        label = None
        if network.num_classes is not None:
            label = guidance.drop_labels(label_key, batch["label"], network.num_classes, config.loss.label_dropout)
        output: Any = network.apply(
            params,
            predictions.network_input(kind, x_t, signal, noise),
            time,
            label,
            train=True,
            rngs={"dropout": dropout_key},
        )
        v = None
        if config.loss.learned_variance:
            output, v = jnp.split(output, 2, axis=-1)
        total = losses.weighted_mse(weight(time), predictions.target(kind, x_0, eps, signal, noise), output)
        if v is not None and diffusion.schedule is not None:
            # L_hybrid (Nichol & Dhariwal 2021, eq. 16), its bound taken over all T steps.
            t = time.astype(jnp.int32) + 1
            x_0_hat = predictions.to_x_0(kind, output, x_t, signal, noise)
            bound = losses.learned_variance_loss(diffusion.schedule, x_0, x_t, t, x_0_hat, v)
            total += config.loss.vlb_weight * (diffusion.schedule.beta.shape[0] - 1) * bound
        return total, mean_by_part("loss", total, u)

    return loss


def mean_by_part(name: str, values: jax.Array, u: jax.Array, parts: int = 4) -> dict[str, Mean]:
    """Returns `values` [B] as one `Mean` for each of `parts` equal ranges of u in (0, 1), least noise first."""
    part = jnp.minimum((u * parts).astype(jnp.int32), parts - 1)
    inside = [part == i for i in range(parts)]
    return {  # chosen, not multiplied: a NaN stays in its own part
        f"{name}_part_{i + 1}_of_{parts}": Mean(jnp.where(inside[i], values, 0.0), inside[i].astype(jnp.float32))
        for i in range(parts)
    }


def make_denoise(
    config: Config, network: UNet, diffusion: Diffusion, params: Any, label: jax.Array | None = None
) -> samplers.Denoise:
    """Returns denoise(x_t, time) -> x_0_hat of the network with `params`: guided and clipped as `config.sampling` says.

    With a learned variance it returns (x_0_hat, v).
    """
    settings = config.sampling

    def denoise_of(label: jax.Array | None) -> samplers.Denoise:
        def apply(x_t: jax.Array, time: jax.Array) -> Any:
            output: Any = network.apply(params, x_t, time, label)
            return tuple(jnp.split(output, 2, axis=-1)) if config.loss.learned_variance else output

        return predictions.denoiser(config.loss.prediction, apply, diffusion.process)

    denoise = conditional = denoise_of(label)
    if settings.guidance != 1.0:
        if network.num_classes is None:
            raise ValueError("sampling.guidance needs classes to be guided to: network.class_conditional=True")
        denoise = guided(config, conditional, denoise_of(None))
    return thresholded(config, denoise)


def guided(config: Config, conditional: samplers.Denoise, unconditional: samplers.Denoise) -> samplers.Denoise:
    """Returns `conditional` led away from `unconditional` as strongly, and where, as `config.sampling` says."""
    settings = config.sampling
    denoise = guidance.classifier_free(conditional, unconditional, settings.guidance)
    if settings.guidance_interval:
        denoise = guidance.limited_interval(denoise, conditional, *settings.guidance_interval)
    return denoise


def thresholded(config: Config, denoise: samplers.Denoise) -> samplers.Denoise:
    """Returns `denoise` with its x_0_hat bounded as `config.sampling.threshold` says."""
    match config.sampling.threshold:
        case "clip":
            return guidance.clip(denoise)
        case "dynamic":
            return guidance.dynamic_threshold(denoise)
        case "none":
            return denoise
        case name:
            raise ValueError(f"sampling.threshold is {name!r}: choose clip, dynamic or none")


def make_sampler(config: Config) -> Callable[..., Any]:
    """Returns sampler(denoise, x_T, grid, key) -> x_0 of `config.sampling`."""
    settings = config.sampling
    match settings.sampler:
        case "ancestral":
            if settings.variance == "learned" and not config.loss.learned_variance:
                raise ValueError(
                    "sampling.variance=learned needs a network trained with loss.learned_variance=True: "
                    "use sampling.variance=large or small"
                )
            return partial(samplers.ancestral, variance=settings.variance)
        case "ddim" | "euler":
            return partial(samplers.ddim, eta=settings.eta)
        case "heun":
            return partial(samplers.heun, s_churn=settings.churn)
        case "dpm_solver_pp":
            return partial(samplers.dpm_solver_pp, order=settings.order)
        case "unipc":
            return partial(samplers.unipc, order=settings.order)
        case name:
            raise ValueError(
                f"sampling.sampler is {name!r}: choose ancestral, ddim (or euler), heun, dpm_solver_pp or unipc"
            )


Generate = Callable[[Any, Any, Any], jax.Array]


def make_generate(config: Config, source: Source, network: UNet, diffusion: Diffusion, mesh: Mesh) -> Generate:
    """Returns generate(params, seed, index int32[B]) -> uint8[B, H, W, C], jitted, spread over the mesh.

    Image number i is a pure function of (params, seed, i), whatever batch it is made in. With a class-conditional
    network image i is of class i mod num_classes.

    Raises:
      ValueError: an unknown sampler, or a grid it cannot follow.
    """
    sampler = make_sampler(config)
    grid = diffusion.grid(config.sampling.num_steps)

    def generate(params: Any, seed: Any, index: Any) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.split(run_key(seed, "sample", i)))(index)
        eps = jax.vmap(lambda key: jax.random.normal(key, source.image_shape))(keys[:, 0])
        label = None if network.num_classes is None else index % network.num_classes
        denoise = make_denoise(config, network, diffusion, params, label)
        return to_uint8(sampler(denoise, grid.noise[0] * eps, grid, keys[:, 1]))

    return jax.jit(generate, out_shardings=NamedSharding(mesh, PartitionSpec("data")))


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
    previews = np.arange(round_up(config.training.num_previews, mesh.size))

    def init(key: jax.Array) -> Any:
        label = None if network.num_classes is None else jnp.zeros((1,), jnp.int32)
        return network.init(key, jnp.zeros((1, *source.image_shape)), jnp.zeros((1,)), label)

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

    # What does not fit together is told here, before anything is written: the data, the network, the sampler.
    batch_indices(config.seed, 0, batch_size, source.num_examples)
    params = jax.eval_shape(init, run_key(config.seed, "init"))
    jax.eval_shape(generate, params, np.uint32(0), previews)
    return Experiment(
        init=init,
        loss=make_loss(config, network, diffusion),
        optimizer=optimizer,
        learning_rate=learning_rate,
        batches=batches,
        batch_size=batch_size,
        preview=lambda params: generate(params, np.uint32(config.seed), previews),
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
