"""--mode=likelihood: bits/dim of real images, by the variational bound and the probability-flow ODE."""

from typing import Any

import jax
import numpy as np

from diffusion import evaluation
from diffusion.data.sources import Source
from diffusion.evaluation import Measurement
from diffusion.model.likelihood import bits_per_dim, bound_variance
from diffusion.runs.call import Call, held_out
from diffusion.runs.report import finish
from diffusion.runs.run import Run


def likelihood(call: Call) -> None:
    """Writes likelihood/report.json, report.md and, for a chain, a picture of the bound's terms.

    The first --num_samples test images (default 100). --sampling_steps are the ODE's; the bound takes every step of the
    chain, and is left out for a process that is none.
    """
    source, run = held_out(call), call.open()
    measurements = measure(run, source, call.flags.num_samples or 100, 0, call.flags.sampling_steps or 200)
    about = {"experiment": run.experiment, "steps trained": run.step}
    finish(run.workdir / "likelihood", f"Likelihood of {source.name} {source.split}", measurements, about)


def measure(run: Run, source: Source, num_images: int, num_terms: int, num_steps: int) -> list[Measurement]:
    """Returns bits/dim of the first `num_images` of `source` by both routes, and draws likelihood/terms.png.

    Args:
      run: its model, under the condition of each image's own class or caption.
      source: of images.
      num_images: at most.
      num_terms: of the bound's steps per image; 0: all.
      num_steps: of the ODE.
    """
    count = min(num_images, source.num_examples)
    batch = source.read(np.arange(count))
    requests = own_requests(run, source, batch)
    found = bits_per_dim(run.model, run.params, run.config, batch["image"], requests, num_terms, num_steps)
    made: dict[str, Any] = {
        "num_samples": count,
        "features": "8-bit images",
        "reference": evaluation.reference_of(source),
        "seeds": [0],
        "ema": run.average,
    }
    measurements = [
        Measurement(
            "bits/dim, probability-flow ODE",
            {"mean": float(found.ode.mean()), "standard error": standard_error(found.ode)},
            sampler="trapezoidal rule, 1 Rademacher probe per step",
            num_steps=num_steps,
            note="of uniformly dequantised images, an upper bound on the discrete ones' bits",
            **made,
        )
    ]
    if found.bound:
        parts = {name: float(found.bound[name].mean()) for name in ("total", "prior", "decoder")}
        mean = parts.pop("total")
        parts["steps"] = mean - parts["prior"] - parts["decoder"]
        taken = f"{num_terms} steps of the chain per image" if num_terms else "every step of the chain"
        measurements.append(
            Measurement(
                "bits/dim, variational bound",
                {"mean": mean, "standard error": standard_error(found.bound["total"]), **parts},
                sampler=f"{taken}, variance {bound_variance(run.config)}",
                num_steps=run.config.process.num_steps,
                note="an upper bound, one draw of x_t per step; mean = prior + steps + decoder",
                **made,
            )
        )
        if jax.process_index() == 0:
            shown = {"KL(q(x_{t-1} | x_t, x_0) || p), bits/dim": found.bound["steps"]}
            shown |= {"|eps - eps_hat|^2": found.bound["eps_mse"]} if "eps_mse" in found.bound else {}
            evaluation.draw_terms(found.bound["t"], shown, run.workdir / "likelihood" / "terms.png")
    return measurements


def own_requests(run: Run, source: Source, batch: dict[str, np.ndarray]) -> list[Any]:
    """Returns what each image of a batch shows, as the run reads it: its class, its caption, or None."""
    labels = batch["label"].tolist()
    match run.model.condition.kind:
        case "classes":
            return labels
        case "prompts":
            return [source.captions[label] for label in labels]
    return [None] * len(labels)


def standard_error(values: np.ndarray) -> float:
    """Returns that of the mean."""
    return float(values.std() / len(values) ** 0.5)
