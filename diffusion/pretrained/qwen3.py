"""Qwen3 <-> transformers' `Qwen3ForCausalLM` or `Qwen3Model`, as FLUX.2 [klein] has it in text_encoder.

A published folder holds config.json and model.safetensors, whole or in shards. Of it only the embedding and the layers
up to the last hidden state that is asked for are read, unless the network is `whole`.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.qwen3 import Qwen3
from diffusion.pretrained.config_fields import check_counts
from diffusion.pretrained.folder import new_folder, read_json, read_weights, resolve, write_json
from diffusion.pretrained.identify import identify
from diffusion.pretrained.shards import LARGEST, write_sharded
from diffusion.pretrained.strict import check_keys, few, shapes_of, without_memory

Put = Callable[[Any, np.ndarray], Any]
STATES = (9, 18, 27)  # that FLUX.2 [klein] reads
CAUSAL, ALONE = "Qwen3ForCausalLM", "Qwen3Model"  # classes: with a head, whose names begin with "model.", and without
_PREFIX, _HEAD = "model.", "lm_head.weight"
# Ours -> transformers'.
_MODULES = {
    "norm_1": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "norm_query": "self_attn.q_norm",
    "norm_key": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "norm_2": "post_attention_layernorm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_1": "mlp.up_proj",
    "mlp_2": "mlp.down_proj",
}
_OTHERS = {"token_embedding": "model.embed_tokens.weight", "norm_out": "model.norm.weight", "head": _HEAD}
# Fields of config.json: transformers' -> ours, with transformers' defaults where config.json is silent.
_SIZES = {
    "vocab_size": ("vocab_size", 151936),
    "hidden_size": ("width", 4096),
    "num_hidden_layers": ("depth", 32),
    "num_attention_heads": ("num_heads", 32),
    "num_key_value_heads": ("num_kv_heads", 32),
    "head_dim": ("head_width", 128),
    "intermediate_size": ("mlp_width", 22016),
}
# What ours is, which config.json has to say or leave at transformers' defaults.
_FIXED: dict[str, tuple[Any, Any]] = {
    "model_type": ("qwen3", "qwen3"),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "use_sliding_window": (False, False),
    "rope_scaling": (None, None),
}


def shapes(encoder: Qwen3) -> dict[str, Any]:
    """Returns the tree of parameters as shapes (the one under "params"), nothing allocated."""
    encoder.check()
    short = encoder.clone(depth=2, states=(1,))  # all layers are of one shape, and tracing each takes a while
    found = shapes_of(short, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    layers = {f"layer_{i}": found["layer_0"] for i in range(encoder.depth if encoder.whole else encoder.states[-1])}
    return {name: leaf for name, leaf in found.items() if not name.startswith("layer_")} | layers


def to_transformers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `Qwen3` (the tree under "params") as `Qwen3ForCausalLM` names and lays them out."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path): _to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def from_transformers(weights: Mapping[str, Any], like: Mapping[str, Any], put: Put | None = None) -> dict[str, Any]:
    """Returns transformers' weights as the tree that `to_transformers` takes, in the dtypes they are read in.

    Args:
      weights: arrays by name, of either class, read one by one; those of later layers, of the last norm and of the
        head may be there whether `like` has them or not.
      like: such a tree, or its `shapes`.
      put: (path, array) -> what is kept of it: an array on a device, so that the whole is never on the host; None:
        the array.

    Raises:
      ValueError: a key is missing or left over, a shape differs, or a whole network without a head of its own is given
        one that is not its table of tokens.
    """
    expected = {name: weight.shape for name, weight in to_transformers(without_memory(like)).items()}
    if not any(name.startswith(_PREFIX) for name in weights):
        weights = {name if name == _HEAD else _PREFIX + name: weight for name, weight in weights.items()}
    table = _OTHERS["token_embedding"]
    check_keys(weights, expected, "Qwen3", _not_run(weights, expected))
    spare = "norm_out" in like and "head" not in like and _HEAD in weights
    if spare and not np.array_equal(np.asarray(weights[_HEAD]), np.asarray(weights[table])):
        raise ValueError(f"{_HEAD} and {table} differ, and config.json has one for both: download the file again")

    def take(path: Any, leaf: Any) -> Any:
        array = _from_torch(path, np.asarray(weights[_name(path)]), leaf.shape)
        return array if put is None else put(path, array)

    return jax.tree_util.tree_map_with_path(take, like)


def load_qwen3(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    states: tuple[int, ...] = STATES,
    whole: bool = False,
    weights_dtype: Any = np.float32,
    variant: str | None = None,
    put: Put | None = None,
    read: bool = True,
) -> tuple[Qwen3, dict[str, Any]]:
    """Returns the network of a published Qwen3 and its parameters.

    Args:
      folder: of it.
      dtype: what the network computes in.
      states: hidden states that it returns.
      whole: whether parameters that these do not need are read too.
      weights_dtype: what weights are converted to; None: as they are stored.
      variant: see `folder.read_weights`.
      put: see `from_transformers`.
      read: whether arrays are read; else the names and shapes in the files are checked, and the parameters are zeros
        that take no memory.

    Raises:
      ValueError: a file is missing, it is another kind of model (which is named), or weights do not fit the config.
    """
    encoder = network(folder, dtype, states=states, whole=whole)
    stored = read_weights(folder, "model", variant, weights_dtype)
    weights = stored if read else without_memory(stored)
    return encoder, {"params": from_transformers(weights, shapes(encoder), put)}


def network(
    folder: str | os.PathLike, dtype: Any = jnp.float32, *, states: tuple[int, ...] = STATES, whole: bool = False
) -> Qwen3:
    """Returns the network that a folder's config.json describes; arguments and ValueError as `load_qwen3`."""
    folder = resolve(folder)
    path = folder / "config.json"
    config = read_json(path) if path.exists() else {}
    if config.get("model_type") != "qwen3":
        raise ValueError(f"{folder} is {identify(folder)}; needed is that of a {CAUSAL}, with its config.json")
    for name, (needed, default) in _FIXED.items():
        if (found := config.get(name, default)) != needed:
            raise ValueError(f"{path} has {name}={few([str(found)])}: ours is a Qwen3 with {needed}")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{path} has layers of another kind than full_attention, which ours does not have")
    sizes = {name: config.get(name, default) for name, (_, default) in _SIZES.items()}
    try:
        check_counts(sizes)
        theta, epsilon = _theta(config), _number("rms_norm_eps", config.get("rms_norm_eps", 1e-6))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not states or max(states) >= sizes["num_hidden_layers"]:
        raise ValueError(
            f"{path}: {sizes['num_hidden_layers']} layers have no hidden states {tuple(states)} before the last one"
        )
    return Qwen3(
        **{_SIZES[name][0]: size for name, size in sizes.items()},
        theta=theta,
        epsilon=epsilon,
        states=tuple(states),
        whole=whole,
        tied=bool(config.get("tie_word_embeddings", False)) or config.get("architectures") == [ALONE],
        dtype=dtype,
    )


