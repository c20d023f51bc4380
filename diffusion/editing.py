"""Uses of a trained model that begin with images: img2img, interpolation, inpainting.

Each takes any sampler of `samplers` (or a `functools.partial` of one), and works for any process: images enter a grid
at one of its points as x = signal * x_0 + noise * eps, and the sampler continues from there. `key` is one key or one
per image, as in the samplers. Call them inside `jax.jit`.

In the examples

>>> from diffusion.samplers import ddim
>>> from diffusion.schedules import flow_grid
>>> denoise = lambda x_t, time: 0.5 * jnp.ones_like(x_t)
>>> x_0, key = jnp.ones((1, 2)), jax.random.key(0)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from diffusion.predictions import diffuse
from diffusion.randomness import fold_in, normal_like
from diffusion.schedules import Grid
from diffusion.types import Denoise, Images, Keys

Sampler = Callable[[Denoise, Any, Grid, Any], Any]


def last_steps(grid: Grid, strength: float) -> Grid:
    """Returns the last strength * N steps of a grid, rounded to a whole number and at least one.

    Raises:
      ValueError: a strength outside (0, 1].

    Example:
      >>> print(last_steps(flow_grid(4), 0.5).time)
      [0.5  0.25 0.  ]
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it has to lie in (0, 1], where 1 is every step of the grid.")
    num_steps = grid.signal.shape[0] - 1
    first = num_steps - max(1, int(strength * num_steps + 0.5))
    return Grid(*(field[first:] for field in grid))


def img2img(sampler: Sampler, denoise: Denoise, x_0: Images, grid: Grid, key: Keys, strength: float) -> Any:
    """Adds noise to images and samples from there: details hidden by the noise are drawn anew.

    Args:
      sampler: sampler(denoise, x_T, grid, key).
      denoise: (x_t, time) -> x_0_hat.
      x_0: the images.
      grid: the whole grid.
      key: one key or one per image.
      strength: in (0, 1], the share of the grid's steps that are run: near 0 the images come back, and at 1 only the
        `signal` of the grid's first point is left of them.

    Returns:
      What the sampler returns.

    Source: Meng et al. 2022 (SDEdit).

    Raises:
      ValueError: a strength outside (0, 1].

    Example:
      >>> print(img2img(ddim, denoise, x_0, flow_grid(4), key, strength=0.5))
      [[0.5 0.5]]
    """
    grid = last_steps(grid, strength)
    eps = normal_like(fold_in(key, 0), x_0)
    return sampler(denoise, diffuse(x_0, eps, grid.signal[0], grid.noise[0]), grid, fold_in(key, 1))


def interpolate(
    sampler: Sampler,
    denoise: Denoise,
    x_0: Images,
    x_0_other: Images,
    grid: Grid,
    key: Keys,
    strength: float,
    shares: Float[Array, "K"],
) -> Float[Array, "K B *shape"]:
    """Interpolates between images in the space of x_t: (1 - share) x_t + share x_t', decoded by the sampler.

    - x_t and x_t' hold the same eps, so that every mixture has the amount of noise that the network was trained on
      (mixtures of two draws of noise have less), and all shares use the same draws.
    - Shares 0 and 1 return what `img2img` makes of either image.

    Args:
      sampler: sampler(denoise, x_T, grid, key).
      denoise: (x_t, time) -> x_0_hat.
      x_0: the images at share 0.
      x_0_other: the images at share 1.
      grid: the whole grid.
      key: one key or one per image.
      strength: how noisy x_t is, as in `img2img`.
      shares: the K mixtures.

    Source: DDPM, section 4.4, figures 8 and 9.

    Raises:
      ValueError: a strength outside (0, 1].

    Example:
      >>> interpolate(ddim, denoise, x_0, -x_0, flow_grid(4), key, 0.5, jnp.linspace(0, 1, 3)).shape
      (3, 1, 2)
    """

    def decode(share: Array) -> Array:
        # Noise of the same eps commutes with the mixture: it is the mixed images' x_t.
        return img2img(sampler, denoise, (1 - share) * x_0 + share * x_0_other, grid, key, strength)

    return jax.vmap(decode)(shares)


def inpaint(
    sampler: Sampler, denoise: Denoise, x_0: Images, known: Array, grid: Grid, key: Keys, resample: int = 10
) -> Images:
    """Samples the pixels that are not `known`, to fit those that are.

    - After every step of the sampler the known pixels are set to x_0 with noise; `resample` - 1 times the step is then
      undone by noise and repeated, which adapts the other pixels to them.
    - It is (N - 1) * resample + 1 steps in one scan.
    - The sampler is given one interval at a time, so that multistep ones have order 1 and heun's s_churn acts at once.

    Args:
      sampler: sampler(denoise, x_T, grid, key).
      denoise: (x_t, time) -> x_0_hat.
      x_0: the images; pixels that are not known are never read.
      known: bool, broadcasts to x_0; these pixels are returned as they are.
      grid: where to step.
      key: one key or one per image.
      resample: how often each step but the last is taken: more, or a finer grid, is nearer to the conditional
        distribution.

    Source: Lugmayr et al. 2022 (RePaint), Algorithm 1.

    Raises:
      ValueError: `known` is not bool or does not broadcast to x_0, or resample < 1.

    Example:
      >>> print(inpaint(ddim, denoise, x_0, jnp.asarray([True, False]), flow_grid(4), key, resample=2))
      [[1.  0.5]]
    """
    if resample < 1:
        raise ValueError(f"resample is {resample}: it has to be at least 1, every step taken once.")
    if known.dtype != bool or known.ndim > x_0.ndim or not _broadcasts(known.shape, x_0.shape):
        raise ValueError(f"known is {known.dtype}{list(known.shape)}: give bool that broadcasts to {list(x_0.shape)}.")
    # Samplers check the values of a grid, which they cannot do in the scan.
    jax.eval_shape(lambda: sampler(denoise, x_0, grid, key))

    num_steps = grid.signal.shape[0] - 1
    index = np.append(np.repeat(np.arange(num_steps - 1), resample), num_steps - 1)
    undone = np.append(index[1:] == index[:-1], False)
    intervals = Grid(*(jnp.stack([field[index], field[index + 1]], axis=1) for field in grid))

    def step(x: Array, inputs: tuple[Array, Grid, Array]) -> tuple[Array, None]:
        count, interval, undo = inputs
        keys = [fold_in(fold_in(key, count), purpose) for purpose in range(3)]
        (signal, signal_there), (noise, noise_there) = interval.signal, interval.noise
        x = sampler(denoise, x, interval, keys[0])
        x = jnp.where(known, diffuse(x_0, normal_like(keys[1], x), signal_there, noise_there), x)
        kept = signal / signal_there
        back = kept * x + jnp.sqrt(noise**2 - (kept * noise_there) ** 2) * normal_like(keys[2], x)
        return jnp.where(undo, back, x), None

    x_T = diffuse(jnp.where(known, x_0, 0), normal_like(fold_in(key, 0), x_0), grid.signal[0], grid.noise[0])
    return lax.scan(step, x_T, (1 + jnp.arange(len(index)), intervals, jnp.asarray(undone)))[0]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
