"""The MM-DiT of Stable Diffusion 3 (Esser et al. 2024, section 4 and figure 2) and its 3.5 variants.

Two streams of tokens, text and image patches, each with its own weights, that meet in attention alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.networks.layers import attention, cut_along_batch, interval_embedding, merged_dot_general

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()
TIME_CHANNELS = 256
Dense = partial(nn.Dense, dot_general=merged_dot_general)
DenseGeneral = partial(nn.DenseGeneral, dot_general=merged_dot_general)

# How a mesh cuts the parameters, see `training.sharding`: heads and the MLP's hidden units are spread over "tensor", so
# that each block needs two sums over it, as in Megatron (Shoeybi et al. 2019).
RULES = (
    (r"_qkv/kernel$", (None, None, "tensor", None)),
    (r"_qkv/bias$", (None, "tensor", None)),
    (r"_out/kernel$", ("tensor", None, None)),
    (r"_mlp_1/kernel$", (None, "tensor")),
    (r"_mlp_1/bias$", ("tensor",)),
    (r"_mlp_2/kernel$", ("tensor", None)),
)

Vectors = Float[Array, "B 1 W"]
Tokens = Float[Array, "B _ W"]


def layer_norm(x: Tokens, epsilon: float = 1e-6) -> Tokens:
    """Zero mean and unit variance over channels, without weights, computed and returned in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + epsilon)


