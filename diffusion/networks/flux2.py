"""The transformer of FLUX.2 (Black Forest Labs 2025): blocks of two streams, then blocks of one, and pictures to edit.

Text and image tokens have weights of their own in the first blocks and meet in attention (Esser et al. 2024); then they
are one sequence, whose attention and MLP are computed side by side (Dehghani et al. 2023, section 2). What time tells
is the same in all blocks of a kind. There are no biases.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion.networks.layers import attention, merged_dot_general, sinusoidal_embedding
from diffusion.networks.mmdit import layer_norm, modulate

zeros = nn.initializers.zeros_init()
# Sums leave products in float32, see `networks.t5`: what is added to the residual is not rounded first.
Dense = partial(
    nn.DenseGeneral,
    use_bias=False,
    kernel_init=nn.initializers.xavier_uniform(),
    dot_general=partial(merged_dot_general, preferred_element_type=jnp.float32),
)
REFERENCE_STEP = 10  # between the first coordinates of one picture and the next

# How a mesh cuts the parameters, see `training.sharding`: heads and the MLP's hidden units over "tensor". In a block of
# one stream these lie beside each other, as groups as wide as all heads.
RULES = (
    (r"double_\d+/\w+_qkv/kernel$", (None, None, "tensor", None)),
    (r"double_\d+/\w+_out/kernel$", ("tensor", None, None)),
    (r"double_\d+/\w+_mlp_1/kernel$", (None, None, "tensor")),
    (r"double_\d+/\w+_mlp_2/kernel$", ("tensor", None)),
    (r"single_\d+/parallel_in/kernel$", (None, None, "tensor", None)),
    (r"single_\d+/parallel_out/kernel$", (None, "tensor", None, None)),
)

Vectors = Float[Array, "B 1 _"]
Tokens = Float[Array, "B _ W"]
Heads = Float[Array, "B _ heads head"]
Rotation = tuple[Float[Any, "L half"], Float[Any, "L half"]]


class DoubleBlock(nn.Module):
    """Both streams: attention over all tokens, then an MLP each, gated by what time tells."""

    num_heads: int
    head_width: int
    mlp_ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, streams: tuple[Tokens, Tokens], image_vectors: Vectors, text_vectors: Vectors, rotation: Rotation
    ) -> tuple[Tokens, Tokens]:
        """Returns the streams (image, text) after the block; vectors are shift, scale and gate, twice each."""
        image, text = streams
        shift, scale, gate, *of_mlp = jnp.split(image_vectors, 6, axis=-1)
        text_shift, text_scale, text_gate, *of_text_mlp = jnp.split(text_vectors, 6, axis=-1)
        of_text = self._heads("text", modulate(layer_norm(text), text_shift, text_scale))
        of_image = self._heads("image", modulate(layer_norm(image), shift, scale))
        query, key, value = (jnp.concatenate(parts, axis=1) for parts in zip(of_text, of_image, strict=True))
        joint = attend(query, key, value, rotation, self.dtype)
        length = text.shape[1]
        image = image + gate * self._out("image", joint[:, length:])
        text = text + text_gate * self._out("text", joint[:, :length])
        return self._mlp("image", image, *of_mlp), self._mlp("text", text, *of_text_mlp)

    def _heads(self, stream: str, x: Tokens) -> tuple[Heads, ...]:
        """Query, key and value."""
        shape = (3, self.num_heads, self.head_width)
        query, key, value = jnp.moveaxis(Dense(shape, dtype=self.dtype, name=f"{stream}_qkv")(x), 2, 0)
        return rms_norm(f"{stream}_norm_query")(query), rms_norm(f"{stream}_norm_key")(key), value

    def _out(self, stream: str, x: Heads) -> Tokens:
        return Dense(x.shape[-1] * x.shape[-2], axis=(-2, -1), dtype=self.dtype, name=f"{stream}_out")(x)

    def _mlp(self, stream: str, x: Tokens, shift: Vectors, scale: Vectors, gate: Vectors) -> Tokens:
        width = x.shape[-1]
        h = modulate(layer_norm(x), shift, scale)
        h = Dense((2, self.mlp_ratio * width), dtype=self.dtype, name=f"{stream}_mlp_1")(h)
        h = Dense(width, dtype=self.dtype, name=f"{stream}_mlp_2")(nn.silu(h[:, :, 0]) * h[:, :, 1])
        return x + gate * h


class SingleBlock(nn.Module):
    """Attention and MLP side by side: one product leads to both, and one out of both."""

    num_heads: int
    head_width: int
    mlp_ratio: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, vectors: Vectors, rotation: Rotation) -> Tokens:
        """Returns the tokens, text first, after the block; `vectors` are shift, scale and gate."""
        shift, scale, gate = jnp.split(vectors, 3, axis=-1)
        ratio = self.mlp_ratio
        h = modulate(layer_norm(x), shift, scale)
        # Query, key and value, then the two halves of the MLP: each as many groups as it is times as wide as the heads.
        h = Dense((3 + 2 * ratio, self.num_heads, self.head_width), dtype=self.dtype, name="parallel_in")(h)
        query, key, value = jnp.moveaxis(h[:, :, :3], 2, 0)
        query, key = rms_norm("norm_query")(query), rms_norm("norm_key")(key)
        attention = attend(query, key, value, rotation, self.dtype)[:, :, None]
        hidden = (nn.silu(h[:, :, 3 : 3 + ratio]) * h[:, :, 3 + ratio :]).astype(self.dtype)
        h = jnp.concatenate([attention, hidden], axis=2)
        return x + gate * Dense(x.shape[-1], axis=(-3, -2, -1), dtype=self.dtype, name="parallel_out")(h)


class Flux2(nn.Module):
    """Latents, time, text and pictures to edit -> an array like the latents. The defaults are FLUX.2 [klein] 4B's.

    Its width is `num_heads` heads of `head_width`, whose coordinates `axes` shares out; MLPs are `mlp_ratio` times as
    wide. `context_width` is the text encoder's. With `guidance_embedding` the network is told how far it was distilled
    to be guided, as FLUX.2 [dev] is.

    `time_scale` multiplies `time` (and guidance) before its embedding of `time_channels`: 1000 for a flow's time in
    [0, 1]. Products are computed in `dtype`; their sums, parameters, normalisation, rotations, softmax, residuals, the
    last layer and the output stay float32. `remat` recomputes every block's activations in the backward pass. `scan`
    compiles each kind of block once, as `MMDiT` does; in bfloat16 XLA on CPUs then holds the blocks in float32 too.

    Raises ValueError for latents or references of other channels, text of another width, guidance that is missing or
    not read, and axes that do not make up a head.
    """

    num_double: int = 5
    num_single: int = 20
    num_heads: int = 24
    head_width: int = 128
    mlp_ratio: int = 3
    out_channels: int = 128
    context_width: int = 7680
    axes: tuple[int, ...] = (32, 32, 32, 32)
    theta: float = 2000.0
    time_channels: int = 256
    guidance_embedding: bool = False
    time_scale: float = 1000.0
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        time: Float[Array, "B"],
        context: Float[Array, "B L D"],
        pooled: Float[Array, "B P"] | None = None,
        *,
        references: Sequence[Float[Array, "B _ _ _"]] = (),
        guidance: Float[Array, "B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W C"]:
        """The network's output, float32; `context` holds the features of the prompt's tokens, of which none is masked.

        `references` are latents of pictures to edit, of any size. `guidance` is read with `guidance_embedding` alone.
        `pooled` and `train` change nothing: there is no pooled text here, and no dropout.
        """
        self._check(x_t, context, references, guidance)
        width = self.num_heads * self.head_width

        def dense(features: int, name: str, **options: Any) -> nn.DenseGeneral:
            return Dense(features, name=name, **{"dtype": self.dtype, **options})

        def embed(number: Float[Array, "B"], name: str) -> Float[Array, "B W"]:
            waves = sinusoidal_embedding(
                number * self.time_scale, self.time_channels, freq_shift=0, flip_sin_to_cos=True
            )
            return dense(width, f"{name}_2")(nn.silu(dense(width, f"{name}_1")(waves)))

        def vectors(count: int, name: str) -> Vectors:
            return dense(count * width, f"{name}_modulation", kernel_init=zeros)(conditioning)[:, None]

        conditioning = embed(time, "time")
        if guidance is not None:
            conditioning = conditioning + embed(guidance, "guidance")
        conditioning = nn.silu(conditioning)

        pictures = (x_t, *references)
        ids = token_ids(context.shape[1], [(picture.shape[1], picture.shape[2]) for picture in pictures])
        rotation = rotations(ids, self.axes, self.theta)
        tokens = [picture.reshape(len(x_t), -1, self.out_channels) for picture in pictures]
        image = dense(width, "image_in")(jnp.concatenate(tokens, axis=1))
        text = dense(width, "context_in")(context)
        of_both = vectors(6, "image"), vectors(6, "text")
        image, text = self._blocks(DoubleBlock, "double", self.num_double, (image, text), *of_both, rotation)
        x = jnp.concatenate([text, image], axis=1)
        x = self._blocks(SingleBlock, "single", self.num_single, x, vectors(3, "single"), rotation)

        image = x[:, text.shape[1] :][:, : tokens[0].shape[1]]
        scale, shift = jnp.split(vectors(2, "out"), 2, axis=-1)
        output = modulate(layer_norm(image), shift, scale)
        return dense(self.out_channels, "image_out", dtype=jnp.float32, kernel_init=zeros)(output).reshape(x_t.shape)

    def _blocks(self, kind: Any, name: str, count: int, streams: Any, *told: Any) -> Any:
        """Returns the streams after all blocks of a kind: with `scan` as a loop over their stacked parameters."""
        in_loop = self.scan and count > 1 and not self.is_initializing()
        block = partial(
            nn.remat(kind, prevent_cse=not in_loop) if self.remat else kind,
            self.num_heads,
            self.head_width,
            self.mlp_ratio,
            dtype=self.dtype,
        )
        if not in_loop:
            for i in range(count):
                streams = block(name=f"{name}_{i}")(streams, *told)
            return streams
        alone = block(parent=None)
        own = [self.variables["params"][f"{name}_{i}"] for i in range(count)]

        def step(streams: Any, params: Any) -> tuple[Any, None]:
            return alone.apply({"params": params}, streams, *told), None

        return jax.lax.scan(step, streams, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))[0]

    def _check(self, x_t: Array, context: Array, references: Sequence[Array], guidance: Array | None) -> None:
        if sum(self.axes) != self.head_width or len(self.axes) != 4 or any(axis % 2 for axis in self.axes):
            raise ValueError(f"axes are {self.axes}: give four even numbers whose sum is head_width={self.head_width}")
        for what, picture in (("latents", x_t), *(("a reference", reference) for reference in references)):
            if picture.shape[-1] != self.out_channels:
                raise ValueError(
                    f"{what} of {picture.shape[-1]} channels, where the network's out_channels is {self.out_channels}: "
                    "use the autoencoder it was built for, its patches folded into channels"
                )
        if context.shape[-1] != self.context_width:
            raise ValueError(
                f"the text encoder gives width {context.shape[-1]} where the network's context_width is "
                f"{self.context_width}: use the encoder it was built for, or set context_width={context.shape[-1]}"
            )
        if self.guidance_embedding and guidance is None:
            raise ValueError("this network is told its guidance: give guidance, one number per image (2.5 to 4)")
        if guidance is not None and not self.guidance_embedding:
            raise ValueError("this network is not told its guidance: leave guidance out, or set guidance_embedding")


def rms_norm(name: str) -> nn.RMSNorm:
    """Returns the normalisation of each head of a query or key; what it returns is float32, to be rotated."""
    return nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


def attend(query: Heads, key: Heads, value: Heads, rotation: Rotation, dtype: Any) -> Heads:
    """Returns attention over all tokens, of queries and keys that are rotated by their tokens' coordinates."""
    query, key = rotate(query, *rotation), rotate(key, *rotation)
    return attention(*(x.astype(dtype) for x in (query, key, value)))


