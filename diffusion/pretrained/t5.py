"""T5 v1.1's encoder <-> transformers' `T5EncoderModel`, as Stable Diffusion 3 has it in text_encoder_3.

A published folder holds config.json and model.safetensors, whole or in shards. A Stable Diffusion 3 in one file has the
same names behind `SINGLE_FILE`.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.t5 import T5Encoder
from diffusion.pretrained.config_fields import check_counts
from diffusion.pretrained.folder import new_folder, read_json, read_weights, resolve, write_json, write_weights
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import check_keys, few, shapes_of, without_memory

SINGLE_FILE = "text_encoders.t5xxl.transformer."
# Ours -> transformers'.
_MODULES = {
    "query": "layer.0.SelfAttention.q",
    "key": "layer.0.SelfAttention.k",
    "value": "layer.0.SelfAttention.v",
    "out": "layer.0.SelfAttention.o",
    "norm_1": "layer.0.layer_norm",
    "mlp_gate": "layer.1.DenseReluDense.wi_0",
    "mlp_1": "layer.1.DenseReluDense.wi_1",
    "mlp_2": "layer.1.DenseReluDense.wo",
    "norm_2": "layer.1.layer_norm",
}
_TABLE, _TIED = "shared.weight", "encoder.embed_tokens.weight"  # one table by two names, either of which may be absent
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_OTHERS = {"token_embedding": _TABLE, "relative_bias": _BIAS, "norm_out": "encoder.final_layer_norm.weight"}
# Fields of config.json: transformers' -> ours, with transformers' defaults where config.json is silent.
_SIZES = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("width", 512),
    "num_layers": ("depth", 6),
    "num_heads": ("num_heads", 8),
    "d_kv": ("head_width", 64),
    "d_ff": ("mlp_width", 2048),
    "relative_attention_num_buckets": ("num_buckets", 32),
    "relative_attention_max_distance": ("max_distance", 128),
}
# What ours is, which config.json has to say or leave at transformers' defaults.
_FIXED = {"model_type": ("t5", "t5"), "feed_forward_proj": ("gated-gelu", "relu"), "layer_norm_epsilon": (1e-6, 1e-6)}


def shapes(encoder: T5Encoder) -> dict[str, Any]:
    """Returns the tree of parameters as shapes (the one under "params"), nothing allocated."""
    return shapes_of(encoder, jax.ShapeDtypeStruct((1, 1), jnp.int32))


def to_transformers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `T5Encoder` (the tree under "params") under transformers' names and in its layouts."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path): _transposed(path, np.asarray(leaf)) for path, leaf in leaves}


def from_transformers(
    weights: Mapping[str, Any], like: Mapping[str, Any], put: Callable[[Any, np.ndarray], Any] | None = None
) -> dict[str, Any]:
    """Returns transformers' weights as the tree that `to_transformers` takes, in the dtypes they are read in.

    Args:
      weights: arrays by name, read one by one.
      like: such a tree, or its `shapes`.
      put: (path, array) -> what is kept of it: an array on a device, so that the whole is never on the host; None:
        the array.

    Raises:
      ValueError: a key is missing or left over, a shape differs, or the two names of the tokens' table disagree.
    """
    expected = {name: weight.shape for name, weight in to_transformers(without_memory(like)).items()}
    weights = dict(weights)
    if (tied := weights.pop(_TIED, None)) is not None and not _same(weights.setdefault(_TABLE, tied), tied):
        raise ValueError(f"{_TABLE} and {_TIED} differ, and ours is one table: download the file again")
    check_keys(weights, expected, "T5 encoder")

    def take(path: Any, leaf: Any) -> Any:
        array = _transposed(path, np.asarray(weights[_name(path)]))
        return array if put is None else put(path, array)

    return jax.tree_util.tree_map_with_path(take, like)


def load_t5(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    weights_dtype: Any = np.float32,
    variant: str | None = None,
    put: Callable[[Any, np.ndarray], Any] | None = None,
    read: bool = True,
) -> tuple[T5Encoder, dict[str, Any]]:
    """Returns the network of a published `T5EncoderModel` and its parameters.

    Args:
      folder: of it.
      dtype: what the network computes in.
      weights_dtype: what weights are converted to; None: as they are stored.
      variant: see `folder.read_weights`.
      put: see `from_transformers`.
      read: whether arrays are read; else names and shapes in the files are checked, and parameters are zeros that take
        no memory.

    Raises:
      ValueError: a file is missing, it is another kind of model (which is named), or weights do not fit the config.
    """
    encoder = network(folder, dtype)
    stored = read_weights(folder, "model", variant, weights_dtype)
    weights = stored if read else without_memory(stored)
    return encoder, {"params": from_transformers(weights, shapes(encoder), put)}


def network(folder: str | os.PathLike, dtype: Any = jnp.float32) -> T5Encoder:
    """Returns the network that a folder's config.json describes; raises ValueError as `load_t5`."""
    folder = resolve(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"cannot read {path}: {folder} is {identify(folder)}; needed is that of a T5EncoderModel")
    config = read_json(path)
    for name, (needed, default) in _FIXED.items():
        if (found := config.get(name, default)) != needed:
            raise ValueError(f"{path} has {name}={few([str(found)])}: ours is a T5 v1.1 encoder, with {needed}")
    sizes = {name: config.get(name, default) for name, (_, default) in _SIZES.items()}
    try:
        check_counts(sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return T5Encoder(**{_SIZES[name][0]: size for name, size in sizes.items()}, dtype=dtype)


def save_t5(folder: str | os.PathLike, encoder: T5Encoder, params: Mapping[str, Any]) -> None:
    """Writes a folder that transformers and `load_t5` read, in the dtypes of `params`.

    Raises:
      ValueError: `folder` is there already.
    """
    with new_folder(folder) as temporary:
        write_t5(temporary, encoder, params)


def write_t5(folder: Path, encoder: T5Encoder, params: Mapping[str, Any]) -> None:
    """Writes config.json and model.safetensors into a folder that is there."""
    weights = to_transformers(params["params"])
    config: dict[str, Any] = {theirs: getattr(encoder, ours) for theirs, (ours, _) in _SIZES.items()}
    config |= {name: needed for name, (needed, _) in _FIXED.items()}
    config |= {"architectures": ["T5EncoderModel"], "is_encoder_decoder": True, "tie_word_embeddings": False}
    config |= {"pad_token_id": 0, "eos_token_id": 1, "dtype": weights[_TABLE].dtype.name}
    write_json(folder / "config.json", config)
    write_weights(folder / "model.safetensors", weights)


def encoder_of(weights: Mapping[str, Any], dtype: Any = jnp.float32) -> T5Encoder:
    """Returns the network that weights without a config are for, as those of a single file: heads are 64 wide there.

    Raises:
      ValueError: they are not those of a T5 v1.1.
    """
    blocks = {int(match[1]) for name in weights if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    table = weights.get(_TABLE, weights.get(_TIED))
    hidden, bias = weights.get("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"), weights.get(_BIAS)
    query = weights.get("encoder.block.0.layer.0.SelfAttention.q.weight")
    if table is None or hidden is None or bias is None or query is None:
        raise ValueError(f"these are not the weights of a T5 v1.1 encoder: {few(sorted(weights))}")
    (vocab_size, width), (num_buckets, num_heads) = table.shape, bias.shape
    return T5Encoder(
        vocab_size=vocab_size,
        width=width,
        depth=len(blocks),
        num_heads=num_heads,
        head_width=query.shape[0] // num_heads,
        mlp_width=hidden.shape[0],
        num_buckets=num_buckets,
        dtype=dtype,
    )


def _name(path: Any) -> str:
    """Returns transformers' name of the parameter at `path`."""
    first, *rest = (key.key for key in path)
    if not first.startswith("block_"):
        return _OTHERS[first]
    return f"encoder.block.{first.removeprefix('block_')}.{_MODULES[rest[0]]}.weight"


def _transposed(path: Any, weight: np.ndarray) -> np.ndarray:
    return weight.T if path[-1].key == "kernel" else weight


def _same(one: Any, other: Any) -> bool:
    return one is other or np.array_equal(np.asarray(one), np.asarray(other))
