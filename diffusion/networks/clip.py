"""CLIP's two towers (Radford et al. 2021, section 2.4, and the released code): images and texts in one space.

Every layer's hidden states are returned beside the embedding; under `jit` what nobody reads is not computed.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion.networks.layers import attention, merged_dot_general

normal = nn.initializers.normal
Dense = partial(nn.Dense, dot_general=merged_dot_general)
# Statistics are float32; the mean is taken away before squaring, so that a large one does not cost precision.
LayerNorm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)
# How a mesh cuts the parameters, see `training.sharding`: heads and the MLP's hidden units over "tensor".
RULES = (
    (r"block_\d+/(query|key|value|mlp_1)/kernel$", (None, "tensor")),
    (r"block_\d+/(query|key|value|mlp_1)/bias$", ("tensor",)),
    (r"block_\d+/(out|mlp_2)/kernel$", ("tensor", None)),
)


class Features(NamedTuple):
    """What a tower sees.

    Attributes:
      hidden: what enters the first layer, then what leaves each: num_layers + 1 arrays [B, L, W], not normalised.
        Stable Diffusion 3 reads hidden[-2].
      tokens: the last of them after the final layer norm.
      pooled: the one of `tokens` that stands for all: a picture's class token, or a text's end.
      embedding: `pooled` projected to the common space, of any length; without a projection, `pooled` itself.
    """

    hidden: tuple[Float[Array, "B L W"], ...]
    tokens: Float[Array, "B L W"]
    pooled: Float[Array, "B W"]
    embedding: Float[Array, "B E"]


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(1.702 x): the activation of OpenAI's weights; OpenCLIP's have the exact GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": partial(jax.nn.gelu, approximate=False)}


class Block(nn.Module):
    """Attention, then an MLP, each after a layer norm and added to its input.

    `num_layers` is that of the whole tower: initial weights of what is added shrink with it, as in the released code.
    """

    num_heads: int
    num_layers: int
    mlp_width: int
    activation: str
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L W"]) -> Float[Array, "B L W"]:
        """The tokens after the block."""
        width = x.shape[-1]
        into, out = width**-0.5, width**-0.5 * (2 * self.num_layers) ** -0.5

        def dense(name: str, features: int, std: float) -> nn.Dense:
            return Dense(features, kernel_init=normal(std), dtype=self.dtype, name=name)

        h = LayerNorm(dtype=self.dtype, name="norm_1")(x)
        heads = (*x.shape[:2], self.num_heads, width // self.num_heads)
        query, key, value = (dense(name, width, into)(h).reshape(heads) for name in ("query", "key", "value"))
        h = attention(query, key, value, is_causal=self.causal).reshape(x.shape)
        x = x + dense("out", width, out)(h)
        h = LayerNorm(dtype=self.dtype, name="norm_2")(x)
        h = ACTIVATIONS[self.activation](dense("mlp_1", self.mlp_width, (2 * width) ** -0.5)(h))
        return x + dense("mlp_2", width, out)(h)


class ImageTower(nn.Module):
    """Vision transformer over images of one size, [B, H, W, C], normalised as its training was.

    The defaults are ViT-B/32. `image_size` is the side of square images, or (H, W). `dtype` is what products compute
    in; parameters, statistics of layer norms and softmax are float32. `remat` recomputes every block's activations in
    the backward pass.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 32
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    projection: int | None = 512
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the images."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"]) -> Features:
        """The features; raises ValueError for images of another size, or one that the patches do not divide."""
        size, patch, width = self.height_width, self.patch_size, self.width
        batch, *shape, channels = image.shape
        if tuple(shape) != size:
            raise ValueError(
                f"images of {shape[0]}x{shape[1]} pixels: this tower sees {size[0]}x{size[1]}, crop or resize them to "
                "that"
            )
        if size[0] % patch or size[1] % patch:
            raise ValueError(
                f"patches of {patch} pixels do not divide an image of {size[0]}x{size[1]}: choose another patch_size, "
                f"or sides divisible by {patch}"
            )
        _check(self)
        rows, columns = size[0] // patch, size[1] // patch
        # A convolution whose stride is its size is a matrix product of the patches.
        patches = image.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, rows * columns, patch * patch * channels)
        std = (patch * patch * channels) ** -0.5
        x = Dense(width, use_bias=False, kernel_init=normal(std), dtype=self.dtype, name="patch_embedding")(patches)
        class_token = self.param("class_token", normal(width**-0.5), (width,), jnp.float32)
        position = self.param("position", normal(width**-0.5), (rows * columns + 1, width), jnp.float32)
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (batch, 1, width))
        x = jnp.concatenate([class_token, x], axis=1) + position.astype(self.dtype)
        hidden = _blocks(self, LayerNorm(dtype=self.dtype, name="norm_in")(x), causal=False)
        tokens = LayerNorm(dtype=self.dtype, name="norm_out")(hidden[-1])
        pooled = tokens[:, 0]
        return Features(hidden, tokens, pooled, _project(self, pooled))


