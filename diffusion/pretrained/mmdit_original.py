"""Stable Diffusion 3's MM-DiT under its authors' names, as single files have it, renamed to diffusers'."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.networks.mmdit import MMDiT
from diffusion.pretrained.folder import Stored
from diffusion.pretrained.strict import few

PREFIX = "model.diffusion_model."
BASE_SIZE = 64  # of the published position tables; it leaves no trace in the weights
HEAD_WIDTH = 64
_OUTER = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_BLOCK = {
    "x_block": {
        "adaLN_modulation.1": "norm1.linear",
        "attn.proj": "attn.to_out.0",
        "attn.ln_q": "attn.norm_q",
        "attn.ln_k": "attn.norm_k",
        "attn2.proj": "attn2.to_out.0",
        "attn2.ln_q": "attn2.norm_q",
        "attn2.ln_k": "attn2.norm_k",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    "context_block": {
        "adaLN_modulation.1": "norm1_context.linear",
        "attn.proj": "attn.to_add_out",
        "attn.ln_q": "attn.norm_added_q",
        "attn.ln_k": "attn.norm_added_k",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}
_FUSED = {
    ("x_block", "attn.qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("x_block", "attn2.qkv"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ("context_block", "attn.qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def from_original(weights: Mapping[str, Stored]) -> dict[str, Stored]:
    """Returns weights (without `PREFIX`) under diffusers' names, still in their file.

    Raises:
      ValueError: names that are no MM-DiT's.
    """
    last = _depth(weights) - 1
    renamed: dict[str, Stored] = {}
    unknown = []
    for name, weight in weights.items():
        stem, _, leaf = name.rpartition(".")
        if name in _OUTER or stem in _OUTER:
            theirs = _OUTER[name] if name in _OUTER else f"{_OUTER[stem]}.{leaf}"
            renamed[theirs] = _halves_swapped(weight) if stem.startswith("final_layer.adaLN") else weight
            continue
        match = re.fullmatch(r"joint_blocks\.(\d+)\.(x_block|context_block)\.(.+)", stem)
        block, stream, module = match.groups() if match else ("", "", "")
        if (stream, module) in _FUSED:
            for i, part in enumerate(_FUSED[stream, module]):
                renamed[f"transformer_blocks.{block}.{part}.{leaf}"] = _part(weight, i, 3)
        elif module in _BLOCK.get(stream, {}):
            # The text of the last block is only looked at: its modulation is a shift and a scale, theirs the other
            # way round.
            swap = int(block) == last and stream == "context_block" and module.startswith("adaLN")
            theirs = f"transformer_blocks.{block}.{_BLOCK[stream][module]}.{leaf}"
            renamed[theirs] = _halves_swapped(weight) if swap else weight
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"these weights are not those of an MM-DiT: {few(unknown)}")
    return renamed


def network_of(weights: Mapping[str, Any], dtype: Any = jnp.float32) -> MMDiT:
    """Returns the network that weights (without `PREFIX`) are for, by their shapes.

    Raises:
      ValueError: they are not those of an MM-DiT.
    """
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        table = round(weights["pos_embed"].shape[1] ** 0.5)
        context_width = weights["context_embedder.weight"].shape[1]
        pooled_width = weights["y_embedder.mlp.0.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise ValueError(f"these weights are not those of an MM-DiT: {few(sorted(weights))}") from error
    dual = sum(name.endswith(".x_block.attn2.proj.weight") for name in weights)
    return MMDiT(
        width=width,
        depth=_depth(weights),
        num_heads=width // HEAD_WIDTH,
        patch=patch,
        out_channels=channels,
        context_width=context_width,
        pooled_width=pooled_width,
        table_size=table,
        base_size=BASE_SIZE,
        qk_norm=any(".attn.ln_q." in name for name in weights),
        dual_attention=dual,
        dtype=dtype,
    )


def _depth(weights: Mapping[str, Any]) -> int:
    return 1 + max(
        (int(match[1]) for name in weights if (match := re.match(r"joint_blocks\.(\d+)\.", name))), default=-1
    )


def _part(weight: Stored, index: int, count: int) -> Stored:
    """Returns one of `count` equal parts of the first axis."""
    rows = weight.shape[0] // count
    return replace(
        weight,
        shape=(rows, *weight.shape[1:]),
        read=lambda: weight.read()[index * rows : (index + 1) * rows],
    )


def _halves_swapped(weight: Stored) -> Stored:
    half = weight.shape[0] // 2
    return replace(weight, read=lambda: np.roll(weight.read(), half, axis=0))
