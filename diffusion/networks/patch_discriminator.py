"""The discriminator of patches (Isola et al. 2017), as latent diffusion trains its autoencoders against it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks.layers import Conv, GroupNorm

WIDEST = 8  # times `width`
_init = nn.initializers.normal(0.02)


class PatchDiscriminator(nn.Module):
    """Images to logits, one per overlapping patch: large for real ones. The defaults see patches of 70x70 pixels.

    Where the released code normalises over the batch, this normalises each image in groups: an image's logits do not
    depend on the others.

    Attributes:
      width: channels of the first layer; each of the next has twice as many, up to 8 times.
      layers: that halve the resolution.
      groups: of the normalisations.
      dtype: what convolutions compute in; the logits are float32.

    Source: the released code of Isola et al. (2017), and of Esser et al. (2021).
    """

    width: int = 64
    layers: int = 3
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w"]:
        """Returns the logits; raises ValueError for images smaller than what the layers leave something of."""
        if min(x.shape[1:3]) < 3 * 2**self.layers:  # the last two layers take one off each
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} are too small for a discriminator that halves them {self.layers} "
                f"times, which takes {3 * 2**self.layers}x{3 * 2**self.layers} at least: lower discriminator.layers"
            )
        h = self._leaky(Conv(self.width, 4, 2, 1, self.dtype, _init, name="conv_in")(x))
        for level in range(1, self.layers + 1):
            stride = 2 if level < self.layers else 1
            channels = self.width * min(2**level, WIDEST)
            h = Conv(channels, 4, stride, 1, self.dtype, _init, use_bias=False, name=f"conv_{level}")(h)
            h = self._leaky(GroupNorm(self.groups, 1e-5, self.dtype, name=f"norm_{level}")(h))
        return Conv(1, 4, 1, 1, kernel_init=_init, name="conv_out")(h)[..., 0]

    @staticmethod
    def _leaky(h: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.leaky_relu(h, 0.2)
