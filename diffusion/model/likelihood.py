"""Bits/dim of images by both routes, the variational bound and the probability-flow ODE, on the same model."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion import gaussian, likelihood
from diffusion.model.choices import pick
from diffusion.model.condition import rows_of
from diffusion.model.config import Config
from diffusion.model.model import Model, make_denoise, parts
from diffusion.model.objectives import Objective
from diffusion.model.sampling import THRESHOLDS
from diffusion.training import run_key
from diffusion.types import denoised

GOLDEN_RATIO = 0.6180339887498949  # its multiples fill the circle more evenly than draws do


class Likelihood(NamedTuple):
    """Bits/dim of each image.

    Attributes:
      ode: float32[N], by the probability-flow ODE, of uniformly dequantised images: an upper bound on the discrete
        images' bits.
      bound: the parts of the variational bound by name, "total" among them, [N] or [N, K] over the steps "t"; empty
        for a process that is no chain.
    """

    ode: np.ndarray
    bound: dict[str, np.ndarray]


def bits_per_dim(
    model: Model,
    params: Any,
    config: Config,
    images: np.ndarray,
    requests: Sequence[Any],
    num_terms: int,
    num_steps: int,
) -> Likelihood:
    """Returns bits/dim of images by both routes; draws depend on the image's number alone.

    Args:
      model: of the images.
      params: its weights.
      config: its `sampling` gives the threshold, the variance and the batch size.
      images: uint8[N, H, W, C].
      requests: what each shows; None for no condition.
      num_terms: of the bound's steps per image, another choice for each (`likelihood.estimate_bound`); 0 takes all.
      num_steps: of the ODE.

    Raises:
      ValueError: the model is of latents, which have no likelihood of pixels.
    """
    check_mean(model.objective)
    if model.space.init is not None:
        raise ValueError("bits/dim are of pixels, and this model is of an autoencoder's latents: leave them out")
    measure = make_measure(model, config, num_terms, num_steps)
    rows = rows_of(model.condition, requests)
    batch_size = min(config.sampling.batch_size, len(images))
    found: dict[str, list[np.ndarray]] = {}
    for first in tqdm(range(0, len(images), batch_size), desc="likelihood", unit="batch"):
        index = np.arange(first, min(first + batch_size, len(images)))
        for name, value in measure(params, images[index], rows[index], index).items():
            found.setdefault(name, []).append(np.asarray(value))
    values = {name: np.concatenate(arrays) for name, arrays in found.items()}
    return Likelihood(values.pop("ode"), values)


def check_mean(objective: Objective) -> None:
    """Raises ValueError where a model has no likelihood: its x_0_hat is not E[x_0 | x_t], of which the ODE is made."""
    if not objective.mean:
        raise ValueError(
            "bits/dim are of the ODE that E[x_0 | x_t] makes, and this model's loss trains a network to skip it: leave "
            "bits_per_dim out"
        )


def bound_variance(config: Config) -> str:
    """Returns the variance of the bound's reverse process: learned if it was, else that of ancestral sampling."""
    return "learned" if config.loss.get("learned_variance") else config.sampling.sampler.get("variance", "large")


def make_measure(model: Model, config: Config, num_terms: int, num_steps: int) -> Callable[..., dict[str, jax.Array]]:
    """Returns measure(params, images [B], rows [B], index [B]) -> named values, [B] or [B, K]."""
    # A grid of its own: on the digits 50 such steps are nearer the end than 200 even ones. Guided samples follow no
    # likelihood, so neither route is guided.
    grid = model.process.respaced(num_steps, math.inf)
    threshold = pick(THRESHOLDS, config.sampling.threshold, "sampling.threshold")
    variance = bound_variance(config)

    def bound_values(key: Any, denoise: Any, schedule: Any, x_0: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        # DDPM's published bits/dim, with the large variance, have the small one in the decoder.
        decoder_variance = gaussian.p_variance(schedule, "small")[1] if variance == "large" else None
        if num_terms:
            u = (index * GOLDEN_RATIO + 0.5) % 1.0
            bound = likelihood.estimate_bound(key, denoise, schedule, x_0, u, num_terms, variance, decoder_variance)
            return {"total": bound.total, **bound._asdict()}
        bound = likelihood.variational_bound(key, denoise, schedule, x_0, variance, decoder_variance=decoder_variance)
        t = jnp.broadcast_to(jnp.arange(2, bound.steps.shape[1] + 1), bound.steps[:, 1:].shape)
        return {"total": bound.total, **bound._asdict(), "steps": bound.steps[:, 1:], "t": t}

    @jax.jit
    def measure(params: Any, image: jax.Array, rows: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        x_0 = model.space.encode(None, image, None)
        keys = {
            name: jax.vmap(lambda i, name=name: run_key(0, name, i))(index) for name in ("bound", "dequantize", "ode")
        }
        # Clipping has kinks: the ODE's divergence would not be the flow's.
        smooth = make_denoise(model, params, model.condition.of_request(parts(model, params).text, rows))
        x = likelihood.dequantize(keys["dequantize"], x_0)
        x_0_hat = lambda x_t, time: denoised(smooth(x_t, time)).x_0_hat  # noqa: E731
        values = {"ode": likelihood.ode_likelihood(keys["ode"], x_0_hat, x, grid)}
        if model.process.schedule is not None:
            values |= bound_values(keys["bound"], threshold(smooth), model.process.schedule, x_0, index)
        return values

    return measure