def rotate(x: Heads, cosine: Float[Any, "L half"], sine: Float[Any, "L half"]) -> Heads:
    """Returns each pair of adjacent channels rotated by its token's angle (Su et al. 2021, section 3.2.2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    cosine, sine = cosine[:, None], sine[:, None]
    return jnp.stack([even * cosine - odd * sine, odd * cosine + even * sine], axis=-1).reshape(x.shape)


def rotations(ids: Int[np.ndarray, "L 4"], axes: Sequence[int], theta: float) -> Rotation:
    """Returns cosines and sines, float32, of each token's angles: those of its first coordinate, and so on.

    A coordinate p has an angle p theta^(-2 k / n) for each of its n / 2 pairs of channels, n of `axes`.
    """
    frequencies = (theta ** (-np.arange(0, axis, 2) / axis) for axis in axes)
    angles = np.concatenate([np.outer(ids[:, i], frequency) for i, frequency in enumerate(frequencies)], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def token_ids(length: int, sizes: Sequence[tuple[int, int]]) -> Int[np.ndarray, "L 4"]:
    """Returns the coordinates of all tokens: picture, row, column, place in the text.

    Args:
      length: of the text.
      sizes: rows and columns of the picture that is drawn, then of the references.
    """
    ids = [np.stack([*np.zeros((3, length), int), np.arange(length)], axis=-1)]
    for i, (rows, columns) in enumerate(sizes):
        row, column = np.indices((rows, columns)).reshape(2, -1)
        ids.append(np.stack([np.full_like(row, i * REFERENCE_STEP), row, column, np.zeros_like(row)], axis=-1))
    return np.concatenate(ids)
