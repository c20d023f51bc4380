"""Progressive distillation: a sampler of half as many steps, round by round (Salimans & Ho 2022)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.flow_map import Losses
from diffusion.losses import weighted_mse
from diffusion.types import Denoise, Images, Process, Scalars, denoised, per_example


def progressive_target(
    teacher: Denoise, process: Process, x_t: Images, t: Scalars, s: Scalars, r: Scalars
) -> Float[Array, "B *shape"]:
    """Returns the x_0 that one DDIM step from t to r would have to predict to end where two of the teacher's do.

    Args:
      teacher: (x_t, time) -> x_0_hat.
      process: time -> (signal, noise).
      x_t: images at t.
      t: the time, a scalar or [B].
      s: between t and r.
      r: where both end.

    Source: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", eq. 39 of appendix G.

    Example:
      >>> flow = lambda t: (1 - t, t)
      >>> half = lambda x_t, time: 0.5 * jnp.ones_like(x_t)
      >>> print(progressive_target(half, flow, jnp.ones((1, 2)), jnp.ones(1), jnp.full(1, 0.5), jnp.zeros(1)))
      [[0.5 0.5]]
    """
    x_t, t, s, r = (jnp.asarray(array) for array in (x_t, t, s, r))
    x, points = x_t, [tuple(per_example(level, x_t) for level in process(time)) for time in (t, s, r)]
    for time, (signal, noise), (next_signal, next_noise) in zip((t, s), points, points[1:], strict=False):
        scale = next_noise / noise
        x = scale * x + (next_signal - scale * signal) * denoised(teacher(x, time)).x_0_hat
    (signal, noise), _, (last_signal, last_noise) = points
    scale = last_noise / noise
    return jax.lax.stop_gradient((x - scale * x_t) / (last_signal - scale * signal))


def progressive_loss(
    student: Denoise, teacher: Denoise, process: Process, x_t: Images, t: Scalars, s: Scalars, r: Scalars
) -> Losses:
    """Returns the mse of x_0_hat and `progressive_target`, times max(SNR, 1).

    Afterwards the student is the teacher of the next round, with half as many steps.

    Source: Salimans & Ho 2022, Algorithm 2 and section 4.

    Example:
      >>> flow, ones = lambda t: (1 - t, t), jnp.ones((1, 2))
      >>> half, one = lambda x_t, time: 0.5 * ones, lambda x_t, time: ones
      >>> print(*progressive_loss(one, half, flow, ones, jnp.ones(1), jnp.full(1, 0.5), jnp.zeros(1)))
      [0.25] [0.25]
    """
    x_t, t = jnp.asarray(x_t), jnp.asarray(t)
    signal, noise = process(t)
    target = progressive_target(teacher, process, x_t, t, s, r)
    error = weighted_mse(1.0, target, denoised(student(x_t, t)).x_0_hat)
    return jnp.maximum((signal / noise) ** 2, 1) * error, error