def save_qwen3(folder: str | os.PathLike, encoder: Qwen3, params: Mapping[str, Any], largest: int = LARGEST) -> None:
    """Writes a folder that transformers and `load_qwen3` read, in the dtypes of `params`.

    Args:
      folder: to be made.
      encoder: whose config is written.
      params: {"params": its parameters}.
      largest: bytes of a file, see `write_sharded`.

    Raises:
      ValueError: `folder` is there already, or the network is not `whole`.
    """
    with new_folder(folder) as temporary:
        write_qwen3(temporary, encoder, params, largest)


def write_qwen3(folder: Path, encoder: Qwen3, params: Mapping[str, Any], largest: int = LARGEST) -> None:
    """Writes config.json and weights into a folder that is there; see `save_qwen3`."""
    if not encoder.whole:
        raise ValueError("layers that were left out cannot be written: read the published folder with whole=True")
    weights = to_transformers(params["params"])
    config: dict[str, Any] = {theirs: getattr(encoder, ours) for theirs, (ours, _) in _SIZES.items()}
    config |= {name: needed for name, (needed, _) in _FIXED.items()}
    config |= {"architectures": [CAUSAL], "tie_word_embeddings": encoder.tied, "rms_norm_eps": encoder.epsilon}
    config |= {"rope_theta": encoder.theta, "max_position_embeddings": 40960}
    config |= {"dtype": weights[_OTHERS["token_embedding"]].dtype.name}
    write_json(folder / "config.json", config)
    write_sharded(folder, "model", weights, largest)


def _theta(config: Mapping[str, Any]) -> float:
    """Returns the base of the rotations, which transformers 4 writes as a field, and 5 in `rope_parameters`."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters has rope_type={few([str(rope['rope_type'])])}: ours is the default one")
    return _number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _number(name: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise ValueError(f"{name} is {few([str(number)])}, not a number above 0")
    return float(number)


def _not_run(weights: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a published model has beside the layers that are read, where it is there."""
    found = {}
    for name in weights.keys() - expected.keys():
        if name == _HEAD:
            found[name] = expected[_OTHERS["token_embedding"]]
        elif name == _OTHERS["norm_out"]:
            found[name] = expected[_OTHERS["token_embedding"]][1:]
        elif match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            if f"model.layers.{match[1]}.input_layernorm.weight" in expected:
                continue  # of a layer that is run: left over
            if (shape := expected.get(f"model.layers.0.{match[2]}")) is not None:
                found[name] = shape
    return found


def _name(path: Any) -> str:
    """Returns transformers' name of the parameter at `path`."""
    first, *rest = (key.key for key in path)
    if not first.startswith("layer_"):
        return _OTHERS[first]
    return f"model.layers.{first.removeprefix('layer_')}.{_MODULES[rest[0]]}.weight"


def _to_torch(path: Any, weight: np.ndarray) -> np.ndarray:
    """Returns a kernel as [out, in], of all heads together."""
    if path[-1].key != "kernel":
        return weight
    return weight.reshape(-1, weight.shape[-1]).T if path[-2].key == "out" else weight.reshape(len(weight), -1).T


def _from_torch(path: Any, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return weight.T.reshape(shape) if path[-1].key == "kernel" else weight
