"""LoRA: what is learned of a large network is a product of two small matrices beside each of its kernels.

W + scale * A B, with A [in, r] and B [r, out]: our kernels' layout, in which a product is x W (the paper has W x and
calls the first factor to act A too). B begins as zero, so that the network is at first as it was.

The adapters are a tree of their own, {"block_0": {"image_qkv": {"A", "B"}, ...}, ...}; `merge` makes the network's
parameters of both. Queries, keys and values, which one kernel "_qkv" of ours holds side by side, have adapters of their
own; all else that a kernel makes of its inputs is one product, as it is in published files.

A checkpoint holds the frozen network beside them, for it is the whole experiment: it resumes and draws where the run
that it began with is gone. What is small is the export.

Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion.pretrained.lora import is_block
from diffusion.training import Rules

# The modules that are adapted by default, by network, as diffusers' scripts have it: the projections of attention; of
# FLUX.2 those of images, and both products of the blocks of one stream.
ATTENTION = {
    "mmdit": ("image_qkv", "image_out", "text_qkv", "text_out"),
    "flux2": ("image_qkv", "image_out", "parallel_in", "parallel_out"),
}
# How a mesh cuts adapters: as the kernels beside them.
RULES: Rules = (
    (r"_qkv/B$", (None, None, "tensor", None)),
    (r"_out/A$", ("tensor", None, None)),
    (r"_mlp_1/B$", (None, "tensor")),
    (r"_mlp_1/B$", (None, None, "tensor")),
    (r"_mlp_2/A$", ("tensor", None)),
    (r"/parallel_in/B$", (None, None, "tensor", None)),
    (r"/parallel_out/A$", (None, "tensor", None, None)),
)


class LoRA(NamedTuple):
    """Which kernels are adapted, and how.

    Attributes:
      rank: r.
      scale: of the product.
      targets: names of modules in a network's blocks.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]


def make_lora(network: str, *, rank: int = 0, alpha: float = 0.0, targets: Sequence[str] = ()) -> LoRA | None:
    """Returns the adapters of a config's block; None at rank 0.

    Args:
      network: the network's name in the config.
      rank: of each product; 0: no adapters.
      alpha: the product's scale is alpha / rank (Hu et al. 2021, section 4.1); 0: rank.
      targets: names of modules; (): those of attention.

    Raises:
      ValueError: a negative number, or a network that has no blocks to adapt.
    """
    if rank < 0 or alpha < 0:
        raise ValueError(f"lora.rank is {rank} and lora.alpha {alpha:g}: neither may be negative")
    if not rank:
        return None
    if network not in ATTENTION:
        raise ValueError(
            f"lora.rank={rank} adapts {' or '.join(ATTENTION)}, and network.name is {network}: set it to 0"
        )
    return LoRA(rank, (alpha or rank) / rank, tuple(targets or ATTENTION[network]))


def init(lora: LoRA, network: Any, key: jax.Array) -> dict[str, Any]:
    """Returns new adapters: A normal with standard deviation 1 / rank, B zero.

    Args:
      lora: which.
      network: its parameters, {"params": {block: {module: {"kernel"}}}}; may be abstract.
      key: of A.

    Raises:
      ValueError: a target that no block has.
    """
    blocks = {name: block for name, block in network["params"].items() if is_block(name)}
    there = {name for block in blocks.values() for name, module in block.items() if "kernel" in module}
    if unknown := [name for name in lora.targets if name not in there]:
        raise ValueError(f"lora.targets: no block has {unknown[0]}: choose from {', '.join(sorted(there))}")
    adapters: dict[str, Any] = {}
    for name, block in blocks.items():
        own = [target for target in lora.targets if target in block]
        if own:
            key, *keys = jax.random.split(key, len(own) + 1)
            adapters[name] = {
                target: new_pair(target, block[target]["kernel"].shape, lora.rank, one)
                for target, one in zip(own, keys, strict=True)
            }
    return adapters


def new_pair(module: str, kernel: tuple[int, ...], rank: int, key: jax.Array) -> dict[str, jax.Array]:
    """Returns {"A", "B"} of a kernel of this shape."""
    first, second = shapes(module, kernel, rank)
    return {"A": jax.random.normal(key, first) / rank, "B": jnp.zeros(second)}


def shapes(module: str, kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of A and B of a kernel: queries, keys and values [in, 3, heads, head] have three products."""
    if is_fused(module):
        return (kernel[0], 3, rank), (3, rank, *kernel[2:])
    inputs = num_inputs(module, kernel)
    return (*kernel[:inputs], rank), (rank, *kernel[inputs:])


def num_inputs(module: str, kernel: tuple[int, ...]) -> int:
    """Returns how many axes of a kernel are inputs: all but the last after heads, [heads, head, out], else one."""
    return len(kernel) - 1 if module.endswith("_out") else 1


def is_fused(module: str) -> bool:
    """Returns whether the kernel of this module makes queries, keys and values at once."""
    return module.endswith("_qkv")


def merge(network: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Returns the network's parameters with scale * A B added to the kernels that have adapters, in float32.

    Example:
      merge(params["network"], params["lora"], model.lora.scale)
    """

    def adapted(module: str, own: Mapping[str, Any], pair: Mapping[str, Any]) -> dict[str, Any]:
        highest = jax.lax.Precision.HIGHEST
        if is_fused(module):
            change = jnp.einsum("ijr,jrhd->ijhd", pair["A"], pair["B"], precision=highest)
        else:
            change = jnp.tensordot(pair["A"], pair["B"], 1, precision=highest)
        return {**own, "kernel": own["kernel"].astype(jnp.float32) + scale * change}

    blocks = dict(network["params"])
    for name, pairs in adapters.items():
        changed = {module: adapted(module, blocks[name][module], pair) for module, pair in pairs.items()}
        blocks[name] = {**blocks[name], **changed}
    return {**network, "params": blocks}
