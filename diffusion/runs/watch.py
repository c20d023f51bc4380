"""Drawing that is watched: x_0_hat of every step is shown, and the network is skipped once nobody waits.

A `Watch` is the host's side. Samplers and networks are left as they are: a denoiser under a watch asks before it calls
the network, and shows what it returned.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from diffusion.types import Denoise, denoised


class Watch:
    """Who waits for the pictures that are being drawn: nobody looks, and everybody waits, unless told otherwise.

    Attributes:
      wanted: () -> whether anybody still waits.
      show: (x_0_hat [B, ...], time) -> None, after each evaluation of the network.
      evaluations: of the network so far.
    """

    def __init__(self) -> None:
        self.wanted: Callable[[], bool] = lambda: True
        self.show: Callable[[np.ndarray, float], None] = lambda x_0_hat, time: None
        self.evaluations = 0

    def ask(self, time: Any) -> np.ndarray:
        """Returns whether the network is to be called: a callback."""
        del time
        return np.asarray(self.wanted())

    def see(self, x_0_hat: Any, time: Any) -> np.ndarray:
        """Takes what the network returned: a callback."""
        self.evaluations += 1
        self.show(np.asarray(x_0_hat), float(np.ravel(time)[0]))
        return np.asarray(True)

    def over(self, denoise: Denoise) -> Denoise:
        """Returns the denoiser, watched: zeros where nobody waits."""

        def seen(x_t: jax.Array, time: Any) -> Any:
            # Both callbacks are tied to x by barriers, so that they come in the order of the steps.
            x_t, time = lax.optimization_barrier((x_t, jnp.asarray(time)))
            go_on = io_callback(self.ask, jax.ShapeDtypeStruct((), bool), (time, x_t.ravel()[0]))
            return lax.cond(go_on, call, skip, x_t, time)

        def call(x_t: jax.Array, time: jax.Array) -> Any:
            output = denoise(x_t, time)
            shown = io_callback(self.see, jax.ShapeDtypeStruct((), bool), denoised(output).x_0_hat, time)
            return lax.optimization_barrier((output, shown))[0]

        def skip(x_t: jax.Array, time: jax.Array) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(denoise, x_t, time))

        return seen
