"""Plans: all that one picture depends on beside its run, and drawing several of them as one watched batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion import editing
from diffusion.data.pictures import refit
from diffusion.model.model import Use, from_noise
from diffusion.runs.draw import draw
from diffusion.runs.run import Run
from diffusion.runs.watch import Watch

RESAMPLE = 10  # how often a step of inpainting is taken, as --resample has it


class Plan(NamedTuple):
    """One picture, of a run with its sampling.

    Attributes:
      asked: prompt, class number or None.
      negative: prompt that guidance leads away from; None: no condition.
      seed: of the noise.
      index: which noise of the seed.
      image: to begin with, uint8[H, W, C] of the run's shape.
      strength: share of the steps that are run from `image`, where there is no mask.
      mask: bool[H, W], True where `image` is to be filled in.
      references: pictures to edit, of `fit_reference`.
    """

    asked: Any = None
    negative: str | None = None
    seed: int = 0
    index: int = 0
    image: np.ndarray | None = None
    strength: float = 1.0
    mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()

    @property
    def kind(self) -> str:
        """What is made of the noise: sample, img2img or inpaint."""
        return "sample" if self.image is None else "img2img" if self.mask is None else "inpaint"

    def program(self, num_steps: int) -> tuple[Any, ...]:
        """Returns what its compiled program depends on beside the run and its sampling."""
        strength = max(1, int(self.strength * num_steps + 0.5)) if self.kind == "img2img" else 0
        return self.kind, strength, tuple(picture.shape for picture in self.references)


def draw_plans(run: Run, plans: Sequence[Plan], watch: Watch | None) -> np.ndarray:
    """Returns uint8[N, H, W, C], a picture of each plan.

    Args:
      run: of the pictures.
      plans: N of them that share a program, see `Plan.program`.
      watch: is asked before and shown after each evaluation of the network; None: the program of --mode=sample, for
        plans without pictures to begin with.

    Raises:
      ValueError: prompts or labels that the run cannot read, or samples that are not finite.
    """
    first = plans[0]
    images = [] if first.image is None else [np.stack([plan.image for plan in plans if plan.image is not None])]
    if first.mask is not None:
        masks = [run.model.space.mask(~plan.mask[..., None]) for plan in plans if plan.mask is not None]
        images.append(np.stack(masks))
    return draw(
        run.painter,
        [plan.asked for plan in plans],
        np.array([plan.index for plan in plans]),
        np.array([plan.seed for plan in plans], np.uint32),
        images=images,
        references=[np.stack(pictures) for pictures in zip(*(plan.references for plan in plans), strict=True)],
        negative=[plan.negative for plan in plans],
        use=make_use(first, run.config.sampling.num_steps, watch) if watch else from_noise,
    )


def make_use(plan: Plan, num_steps: int, watch: Watch) -> Use:
    """Returns the watched `Use` of a plan."""
    kind, strength, _ = plan.program(num_steps)

    def use(sampler: Any, denoise: Any, grid: Any, keys: Any, eps: Any, *begun: jax.Array) -> Any:
        denoise = watch.over(denoise)
        if kind == "inpaint":
            x_0, known = begun
            return editing.inpaint(sampler, denoise, x_0, known, grid, keys, RESAMPLE)
        if kind == "img2img":
            return editing.img2img(sampler, denoise, begun[0], grid, keys, strength / num_steps)
        return sampler(denoise, grid.noise[0] * eps, grid, keys)

    use.__qualname__ = f"watched by {id(watch)}: {kind} {strength}"  # by which `draw` keeps what it compiles
    return use


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns bool[H, W], a mask fitted to (H, W) as the picture that it is of.

    Args:
      mask: bool[h, w], or uint8[h, w], white where something is to be filled in; greys are resized first.
      size: (H, W).

    Raises:
      ValueError: nothing is left to fill in.
    """
    grey = np.where(mask, np.uint8(255), np.uint8(0)) if mask.dtype == bool else mask
    fitted = refit(grey[..., None], channels=1, size=size)[..., 0] > 127
    if not fitted.any():
        raise ValueError("The mask is empty: paint what is to be filled in.")
    return fitted
