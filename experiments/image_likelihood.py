"""--mode=likelihood: bits/dim of real images by both routes, the variational bound and the ODE, on the same model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion import evaluation, gaussian, likelihood
from diffusion.data.images import to_float
from diffusion.data.sources import Source
from diffusion.training import run_key
from experiments import image_diffusion, image_modes
from experiments.command_line import Config, Run

GOLDEN_RATIO = 0.6180339887498949  # its multiples fill the circle more evenly than draws do


def bits_per_dim(run: Run, source: Source) -> None:
    """Writes likelihood/report.json, report.md and, for a chain, a picture of the bound's terms.

    The first --num_samples images of `source` (default 100). --steps are the ODE's; the bound takes every step of the
    chain, and is left out for a process that is none.
    """
    trained = image_modes.load(run, source)
    measurements = measure(run, source, trained, run.flags.num_samples or 100, 0, run.flags.steps or 200)
    if jax.process_index() == 0:
        folder = run.workdir / "likelihood"
        about = {"experiment": run.experiment, "steps trained": trained.step}
        evaluation.write_report(folder, f"Likelihood of {source.name} {source.split}", measurements, about)
        print((folder / "report.md").read_text(), end="")


def measure(
    run: Run, source: Source, trained: image_modes.Trained, num_images: int, num_terms: int, num_steps: int
) -> list[evaluation.Measurement]:
    """Returns bits/dim of the first `num_images` of `source` by both routes, and draws likelihood/terms.png.

    `num_terms` of the bound's steps are taken for each image, another choice for each (`likelihood.estimate_bound`); 0
    takes all. `num_steps` are the ODE's.
    """
    config = run.config.copy_and_resolve_references()
    config.sampling.guidance = 1.0  # guided samples follow no likelihood
    config.sampling.sampler = "ddim"
    config.sampling.num_steps = num_steps
    config.sampling.grid = "log_snr"  # its own: on the digits 50 such steps are nearer the end than 200 even ones
    count = min(num_images, source.num_examples)
    batch_size = min(config.sampling.batch_size, count)
    batches = [np.arange(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    measure = make_measure(config, source, num_terms)
    rows: dict[str, list[np.ndarray]] = {}
    for index in tqdm(batches, desc="likelihood", unit="batch"):
        batch = source.read(index)
        for name, value in measure(trained.ema, batch["image"], batch["label"], index).items():
            rows.setdefault(name, []).append(np.asarray(value))
    values = {name: np.concatenate(parts) for name, parts in rows.items()}

    made = {
        "num_samples": count,
        "features": "8-bit images",
        "reference": evaluation.reference_of(source),
        "seeds": [0],
        "ema": trained.average,
    }
    error = {name: float(value.std() / len(value) ** 0.5) for name, value in values.items() if value.ndim == 1}
    measurements = [
        evaluation.Measurement(
            "bits/dim, probability-flow ODE",
            {"mean": float(values["ode"].mean()), "standard error": error["ode"]},
            sampler="trapezoidal rule, 1 Rademacher probe a step",
            num_steps=num_steps,
            note="of uniformly dequantised images, an upper bound on the discrete ones' bits",
            **made,
        )
    ]
    if "total" in values:
        parts = {name: float(values[name].mean()) for name in ("total", "prior", "decoder")}
        mean = parts.pop("total")
        parts["steps"] = mean - parts["prior"] - parts["decoder"]
        taken = f"{num_terms} steps of the chain an image" if num_terms else "every step of the chain"
        measurements.append(
            evaluation.Measurement(
                "bits/dim, variational bound",
                {"mean": mean, "standard error": error["total"], **parts},
                sampler=f"{taken}, variance {bound_variance(config)}",
                num_steps=config.process.num_steps,
                note="an upper bound, one draw of x_t a step; mean = prior + steps + decoder",
                **made,
            )
        )
        if jax.process_index() == 0:
            shown = {"KL(q(x_{t-1} | x_t, x_0) || p), bits/dim": values["steps"]}
            shown |= {"|eps - eps_hat|^2": values["eps_mse"]} if "eps_mse" in values else {}
            evaluation.draw_terms(values["t"], shown, run.workdir / "likelihood" / "terms.png")
    return measurements


def bound_variance(config: Config) -> str:
    """Returns the variance of the bound's reverse process: learned if it was, else that of sampling."""
    return "learned" if config.loss.learned_variance else config.sampling.variance


def make_measure(config: Config, source: Source, num_terms: int) -> Any:
    """Returns measure(params, image uint8[B, H, W, C], label [B], index [B]) -> named values, [B] or [B, K]."""
    diffusion = image_diffusion.make_diffusion(config)
    network = image_diffusion.make_network(config, source, diffusion)
    grid = diffusion.grid(config.sampling.num_steps)
    unclipped = config.copy_and_resolve_references()
    unclipped.sampling.threshold = "none"  # clipping has kinks: the ODE's divergence would not be the flow's

    def bound_values(key: Any, denoise: Any, schedule: Any, x_0: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        variance = bound_variance(config)
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
    def measure(params: Any, image: jax.Array, label: jax.Array | None, index: jax.Array) -> dict[str, jax.Array]:
        label = None if network.num_classes is None else label
        x_0 = to_float(image)
        keys = {
            name: jax.vmap(lambda i, name=name: run_key(0, name, i))(index) for name in ("bound", "dequantize", "ode")
        }
        smooth = image_diffusion.make_denoise(unclipped, network, diffusion, params, label)
        x_0_hat_of = lambda x_t, time: first(smooth(x_t, time))  # noqa: E731
        x = likelihood.dequantize(keys["dequantize"], x_0)
        values = {"ode": likelihood.ode_likelihood(keys["ode"], x_0_hat_of, x, grid)}
        if diffusion.schedule is not None:
            denoise = image_diffusion.make_denoise(config, network, diffusion, params, label)
            values |= bound_values(keys["bound"], denoise, diffusion.schedule, x_0, index)
        return values

    return measure


def first(output: Any) -> jax.Array:
    """Returns x_0_hat of a Denoise's answer, which may be (x_0_hat, v)."""
    return output[0] if isinstance(output, tuple) else output