def modulate(x: Tokens, shift: Vectors, scale: Vectors) -> Tokens:
    """AdaLN: x (1 + scale) + shift (Peebles & Xie 2023)."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """One block of both streams; the identity at the start, as the gates of AdaLN-Zero are zero.

    `dual_attention` adds attention among image tokens alone (3.5-medium); in the `last` block the text is only looked
    at: it has neither output nor MLP.
    """

    num_heads: int
    qk_norm: bool = False
    dual_attention: bool = False
    last: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Tokens, text: Tokens, conditioning: Float[Array, "B W"]) -> tuple[Tokens, Tokens]:
        """The streams after the block (the last leaves the text as it is); `conditioning` is SiLU(time + pooled)."""
        num_vectors = 9 if self.dual_attention else 6
        shift, scale, gate, *of_mlp = self._modulation("image", conditioning, num_vectors)
        normal = layer_norm(image)
        query, key, value = self._heads("image", modulate(normal, shift, scale))
        if self.last:
            text_scale, text_shift = self._modulation("text", conditioning, 2)
            text_gate, of_text_mlp = None, []
        else:
            text_shift, text_scale, text_gate, *of_text_mlp = self._modulation("text", conditioning, 6)
        text_query, text_key, text_value = self._heads("text", modulate(layer_norm(text), text_shift, text_scale))
        if not self.last:
            query = jnp.concatenate([query, text_query], axis=1)
        key, value = jnp.concatenate([key, text_key], axis=1), jnp.concatenate([value, text_value], axis=1)
        joint = attention(query, key, value)

        length = image.shape[1]
        image = image + gate * self._out("image", joint[:, :length])
        if self.dual_attention:
            *of_mlp, dual_shift, dual_scale, dual_gate = of_mlp
            alone = attention(*self._heads("dual", modulate(normal, dual_shift, dual_scale)))
            image = image + dual_gate * self._out("dual", alone)
        image = self._mlp("image", image, *of_mlp)
        if text_gate is None:
            return image, text
        text = text + text_gate * self._out("text", joint[:, length:])
        return image, self._mlp("text", text, *of_text_mlp)

    def _modulation(self, stream: str, conditioning: Float[Array, "B W"], count: int) -> list[Vectors]:
        dense = Dense(count * conditioning.shape[-1], dtype=self.dtype, kernel_init=zeros, name=f"{stream}_modulation")
        return jnp.split(dense(conditioning)[:, None], count, axis=-1)

    def _heads(self, stream: str, x: Tokens) -> tuple[Float[Array, "B _ heads head"], ...]:
        """Query, key and value. One product makes all three; its heads are an axis of the kernel, to be cut along."""
        shape = (3, self.num_heads, x.shape[-1] // self.num_heads)
        dense = DenseGeneral(shape, dtype=self.dtype, kernel_init=xavier, name=f"{stream}_qkv")
        query, key, value = jnp.moveaxis(dense(x), 2, 0)
        if self.qk_norm:
            query = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{stream}_norm_query")(query)
            key = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{stream}_norm_key")(key)
        return query, key, value

    def _out(self, stream: str, x: Float[Array, "B _ heads head"]) -> Tokens:
        width = x.shape[-1] * x.shape[-2]
        return DenseGeneral(width, (-2, -1), dtype=self.dtype, kernel_init=xavier, name=f"{stream}_out")(x)

    def _mlp(self, stream: str, x: Tokens, shift: Vectors, scale: Vectors, gate: Vectors) -> Tokens:
        h = modulate(layer_norm(x), shift, scale)
        h = Dense(4 * x.shape[-1], dtype=self.dtype, kernel_init=xavier, name=f"{stream}_mlp_1")(h)
        h = Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name=f"{stream}_mlp_2")(nn.gelu(h))
        return x + gate * h


class MMDiT(nn.Module):
    """Image, time and text -> an image of the same size. The defaults are Stable Diffusion 3 medium's.

    The paper's model of depth d has `width` 64 d and d heads. Patches have `patch` x `patch` pixels. `context_width`
    and `pooled_width` are the text encoder's. Positions are those of the middle of a table of `table_size`^2 patches
    that stands for `base_size`^2 of them. `qk_norm` is 3.5's; `dual_attention` is the number of blocks, from the
    first, that have image attention of their own.

    `time_scale` multiplies `time` before its embedding: 1000 for a flow's time in [0, 1]. With `two_times` it is told,
    too, the time at which a step ends, as a flow map is. `out_channels` are those of the output. Products are computed
    in `dtype`; parameters, normalisation, softmax, residuals, the last layer and the output stay float32. `remat`
    recomputes every block's activations in the backward pass. `scan` compiles blocks of one kind once, however many:
    they are a loop over parameters that are stacked inside the program. The tree of the parameters is the same, and the
    price in memory is a copy of the blocks' parameters and one of their gradients; a loop also keeps every activation,
    some of which a chain computes again: take `remat` with it.

    Raises ValueError for an image that patches do not divide or the table does not hold, text of another width, and a
    width that the heads do not divide.
    """

    width: int = 1536
    depth: int = 24
    num_heads: int = 24
    patch: int = 2
    out_channels: int = 16
    context_width: int = 4096
    pooled_width: int = 2048
    table_size: int = 192
    base_size: int = 64
    qk_norm: bool = False
    dual_attention: int = 0
    time_scale: float = 1000.0
    two_times: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        time: Float[Array, "B"],
        context: Float[Array, "B L D"],
        pooled: Float[Array, "B P"],
        *,
        next_time: Float[Array, "B"] | None = None,
        train: bool = False,
        skip: Sequence[int] = (),
    ) -> Float[Array, "B H W out"]:
        """The network's output, float32; `context` holds the features of the prompt's tokens, `pooled` those of all.

        A network of `two_times` may be told `next_time`, where a step from `time` ends; None: at `time`. `train`
        changes nothing: there is no dropout. Both streams pass by the blocks whose numbers are in `skip`.
        """
        self._check(x_t, context, pooled, next_time)
        batch, height, width, channels = x_t.shape
        rows, columns = height // self.patch, width // self.patch

        def dense(features: int, name: str, dtype: Any = self.dtype, kernel_init: Any = xavier) -> nn.Dense:
            return Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)

        def embed(time: Float[Array, "B"]) -> Float[Array, "B E"]:
            return time_embedding(time * self.time_scale)

        def mlp(x: Float[Array, "B _"], name: str) -> Float[Array, "B W"]:
            return dense(self.width, f"{name}_2")(nn.silu(dense(self.width, f"{name}_1")(x)))

        patches = x_t.reshape(batch, rows, self.patch, columns, self.patch, channels).swapaxes(2, 3)
        positions = position_table(rows, columns, self.width, self.table_size, self.base_size)
        image = dense(self.width, "patch_in")(patches.reshape(batch, rows * columns, -1)) + positions
        text = dense(self.width, "context_in")(context).astype(jnp.float32)
        vectors = mlp(embed(time), "time") + mlp(pooled, "pooled")
        if self.two_times:
            vectors = vectors + interval_embedding(embed, partial(dense, self.width), time, next_time)
        conditioning = nn.silu(vectors)

        streams = image, text
        for kind in self._kinds():
            kind = [i for i in kind if i not in skip]
            if self.scan and len(kind) > 1 and not self.is_initializing():
                streams = self._scanned(kind, streams, conditioning)
            else:
                for i in kind:
                    streams = self._block(i, name=f"block_{i}")(*map(cut_along_batch, streams), conditioning)
        image, _ = streams

        modulation = dense(2 * self.width, "modulation_out", kernel_init=zeros)(conditioning)[:, None]
        scale, shift = jnp.split(modulation, 2, axis=-1)
        patches = dense(self.patch**2 * self.out_channels, "patch_out", jnp.float32, zeros)(
            modulate(layer_norm(image), shift, scale)
        )
        patches = patches.reshape(batch, rows, columns, self.patch, self.patch, self.out_channels).swapaxes(2, 3)
        return patches.reshape(batch, height, width, self.out_channels)

    def _kinds(self) -> list[range]:
        """Returns the blocks' numbers, those of one kind after the other: with dual attention, without, the last."""
        last = self.depth - 1
        dual = min(self.dual_attention, last)
        return [range(dual), range(dual, last), range(last, self.depth)]

    def _block(self, number: int, in_loop: bool = False, **options: Any) -> Block:
        block = nn.remat(Block, prevent_cse=not in_loop) if self.remat else Block
        return block(
            self.num_heads,
            self.qk_norm,
            dual_attention=number < self.dual_attention,
            last=number == self.depth - 1,
            dtype=self.dtype,
            **options,
        )

    def _scanned(
        self, kind: Sequence[int], streams: tuple[Tokens, Tokens], conditioning: Float[Array, "B W"]
    ) -> tuple[Tokens, Tokens]:
        """Returns the streams after blocks of one kind, as a loop over their stacked parameters."""
        block = self._block(kind[0], in_loop=True, parent=None)
        own = [self.variables["params"][f"block_{i}"] for i in kind]

        def step(streams: tuple[Tokens, Tokens], params: Any) -> tuple[Any, None]:
            return block.apply({"params": params}, *map(cut_along_batch, streams), conditioning), None

        return jax.lax.scan(step, streams, jax.tree.map(lambda *leaves: jnp.stack(leaves), *own))[0]

    def _check(self, x_t: Array, context: Array, pooled: Array, next_time: Array | None) -> None:
        if next_time is not None and not self.two_times:
            raise ValueError("next_time was given to an MM-DiT of one time: set two_times")
        height, width = x_t.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"image size {height}x{width} is not whole patches of {self.patch}x{self.patch}: "
                f"use multiples of {self.patch}, or another patch"
            )
        if max(height, width) > self.table_size * self.patch:
            raise ValueError(
                f"image size {height}x{width} is larger than the position table's {self.table_size}^2 patches of "
                f"{self.patch}x{self.patch}: make table_size larger"
            )
        if self.dual_attention > self.depth:
            raise ValueError(f"dual_attention is {self.dual_attention}: there are {self.depth} blocks")
        if self.width % self.num_heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of {self.num_heads} heads, and of 4")
        for name, array, expected in (
            ("context_width", context, self.context_width),
            ("pooled_width", pooled, self.pooled_width),
        ):
            if array.shape[-1] != expected:
                raise ValueError(
                    f"the text encoder gives width {array.shape[-1]} where the network's {name} is {expected}: "
                    f"use the encoder it was built for, or set {name}={array.shape[-1]}"
                )


