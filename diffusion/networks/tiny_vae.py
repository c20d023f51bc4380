"""TAESD, the tiny autoencoder distilled from large ones (Ollin Boer Bohan, github.com/madebyollin/taesd).

Its latents are those that the diffusion model of the large one works in, already shifted and scaled.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks.layers import Conv, GroupNorm, ddpm_init
from diffusion.networks.vae import Posterior, check_image, check_latent

LARGEST = 3.0  # latents are pressed into [-3, 3] before they are decoded
NORM_GROUPS = 4


class TinyBlock(nn.Module):
    """ReLU(x + conv, ReLU, conv, ReLU, conv); with `norm` x is changed by statistics of the whole image first."""

    channels: int
    norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Returns the block's output."""
        if self.norm:
            h = Conv(4 * self.channels, size=1, use_bias=False, dtype=self.dtype, name="norm_in")(x)
            h = nn.relu(GroupNorm(NORM_GROUPS, 1e-5, self.dtype, name="norm")(h))
            x = x + Conv(self.channels, size=1, use_bias=False, dtype=self.dtype, name="norm_out")(h)
        h = nn.relu(Conv(self.channels, dtype=self.dtype, name="conv_1")(x))
        h = nn.relu(Conv(self.channels, dtype=self.dtype, name="conv_2")(h))
        return nn.relu(x + Conv(self.channels, dtype=self.dtype, name="conv_3")(h))


class TinyEncoder(nn.Module):
    """Maps an image in [-1, 1] to latents; see `TinyAutoencoder` for the attributes."""

    out_channels: int
    width: int
    blocks: Sequence[int]
    smallest_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        """Returns the latents, float32."""
        h = Conv(self.width, dtype=self.dtype, name="conv_in")((x + 1) / 2)
        for level, count in enumerate(self.blocks):
            if level > 0:
                name = f"down_{level - 1}_downsample"
                h = Conv(self.width, stride=2, padding=1, use_bias=False, dtype=self.dtype, name=name)(h)
            h = _level(self, h, level, count, "down")
        return Conv(self.out_channels, name="conv_out")(h)


class TinyDecoder(nn.Module):
    """Maps latents to an image near [-1, 1]; see `TinyAutoencoder` for the attributes."""

    out_channels: int
    width: int
    blocks: Sequence[int]
    smallest_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Returns the image, float32."""
        z = jnp.tanh(z / LARGEST) * LARGEST
        h = nn.relu(Conv(self.width, dtype=self.dtype, name="conv_in")(z))
        for level, count in reversed(list(enumerate(self.blocks))):
            h = _level(self, h, level, count, "up")
            if level > 0:
                name = f"up_{level}_upsample"
                h = Conv(self.width, dtype=self.dtype, use_bias=False, upsampled=True, name=name)(h)
        return 2 * Conv(self.out_channels, kernel_init=ddpm_init, name="conv_out")(h) - 1


class TinyAutoencoder(nn.Module):
    """Images in [-1, 1] to latents and back; called as `vae.Autoencoder` is. The defaults are TAESD's.

    Attributes:
      image_channels: of images.
      latent_channels: 4, or 16 of the variants for Stable Diffusion 3 and FLUX.1, or 32 for FLUX.2.
      width: channels of all levels.
      encoder_blocks: of every level, from the image's size down.
      decoder_blocks: the same of the decoder, in the same order.
      smallest_norm: whether blocks of the smallest level see statistics of the whole image, as those of TAEF2 do.
      dtype: what convolutions compute in; parameters, statistics, the last layers and what is returned stay float32.

    Raises:
      ValueError: image sizes that the levels do not divide, or other channels than these.
    """

    image_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: Sequence[int] = (1, 3, 3, 3)
    decoder_blocks: Sequence[int] = (1, 3, 3, 3)
    smallest_norm: bool = False
    dtype: Any = jnp.float32

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images, in height and in width."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def setup(self) -> None:
        """Makes the two networks."""
        settings = self.smallest_norm, self.dtype
        self.encoder = TinyEncoder(self.latent_channels, self.width, self.encoder_blocks, *settings)
        self.decoder = TinyDecoder(self.image_channels, self.width, self.decoder_blocks, *settings)

    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W C"], Posterior]:
        """Returns the image decoded from the latents, and the posterior: what makes all parameters."""
        posterior = self.encode(x)
        return self.decode(posterior.mean), posterior

    def encode(self, x: Float[Array, "B H W C"]) -> Posterior:
        """Returns the latents of images in [-1, 1] as a posterior without noise."""
        check_image(x, self.image_channels, self.factor)
        z = self.encoder(x)
        return Posterior(z, jnp.full_like(z, -jnp.inf))

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Returns images, near [-1, 1] but not clipped."""
        check_latent(z, self.latent_channels)
        return self.decoder(z)


def _level(
    network: TinyEncoder | TinyDecoder, h: Float[Array, "B H W C"], level: int, count: int, way: str
) -> Float[Array, "B H W C"]:
    norm = network.smallest_norm and level == len(network.blocks) - 1
    for i in range(count):
        h = TinyBlock(network.width, norm, network.dtype, name=f"{way}_{level}_block_{i}")(h)
    return h
