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

from diffusion.types import denoised


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

    def over(self, denoise: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what a sampler is given of a network, (x_t, time) or (x_t, time, next time) -> x_0_hat, watched.

        Where nobody waits it returns zeros.
        """

        def seen(x_t: jax.Array, *times: Any) -> Any:
            # Both callbacks are tied to x by barriers, so that they come in the order of the steps.
            x_t, times = lax.optimization_barrier((x_t, tuple(map(jnp.asarray, times))))
            go_on = io_callback(self.ask, jax.ShapeDtypeStruct((), bool), (times[0], x_t.ravel()[0]))
            return lax.cond(go_on, call, skip, x_t, *times)

        def call(x_t: jax.Array, *times: jax.Array) -> Any:
            output = denoise(x_t, *times)
            x_0_hat = denoised(output).x_0_hat
            x_0_hat = x_0_hat[:, 0] if x_0_hat.ndim > x_t.ndim else x_0_hat  # of a policy, that where its step ends
            shown = io_callback(self.see, jax.ShapeDtypeStruct((), bool), x_0_hat, times[0])
            return lax.optimization_barrier((output, shown))[0]

        def skip(x_t: jax.Array, *times: jax.Array) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(denoise, x_t, *times))

        return seen