def time_embedding(time: Float[Array, "B"], width: int = TIME_CHANNELS) -> Float[Array, "B width"]:
    """Cosines, then sines, of `time` at frequencies 1 down to almost 1 / 10,000; float32."""
    frequency = np.exp(-np.log(10_000.0) * np.arange(width // 2) / (width // 2)).astype(np.float32)
    angle = time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def position_table(
    rows: int, columns: int, width: int, table_size: int, base_size: int
) -> Float[np.ndarray, "L width"]:
    """Sin-cos positions of the middle rows x columns of a table_size^2 table, in row-major order; float32.

    Half of the channels hold the column, half the row, each sines then cosines. Positions in the whole table run from
    0 to base_size (Esser et al. 2024, section 5.3.2).
    """
    frequency = 10_000.0 ** -(np.arange(width // 4) / (width // 4))

    def along(count: int) -> np.ndarray:
        position = ((table_size - count) // 2 + np.arange(count)) * (base_size / table_size)
        angle = np.outer(position, frequency)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)

    row = np.broadcast_to(along(rows)[:, None], (rows, columns, width // 2))
    column = np.broadcast_to(along(columns)[None], (rows, columns, width // 2))
    return np.concatenate([column, row], axis=-1).reshape(rows * columns, width).astype(np.float32)
