"""What the page lets a visitor set for a run: only what the run can do, with its own values to begin with."""

import html
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion.demo.requests import MOST_PIXELS, Limits
from diffusion.model.experiment import READ_REFERENCES
from diffusion.model.sampling import SAMPLERS, make_sampling
from diffusion.runs.run import Run
from diffusion.training import RunError

MOST_GUIDANCE = 15.0  # of the slider; more is asked for over HTTP
NO_CLASS = -1
Properties = dict[str, dict[str, Any]]


def properties_of(run: Run, limits: Limits, examples: Sequence[str]) -> Properties:
    """Returns the properties of each control for a run, by its name in `page.Controls`.

    Args:
      run: what draws.
      limits: of a request.
      examples: prompts of this run to click.
    """
    condition, sampling = run.model.condition, run.config.sampling
    prompts, classes = condition.kind == "prompts", condition.kind == "classes"
    guided = can_guide(run)
    references = run.config.network.name in READ_REFERENCES
    height, width, _ = run.model.space.image_shape
    none = [("none", NO_CLASS)] if condition.optional else []
    labels = [(str(label), label) for label in range(condition.num_classes or 0)] + none
    sized = {"visible": can_resize(run), "value": None}
    most_steps = max(limits.num_steps, sampling.num_steps)
    return {
        "about": {"value": title_of(run)},
        "prompt": {"visible": prompts},
        "chips": {"visible": prompts and bool(examples), "value": list(examples)},
        "label": {"visible": classes, "choices": labels, "value": labels[0][1] if classes else None},
        "negative": {"visible": prompts and guided and sampling.guidance != 1, "value": ""},
        "num_pictures": {"maximum": limits.num_pictures},
        "num_steps": {"maximum": most_steps, "value": sampling.num_steps},
        "guidance": {"visible": guided, "value": sampling.guidance, "maximum": max(MOST_GUIDANCE, sampling.guidance)},
        "sampler": {"choices": samplers_of(run), "value": sampling.sampler.name},
        "height": sized | {"placeholder": str(height)},
        "width": sized | {"placeholder": str(width)},
        "references": {"visible": references, "value": None},
    }


def title_of(run: Run) -> str:
    """Returns the page's head: what draws."""
    height, width, _ = run.model.space.image_shape
    parameters = sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(run.params))
    size = f"{parameters / 1e6:.1f} M" if parameters < 1e9 else f"{parameters / 1e9:.1f} B"
    step = f", after {run.step} steps of training" if run.step else ""
    name = html.escape(run.workdir.name)
    return f"<h1>{name}</h1><p>{run.experiment}: {size} parameters{step}, pictures of {height}x{width}</p>"


def samplers_of(run: Run) -> list[str]:
    """Returns the samplers that draw with what the run's network has learned."""

    def draws(name: str) -> bool:
        try:
            make_sampling(run.change({"sampling.sampler": name}).config, run.model.process)
        except (ValueError, RunError):
            return False
        return True

    own = run.config.sampling.sampler.name
    return [name for name in SAMPLERS if name == own or draws(name)]


def can_guide(run: Run) -> bool:
    """Returns whether guidance is a choice: there is a condition that can be left out, and it is not trained in."""
    condition = run.model.condition
    objective = run.model.objective
    trained_in = run.stored.get("distilled", False) or objective.teacher or objective.guided
    return condition.kind != "nothing" and condition.optional and not trained_in


def can_resize(run: Run) -> bool:
    """Returns whether the run's network draws pictures of another size than its own."""
    height, width, _ = run.model.space.image_shape
    try:
        run.change({"sampling.size": (2 * height, 2 * width)})
    except (ValueError, RunError):
        return False
    return True


def picker_limits(limits: Limits, many: int, masks: bool) -> dict[str, Any]:
    """Returns what picker.js is told: how many pictures are taken, of which size, and whether masks are drawn."""
    return {"many": many, "bytes": limits.upload_bytes, "pixels": MOST_PIXELS, "masks": masks}
