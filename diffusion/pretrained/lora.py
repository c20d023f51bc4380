"""Adapters of an MM-DiT or FLUX.2 <-> `pytorch_lora_weights.safetensors`, which diffusers writes and reads.

transformer.transformer_blocks.0.attn.to_q.lora_A.weight  [rank, in]
transformer.transformer_blocks.0.attn.to_q.lora_B.weight  [out, rank]

A weight becomes W + B A. A scale beside it is not in the file's arrays but, in some files, in its header; what is
written here has it in B, so that every reader finds the same product.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from diffusion.networks.flux2 import Flux2
from diffusion.networks.mmdit import MMDiT
from diffusion.pretrained import flux2, mmdit
from diffusion.pretrained.folder import new_folder, read_file, write_weights
from diffusion.pretrained.strict import few

Network = MMDiT | Flux2
FORMS: dict[type, Any] = {MMDiT: mmdit, Flux2: flux2}  # where a network's `shapes` and diffusers' `module_names` are

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
HEADER = "lora_adapter_metadata"  # of the file: settings as JSON, under "transformer.*"
ENDS = {"lora_A.weight": "A", "lora_B.weight": "B"}
# What the header may say, and what it has to be where another value would change the product.
_HONOURED = {"use_dora": False, "use_rslora": False, "lora_bias": False, "fan_in_fan_out": False}


def is_block(name: str) -> bool:
    """Returns whether this is the name of a block of a network, whose modules have adapters."""
    return re.fullmatch(r"(block|double|single)_\d+", name) is not None


def to_diffusers(network: Network, adapters: Mapping[str, Any], scale: float = 1.0) -> dict[str, np.ndarray]:
    """Returns adapters under diffusers' names and in its layouts.

    Args:
      network: what they change.
      adapters: {block: {module: {"A", "B"}}}, see `diffusion.model.lora`.
      scale: of their products.
    """
    weights = {}
    for block, modules in adapters.items():
        for module, pair in modules.items():
            first, second = (np.asarray(pair[name], np.float32) for name in ("A", "B"))
            names = FORMS[type(network)].module_names(block, module)
            fused = len(names) > 1
            for number, name in enumerate(names):
                a, b = (first[:, number], second[number]) if fused else (first, second)
                rank = a.shape[-1]
                weights[f"{PREFIX}{name}.lora_A.weight"] = a.reshape(-1, rank).T
                weights[f"{PREFIX}{name}.lora_B.weight"] = scale * b.reshape(rank, -1).T
    return weights


def from_diffusers(
    network: Network, weights: Mapping[str, Any], scales: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Returns the adapters of `network` in weights of diffusers' form; their scale is 1.

    Args:
      network: what they change.
      weights: arrays by name.
      scales: of products, by the module's name; 1 where it has none.

    Raises:
      ValueError: a name or a shape that is not of such a network's adapters, or half a pair.
    """
    pairs = _pairs(weights)
    form = FORMS[type(network)]
    adapters: dict[str, Any] = {}
    for block, modules in form.shapes(network).items():
        for module, own in modules.items() if is_block(block) else ():
            names = form.module_names(block, module) if "kernel" in own else []
            found = [pairs.pop(name, None) for name in names]
            if any(pair is not None for pair in found):
                numbers = [(scales or {}).get(name, 1.0) for name in names]
                of_heads = module.endswith("_out")
                adapters.setdefault(block, {})[module] = _adapter(own["kernel"].shape, of_heads, names, found, numbers)
    if pairs:
        raise ValueError(f"the network has no {few(sorted(pairs))}: these adapters are of another one")
    return adapters