class TextTower(nn.Module):
    """Causal transformer over token ids [B, L], L <= `length`, each text ended by `end_of_text`.

    The defaults are ViT-B/32's. Nothing is masked but the future: what stands after the end cannot be seen from it,
    but its own hidden states depend on what the text was padded with. `dtype` and `remat` as in `ImageTower`.
    """

    vocabulary_size: int = 49408
    end_of_text: int = 49407
    length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    projection: int | None = 512
    activation: str = "quick_gelu"
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, text: Int[Array, "B L"]) -> Features:
        """The features; `pooled` is read at the first `end_of_text`. Raises ValueError for texts that are too long."""
        batch, length = text.shape
        if length > self.length:
            raise ValueError(f"texts of {length} tokens: this tower has places for {self.length}, encode them to that")
        _check(self)
        table = nn.Embed(
            self.vocabulary_size, self.width, embedding_init=normal(0.02), dtype=self.dtype, name="token_embedding"
        )
        position = self.param("position", normal(0.01), (self.length, self.width), jnp.float32)
        x = table(text) + position[:length].astype(self.dtype)
        hidden = _blocks(self, x, causal=True)
        tokens = LayerNorm(dtype=self.dtype, name="norm_out")(hidden[-1])
        pooled = tokens[jnp.arange(batch), jnp.argmax(text == self.end_of_text, axis=1)]
        return Features(hidden, tokens, pooled, _project(self, pooled))


class CLIP(nn.Module):
    """Both towers and what scales their similarities: logits = exp(logit_scale) cosine + logit_bias.

    The scale starts at 1 / 0.07 (section 2.5); only the sigmoid loss has a bias (Zhai et al. 2023: scale 10, bias -10).
    """

    image: ImageTower
    text: TextTower
    scale: float = 1 / 0.07
    bias: float | None = None

    def setup(self) -> None:
        """Makes the two numbers."""
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(jnp.log(self.scale)), (), jnp.float32)
        if self.bias is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.bias), (), jnp.float32)

    def __call__(
        self, image: Float[Array, "B H W C"], text: Int[Array, "N L"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "N E"], Float[Array, ""], Float[Array, ""]]:
        """Embeddings of length 1, the scale (not its logarithm) and the bias: what the losses take."""
        bias = jnp.zeros(()) if self.bias is None else self.logit_bias
        image_embedding, text_embedding = unit(self.image(image).embedding), unit(self.text(text).embedding)
        return image_embedding, text_embedding, jnp.exp(self.logit_scale), bias

    def see(self, image: Float[Array, "B H W C"]) -> Features:
        """The image tower alone: `clip.apply(params, image, method="see")`."""
        return self.image(image)

    def read(self, text: Int[Array, "B L"]) -> Features:
        """The text tower alone."""
        return self.text(text)


def unit(x: Float[Array, "*shape E"]) -> Float[Array, "*shape E"]:
    """x / |x| over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def _blocks(tower: Any, x: Float[Array, "B L W"], causal: bool) -> tuple[Float[Array, "B L W"], ...]:
    """What enters the first block, and what leaves each."""
    block = nn.remat(Block) if tower.remat else Block
    hidden = [x]
    for i in range(tower.num_layers):
        layer = block(
            tower.num_heads, tower.num_layers, tower.mlp_width, tower.activation, causal, tower.dtype, name=f"block_{i}"
        )
        hidden.append(layer(hidden[-1]))
    return tuple(hidden)


def _project(tower: Any, pooled: Float[Array, "B W"]) -> Float[Array, "B E"]:
    if tower.projection is None:
        return pooled
    std = tower.width**-0.5
    return Dense(tower.projection, use_bias=False, kernel_init=normal(std), dtype=tower.dtype, name="projection")(
        pooled
    )


def _check(tower: Any) -> None:
    if tower.width % tower.num_heads:
        raise ValueError(f"{tower.num_heads} heads do not divide a width of {tower.width}: choose another num_heads")
    if tower.activation not in ACTIVATIONS:
        raise ValueError(f"activation {tower.activation!r}: choose {' or '.join(ACTIVATIONS)}")
