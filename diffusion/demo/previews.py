"""Pictures of x_0_hat while it is drawn, made by NumPy: the device is busy, and what it runs waits for them."""

from collections.abc import Callable

import numpy as np

from diffusion.runs.run import Run

Preview = Callable[[np.ndarray, tuple[int, int, int]], np.ndarray]  # x_0_hat [N, ...], shape -> uint8[N, *shape]


def make_preview(run: Run) -> Preview:
    """Returns what makes pictures, uint8[N, H, W, C], of x_0_hat [N, ...] of a run."""
    del run
    return of_pixels


def of_pixels(x_0_hat: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns pixels in [-1, 1] as levels."""
    del shape
    x = np.nan_to_num(np.asarray(x_0_hat, np.float32))
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)
