"""Losses by name: DDPM's, and those that train a network to draw in one to four steps from images alone.

Each is a function of the process and its own settings that returns an `Objective`; a new one is a new function in
`LOSSES`. Those that learn from a trained model are in `distilled.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion import consistency, flow, flow_map, losses, predictions
from diffusion.model.choices import of_name, pick
from diffusion.model.config import Config
from diffusion.model.distilled import imitation, progressive
from diffusion.model.objectives import Drawn, Found, Objective, check_flow, errors, mean_by_part
from diffusion.model.processes import Process, make_draw, make_weight
from diffusion.types import per_example


def make_objective(config: Config, process: Process) -> Objective:
    """Returns the objective of `config.loss`.

    Raises:
      ValueError: an unknown name or field, or a process that the loss does not have.
    """
    return pick(LOSSES, config.loss, "loss")(process)


def denoising(
    process: Process,
    *,
    prediction: str = "eps",
    weighting: str = "simple",
    draw: str = "uniform",
    learned_variance: bool = False,
    vlb_weight: float = 1e-3,
) -> Objective:
    """Returns DDPM's Algorithm 1, for any process: the weighted mean square of the network's prediction at one time.

    Args:
      process: of x_t.
      prediction: what the network returns.
      weighting: of noise levels, a name of `make_weight`.
      draw: of training times, a name of `make_draw`.
      learned_variance: the network also returns the variance of a chain's ancestral steps.
      vlb_weight: of the bound in L_hybrid; with learned_variance.
    """
    if learned_variance and process.schedule is None:
        raise ValueError("loss.learned_variance is that of a chain's steps: it needs process.name=ddpm")
    weight, draw_u = make_weight(weighting, prediction, process), make_draw(draw)

    def compute(drawn: Drawn) -> Found:
        x_0, eps = drawn.x_0, drawn.eps
        u = draw_u(drawn.key, len(x_0))
        time = process.quantile(u)
        signal, noise = process.at(time)
        x_t = predictions.diffuse(x_0, eps, signal, noise)
        output = drawn.network(predictions.network_input(prediction, x_t, signal, noise), time)
        output, *v = output if learned_variance else (output,)
        total = losses.weighted_mse(weight(time), predictions.target(prediction, x_0, eps, signal, noise), output)
        if v and process.schedule is not None:
            t = time.astype(jnp.int32) + 1
            x_0_hat = predictions.to_x_0(prediction, output, x_t, signal, noise)
            total = losses.hybrid_loss(total, process.schedule, x_0, x_t, t, x_0_hat, v[0], vlb_weight)
        return total, mean_by_part("loss", total, u)

    return Objective(compute, prediction, learned_variance=learned_variance)


def mean_flow(
    process: Process,
    *,
    mean: float = -0.4,
    std: float = 1.0,
    lower: tuple[float, ...] = (),
    share: float = 0.75,
    tangent: str = "conditional",
    p: float = 1.0,
    c: float = 1e-2,
    omega: float = 1.0,
    kappa: float = 0.0,
) -> Objective:
    """Returns MeanFlow's loss, of a network that is the average velocity of a step (`flow_map.mean_flow_loss`).

    Args:
      process: a flow.
      mean: of the logit of times.
      std: of it.
      lower: mean and standard deviation of the earlier time's, where it has its own; (): it has not.
      share: of the batch whose step has no length, where the loss is flow matching's.
      tangent: conditional (MeanFlow), or predicted by the network (iMF).
      p: exponent of the adaptive weight.
      c: its constant, in units of an image's summed squares.
      omega: with kappa the scale of the guidance that is trained in, omega / (1 - kappa); 1: none.
      kappa: the share of it that is the network's own conditional velocity.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling"; "Improved Mean Flows".
    """
    check_flow(process, "mean_flow")
    predicts = of_name({"conditional": False, "predicted": True}, tangent, "loss.tangent")
    if not 0 <= share <= 1:
        raise ValueError(f"loss.share is {share}: it has to lie in [0, 1]")
    if not 0 <= kappa < 1:
        raise ValueError(f"loss.kappa is {kappa}: it has to lie in [0, 1)")
    if len(lower) not in (0, 2):
        raise ValueError(f"loss.lower is {lower}: give mean and standard deviation, or ()")
    guided = omega != 1.0 or kappa != 0.0

    def compute(drawn: Drawn) -> Found:
        own = (lower[0], lower[1]) if lower else None
        r, t = flow_map.draw_times(drawn.key, len(drawn.x_0), mean, std, share, own)
        z_t, v = flow.interpolate(drawn.x_0, drawn.eps, t), flow.velocity(drawn.x_0, drawn.eps)
        conditional = drawn.network(z_t, t) if predicts or kappa else v
        if guided:
            scales = (jnp.where(drawn.hidden, none, scale) for none, scale in ((1.0, omega), (0.0, kappa)))
            v = flow_map.guided_velocity(v, drawn.unconditional(z_t, t), conditional, *scales)
        losses, error = flow_map.mean_flow_loss(
            lambda z, r, t: drawn.network(z, t, next_time=r), z_t, r, t, v, conditional if predicts else None, p, c
        )
        return losses, errors(error, t)

    return Objective(compute, "velocity", ("denoise", "jump", "end"), two_times=True, by_time=True, guided=guided)


def consistency_training(
    process: Process,
    *,
    prediction: str = "F",
    mean: float = -1.1,
    std: float = 2.0,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    c: float = 0.0,
    stage_steps: int = 50_000,
    num_stages: int = 8,
) -> Objective:
    """Returns consistency training in pairs of times that come closer in stages (ECT, `consistency.consistency_loss`).

    Args:
      process: EDM's, or a flow.
      prediction: what the network returns.
      mean: of ln(noise / signal).
      std: of it.
      q: the ratio of the pair's distance in two stages.
      k, b: of `consistency.consistency_time`.
      c: of the Pseudo-Huber norm; 0: the norm.
      stage_steps: updates in a stage.
      num_stages: the last of which lasts to the end.

    Source: Geng et al. 2024, "Consistency Models Made Easy".
    """
    time_of = process.time_of
    if time_of is None:
        raise ValueError("loss.name=consistency draws noise levels: it needs process.name=edm or flow")
    if stage_steps < 1 or num_stages < 1:
        raise ValueError(f"loss.stage_steps is {stage_steps} and num_stages {num_stages}: give at least 1 of each")

    def compute(drawn: Drawn) -> Found:
        assert drawn.step is not None
        normal = jax.random.normal(drawn.key, drawn.x_0.shape[:1])
        sigma = jnp.exp(mean + std * normal)
        stage = jnp.minimum(drawn.step // stage_steps, num_stages - 1).astype(jnp.float32)
        denoise = predictions.denoiser(prediction, drawn.network, process.at)

        def f(x: jax.Array, sigma: jax.Array) -> jax.Array:
            time = time_of(sigma)
            return denoise(per_example(process.at(time)[0], x) * x, time)

        below = consistency.consistency_time(sigma, stage, q, k, b)
        losses, error = consistency.consistency_loss(f, drawn.x_0, drawn.eps, sigma, below, c)
        return losses, errors(error, jax.scipy.stats.norm.cdf(normal))

    return Objective(compute, prediction, ("denoise", "end"), mean=False, by_step=True)


def continuous_consistency(
    process: Process, *, mean: float = -1.0, std: float = 1.4, c: float = 0.1, warmup_steps: int = 10_000
) -> Objective:
    """Returns consistency training in continuous time (sCT, `consistency.continuous_consistency_loss`).

    Without the adaptive weight w(t), which makes e^w times the loss at each t the same on average: with its tangent
    normalised the loss is (|g| / (|g| + c))^2 / D, the same at each t already where |g| is well above c.

    Args:
      process: a flow.
      mean: of the logit of times, which is ln(noise / signal).
      std: of it.
      c: of the tangent's norm.
      warmup_steps: updates until the tangent is whole, 0: it is at once; before the first of several the loss is flow
        matching's, but for the norm.

    Source: Lu & Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models".
    """
    check_flow(process, "continuous_consistency")
    if warmup_steps < 0:
        raise ValueError(f"loss.warmup_steps is {warmup_steps}: give the number of updates, or 0 for none")

    def compute(drawn: Drawn) -> Found:
        assert drawn.step is not None
        t = flow.logit_normal_time(drawn.key, len(drawn.x_0), mean, std)
        z_t, v = flow.interpolate(drawn.x_0, drawn.eps, t), flow.velocity(drawn.x_0, drawn.eps)
        warmup = jnp.minimum(drawn.step / warmup_steps, 1.0) if warmup_steps else 1.0
        losses, error = consistency.continuous_consistency_loss(drawn.network, z_t, t, v, warmup, c)
        return losses, errors(error, t)

    return Objective(compute, "velocity", ("denoise", "end"), mean=False, by_step=True, by_time=True)


LOSSES: dict[str, Callable[..., Objective]] = {
    "denoising": denoising,
    "mean_flow": mean_flow,
    "consistency": consistency_training,
    "continuous_consistency": continuous_consistency,
    "imitation": imitation,
    "progressive": progressive,
}
