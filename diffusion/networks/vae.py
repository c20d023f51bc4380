"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022, appendix G): Stable Diffusion 1 to 3, FLUX.

An image becomes a Gaussian over latents of 1 / `factor` of its height and width; a latent becomes an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.networks.layers import Attention, Conv, GroupNorm, ResidualBlock, ddpm_init
from diffusion.randomness import normal_like

LOG_VARIANCE = (-30.0, 20.0)  # what it is clamped to


class Posterior(NamedTuple):
    """q(z | x): independent Gaussians, one per number of the latent. The mode is the mean.

    Attributes:
      mean: float32.
      log_variance: float32; -inf where an autoencoder has no noise.
    """

    mean: Float[Array, "B h w c"]
    log_variance: Float[Array, "B h w c"]


def sample(posterior: Posterior, key: jax.Array) -> Float[Array, "B h w c"]:
    """Returns z ~ q(z | x); `key` is one key, or one for each image."""
    return posterior.mean + jnp.exp(posterior.log_variance / 2) * normal_like(key, posterior.mean)


def fold(z: Float[Array | np.ndarray, "B H W C"], patch: int) -> Float[Array, "B h w c"]:
    """Returns patches of `patch` x `patch` pixels as channels, in the order (channel, row, column), as FLUX.2 does.

    Raises:
      ValueError: the patches do not divide height and width.

    Example:
      >>> print(fold(jnp.arange(8.0).reshape(1, 2, 2, 2), 2))
      [[[[0. 2. 4. 6. 1. 3. 5. 7.]]]]
    """
    batch, height, width, channels = z.shape
    if height % patch or width % patch:
        raise ValueError(f"latents of {height}x{width} are not whole patches of {patch}x{patch}")
    z = jnp.asarray(z).reshape(batch, height // patch, patch, width // patch, patch, channels)
    z = z.transpose(0, 1, 3, 5, 2, 4)
    return z.reshape(batch, height // patch, width // patch, channels * patch**2)


def unfold(x: Float[Array | np.ndarray, "B h w c"], patch: int) -> Float[Array, "B H W C"]:
    """Returns what `fold` was given.

    Example:
      >>> print(unfold(jnp.arange(8.0).reshape(1, 1, 1, 8), 2)[..., 0])
      [[[0. 1.]
        [2. 3.]]]
    """
    batch, height, width, channels = x.shape
    x = jnp.asarray(x).reshape(batch, height, width, channels // patch**2, patch, patch)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, height * patch, width * patch, channels // patch**2)


class Encoder(nn.Module):
    """Maps an image to features at 1 / 2^(levels - 1) of its size; see `Autoencoder` for the attributes."""

    out_channels: int
    channels: Sequence[int]
    blocks_per_level: int
    groups: int
    middle_attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        """Returns the features, float32."""
        h = Conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, channels in enumerate(self.channels):
            for i in range(self.blocks_per_level):
                h = _block(self, channels, f"down_{level}_block_{i}")(h)
            if level < len(self.channels) - 1:
                h = Conv(channels, stride=2, dtype=self.dtype, name=f"down_{level}_downsample")(h)
        return _out(self, _middle(self, h))


class Decoder(nn.Module):
    """Maps latents to an image of 2^(levels - 1) times their size; see `Autoencoder` for the attributes."""

    out_channels: int
    channels: Sequence[int]
    blocks_per_level: int
    groups: int
    middle_attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W out"]:
        """Returns the image, float32."""
        h = _middle(self, Conv(self.channels[-1], dtype=self.dtype, name="conv_in")(z))
        for level, channels in reversed(list(enumerate(self.channels))):
            for i in range(self.blocks_per_level + 1):
                h = _block(self, channels, f"up_{level}_block_{i}")(h)
            if level > 0:
                h = Conv(channels, dtype=self.dtype, upsampled=True, name=f"up_{level}_upsample")(h)
        return _out(self, h)


class Autoencoder(nn.Module):
    """Images in [-1, 1] to a Gaussian over latents, and latents to images. The defaults are Stable Diffusion 3's.

    Attributes:
      image_channels: of images.
      latent_channels: 4 in Stable Diffusion 1 and 2, 16 in 3 and FLUX.1, 32 in FLUX.2.
      channels: of every level, from the image's size down, each half of the one before.
      decoder_channels: of the decoder's levels where they differ; None for the same.
      blocks_per_level: residual blocks of a level; the decoder has one more.
      groups: of the normalisations.
      middle_attention: whether there is attention, of one head, between the smallest level's two blocks.
      quant_conv: a convolution of size 1 after the encoder, as all but Stable Diffusion 3 and FLUX.1 have it.
      post_quant_conv: one before the decoder.
      dtype: what convolutions and products compute in; parameters, normalisation statistics, softmax, the last layers
        and what is returned stay float32.

    Raises:
      ValueError: image sizes that the levels do not divide, other channels than these, or groups that do not divide
        the levels' channels.
    """

    image_channels: int = 3
    latent_channels: int = 16
    channels: Sequence[int] = (128, 256, 512, 512)
    decoder_channels: Sequence[int] | None = None
    blocks_per_level: int = 2
    groups: int = 32
    middle_attention: bool = True
    quant_conv: bool = False
    post_quant_conv: bool = False
    dtype: Any = jnp.float32

    @property
    def factor(self) -> int:
        """How many times smaller latents are than images, in height and in width."""
        return 2 ** (len(self.channels) - 1)

    def setup(self) -> None:
        """Makes the two networks."""
        moments = 2 * self.latent_channels
        settings = self.blocks_per_level, self.groups, self.middle_attention, self.dtype
        self.encoder = Encoder(moments, self.channels, *settings)
        self.decoder = Decoder(self.image_channels, self.decoder_channels or self.channels, *settings)
        if self.quant_conv:
            self.quant = Conv(moments, size=1)
        if self.post_quant_conv:
            self.post_quant = Conv(self.latent_channels, size=1)

    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Float[Array, "B H W C"], Posterior]:
        """Returns the image decoded from the mode, and the posterior: what makes all parameters."""
        posterior = self.encode(x)
        return self.decode(posterior.mean), posterior

    def encode(self, x: Float[Array, "B H W C"]) -> Posterior:
        """Returns q(z | x) of images in [-1, 1]: `module.apply(variables, x, method="encode")`."""
        check_image(x, self.image_channels, self.factor)
        h = self.encoder(x)
        h = self.quant(h) if self.quant_conv else h
        mean, log_variance = jnp.split(h, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *LOG_VARIANCE))

    def decode(self, z: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Returns images, near [-1, 1] but not clipped: `module.apply(variables, z, method="decode")`."""
        check_latent(z, self.latent_channels)
        return self.decoder(self.post_quant(z) if self.post_quant_conv else z)


def check_image(x: Array, channels: int, factor: int) -> None:
    """Raises ValueError, saying what to do, unless x is [B, H, W, channels] and `factor` divides H and W."""
    _, height, width, found = x.shape
    if found != channels:
        raise ValueError(f"images have {found} channels where this autoencoder takes {channels}")
    if height % factor or width % factor:
        raise ValueError(f"images of {height}x{width} cannot be encoded: crop or resize to multiples of {factor}")


def check_latent(z: Array, channels: int) -> None:
    """Raises ValueError unless z is [B, h, w, channels]."""
    if z.shape[-1] != channels:
        raise ValueError(f"latents have {z.shape[-1]} channels where this autoencoder takes {channels}")


def _block(network: Encoder | Decoder, channels: int, name: str) -> ResidualBlock:
    return ResidualBlock(channels, dropout=0.0, num_groups=network.groups, dtype=network.dtype, name=name)


def _middle(network: Encoder | Decoder, h: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Returns h after the smallest level's block, attention and block."""
    channels = network.channels[-1]
    h = _block(network, channels, "middle_block_0")(h)
    if network.middle_attention:
        h = Attention(channels, network.groups, network.dtype, name="middle_attention")(h)
    return _block(network, channels, "middle_block_1")(h)


def _out(network: Encoder | Decoder, h: Float[Array, "B h w C"]) -> Float[Array, "B h w out"]:
    """Returns the last layer's output; in float32, and not zero at the start: an encoder of zeros has no gradient."""
    h = nn.silu(GroupNorm(network.groups, name="norm_out")(h))
    return Conv(network.out_channels, kernel_init=ddpm_init, name="conv_out")(h)