def _pairs(weights: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns A and B by the names of the modules in the transformer."""
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name in weights:
        end = next((end for end in ENDS if name.endswith(f".{end}")), None)
        if end is None or not name.startswith(PREFIX):
            raise ValueError(
                f"{few([name])} is not of a transformer's LoRA in diffusers' form, {PREFIX}*.lora_A.weight and "
                "lora_B.weight: adapters of text encoders and other forms are not read"
            )
        module = name.removeprefix(PREFIX).removesuffix(f".{end}")
        pairs.setdefault(module, {})[ENDS[end]] = np.asarray(weights[name], np.float32)
    for module, pair in pairs.items():
        if len(pair) != 2 or any(x.ndim != 2 for x in pair.values()) or pair["A"].shape[0] != pair["B"].shape[1]:
            raise ValueError(f"{few([module])}: a lora_A [rank, in] and a lora_B [out, rank] are needed")
    return pairs


def _adapter(
    kernel: tuple[int, ...],
    of_heads: bool,
    names: list[str],
    found: list[dict[str, np.ndarray] | None],
    scales: list[float],
) -> dict[str, np.ndarray]:
    """Returns {"A", "B"} beside a kernel; a query, key or value that has no pair, or of lower rank, gets zeros."""
    rank = max(pair["A"].shape[0] for pair in found if pair is not None)
    fused = len(names) > 1
    # Ours: [in, 3, heads, head], [heads..., head, out] or [in, out...].
    ins = kernel[:-1] if of_heads else kernel[:1]
    outs = kernel[2:] if fused else kernel[len(ins) :]
    first, second = [], []
    for name, pair, scale in zip(names, found, scales, strict=True):
        a, b = np.zeros((rank, np.prod(ins)), np.float32), np.zeros((np.prod(outs), rank), np.float32)
        if pair is not None:
            own = pair["A"].shape[0]
            if pair["A"].shape[1:] != a.shape[1:] or pair["B"].shape[:1] != b.shape[:1]:
                raise ValueError(
                    f"{few([name])}: lora_A {pair['A'].shape} and lora_B {pair['B'].shape} do not fit a layer from "
                    f"{a.shape[1]} to {b.shape[0]}"
                )
            a[:own], b[:, :own] = pair["A"], scale * pair["B"]
        first.append(a.T.reshape(*ins, rank))
        second.append(b.T.reshape(rank, *outs))
    return {"A": np.stack(first, axis=1), "B": np.stack(second)} if fused else {"A": first[0], "B": second[0]}


def load_lora(path: str | os.PathLike, network: Network) -> dict[str, Any]:
    """Returns the adapters of `network` in a file, or in a folder with a `pytorch_lora_weights.safetensors`.

    The scale that the file's header gives them is in B.

    Raises:
      ValueError: it cannot be read, or holds other adapters than those of the network's kernels.
    """
    path = Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: adapters are read from a .safetensors file, or a folder with a {FILE}")
    try:
        weights = read_file(path)
        return from_diffusers(network, weights, _scales(path, _pairs(weights)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _scales(path: Path, pairs: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the scales that a file's header gives its products: alpha / rank."""
    try:
        with safe_open(path, "np") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    own = {name.removeprefix(PREFIX): value for name, value in header.items() if name.startswith(PREFIX)}
    if not own:
        return {}
    if wrong := [name for name, value in _HONOURED.items() if own.get(name, value) != value]:
        raise ValueError(f"{wrong[0]}={own[wrong[0]]!r} cannot be honoured")
    if own.get("rank_pattern") or own.get("alpha_pattern"):
        raise ValueError("ranks or alphas that differ by module cannot be honoured: write the file without a header")
    return {name: own.get("lora_alpha", len(pair["A"])) / own.get("r", len(pair["A"])) for name, pair in pairs.items()}


def save_lora(folder: str | os.PathLike, network: Network, adapters: Mapping[str, Any], scale: float) -> Path:
    """Writes adapters into a new folder for diffusers' `load_lora_weights`, and returns the file's path.

    Raises:
      ValueError: `folder` is there already.
    """
    with new_folder(folder) as temporary:
        write_weights(temporary / FILE, to_diffusers(network, adapters, scale))
    return Path(folder) / FILE
