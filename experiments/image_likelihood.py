"""--mode=likelihood: bits/dim of real images by both routes, the variational bound and the ODE, on the same model."""

from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
from tqdm import tqdm

from diffusion import evaluation, likelihood
from diffusion.data.images import to_float
from diffusion.data.sources import Source
from diffusion.files import replacing
from diffusion.training import run_key
from experiments import image_diffusion, image_modes
from experiments.command_line import Config, Run


def bits_per_dim(run: Run, source: Source) -> None:
    """Writes likelihood/report.json, report.md and, for a chain, a picture of the bound's terms.

    The first --num_samples images of `source` (default 100). --steps are the ODE's; the bound takes every step of the
    chain, and is left out for a process that is none.
    """
    trained = image_modes.load(run, source)
    config = run.config.copy_and_resolve_references()
    config.sampling.guidance = 1.0  # guided samples follow no likelihood
    config.sampling.sampler = "ddim"
    config.sampling.num_steps = num_steps = run.flags.steps or 200
    count = min(run.flags.num_samples or 100, source.num_examples)
    batch_size = min(config.sampling.batch_size, count)
    batches = [np.arange(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    measure = make_measure(config, source)
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
        "ema": config.training.ema_decay,
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
        parts["steps"] = float(values["steps"].sum(axis=1).mean())
        measurements.append(
            evaluation.Measurement(
                "bits/dim, variational bound",
                {"mean": parts.pop("total"), "standard error": error["total"], **parts},
                sampler=f"every step of the chain, variance {bound_variance(config)}",
                num_steps=config.process.num_steps,
                note="an upper bound, one draw of x_t a step; mean = prior + steps + decoder",
                **made,
            )
        )
    if jax.process_index() == 0:
        folder = run.workdir / "likelihood"
        about = {"experiment": run.experiment, "steps trained": trained.step}
        evaluation.write_report(folder, f"Likelihood of {source.name} {source.split}", measurements, about)
        if "steps" in values:
            draw_terms(values["steps"].mean(axis=0), folder / "terms.png")
        print((folder / "report.md").read_text(), end="")


def bound_variance(config: Config) -> str:
    """Returns the variance of the bound's reverse process: learned if it was, else that of sampling."""
    return "learned" if config.loss.learned_variance else config.sampling.variance


def make_measure(config: Config, source: Source) -> Any:
    """Returns measure(params, image uint8[B, H, W, C], label [B], index [B]) -> named values, [B] or [B, T]."""
    diffusion = image_diffusion.make_diffusion(config)
    network = image_diffusion.make_network(config, source, diffusion)
    grid = diffusion.grid(config.sampling.num_steps)
    unclipped = config.copy_and_resolve_references()
    unclipped.sampling.threshold = "none"  # clipping has kinks: the ODE's divergence would not be the flow's

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
            variance = bound_variance(config)
            bound = likelihood.variational_bound(keys["bound"], denoise, diffusion.schedule, x_0, variance)
            values |= {"total": bound.total, **bound._asdict()}
        return values

    return measure


def first(output: Any) -> jax.Array:
    """Returns x_0_hat of a Denoise's answer, which may be (x_0_hat, v)."""
    return output[0] if isinstance(output, tuple) else output


def draw_terms(terms: np.ndarray, path: Any) -> None:
    """Draws the bound's term of every step, float[T] in bits/dim (as Nichol & Dhariwal 2021, figure 2)."""
    matplotlib.use("agg")
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    t = jnp.arange(2, len(terms) + 1)
    axes.plot(t, terms[1:])
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlabel("t")
    axes.set_ylabel("KL(q(x_{t-1} | x_t, x_0) || p), bits/dim")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
