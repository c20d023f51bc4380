"""CLIP weights <-> transformers' `CLIPModel` and `CLIPTextModelWithProjection`: OpenAI's, OpenCLIP's, those of SD3.

A published folder holds config.json, model.safetensors and, for CLIP itself, the tokenizer's files.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.pictures import one_side
from diffusion.data.text import END, START
from diffusion.networks.clip import ACTIVATIONS, CLIP, ImageTower, TextTower
from diffusion.pretrained.folder import new_folder, read_json, read_weights, resolve, write_json, write_weights
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import check_keys, few, shapes_of, without_memory

# The mean and the standard deviation, by channel, that pixels in [0, 1] are normalised with.
Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]
# Ours -> transformers'. Paths are joined by dots; the leaf's name is changed apart.
_NAMES = [
    (r"text\.token_embedding", "text_model.embeddings.token_embedding"),
    (r"(text|image)\.position", r"\1_model.embeddings.position_embedding"),
    (r"image\.class_token", "image_model.embeddings.class_embedding"),
    (r"image\.patch_embedding", "image_model.embeddings.patch_embedding"),
    (r"image\.norm_in", "image_model.pre_layrnorm"),
    (r"image\.norm_out", "image_model.post_layernorm"),
    (r"text\.norm_out", "text_model.final_layer_norm"),
    (r"(text|image)\.projection", r"\1_projection"),
    (r"(text|image)\.block_(\d+)\.norm_(\d)", r"\1_model.encoder.layers.\2.layer_norm\3"),
    (r"(text|image)\.block_(\d+)\.mlp_(\d)", r"\1_model.encoder.layers.\2.mlp.fc\3"),
    (r"(text|image)\.block_(\d+)\.(q)uery", r"\1_model.encoder.layers.\2.self_attn.\3_proj"),
    (r"(text|image)\.block_(\d+)\.(k)ey", r"\1_model.encoder.layers.\2.self_attn.\3_proj"),
    (r"(text|image)\.block_(\d+)\.(v)alue", r"\1_model.encoder.layers.\2.self_attn.\3_proj"),
    (r"(text|image)\.block_(\d+)\.(out)", r"\1_model.encoder.layers.\2.self_attn.\3_proj"),
    (r"logit_scale", "logit_scale"),
]
_BARE = ("class_embedding", "logit_scale")  # parameters that are not a module's "weight"
# Transformers' defaults, where config.json is silent.
_TEXT = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    eos_token_id=49407,
    projection_dim=512,
)
_IMAGE = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
    num_channels=3,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    projection_dim=512,
)


def to_transformers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `CLIP` (the tree under "params") under transformers' names and in its layouts.

    A tower alone is {"text": its parameters} or {"image": ...}.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path): _to_theirs(path, np.asarray(leaf)) for path, leaf in leaves}


def from_transformers(
    weights: Mapping[str, Any], like: Mapping[str, Any], put: Callable[[Any, np.ndarray], Any] | None = None
) -> dict[str, Any]:
    """Returns transformers' weights as the tree that `to_transformers` takes, in the dtypes they are read in.

    Args:
      weights: arrays by name, read one by one.
      like: such a tree, or its shapes.
      put: (path, array) -> what is kept of it; None: the array.

    Raises:
      ValueError: a key is missing or left over, or a shape differs.
    """
    # A buffer of 0, 1, 2, ... that old files hold.
    weights = {name: weight for name, weight in weights.items() if not name.endswith("embeddings.position_ids")}
    expected = {name: weight.shape for name, weight in to_transformers(without_memory(like)).items()}
    check_keys(weights, expected, "CLIP")

    def take(path: Any, leaf: Any) -> Any:
        array = _to_ours(path, np.asarray(weights[_name(path)]))
        return array if put is None else put(path, array)

    return jax.tree_util.tree_map_with_path(take, like)


def load_clip(folder: str | os.PathLike, dtype: Any = jnp.float32) -> tuple[CLIP, dict[str, Any]]:
    """Returns the network of a published `CLIPModel` and its parameters; `text.read_tokenizer` reads its tokenizer.

    Raises:
      ValueError: a file is missing, it is another kind of model (which is named), or weights do not fit the config.
    """
    folder = resolve(folder)
    config = _config(folder)
    if "text_config" not in config or "vision_config" not in config:
        raise ValueError(f"{folder}: config.json is not of a CLIP with two towers, it lacks text_config, vision_config")
    shared = {"projection_dim": config.get("projection_dim", 512)}
    clip = CLIP(
        _image_tower(config["vision_config"] | shared, dtype), text_tower(config["text_config"] | shared, dtype)
    )
    image = jax.ShapeDtypeStruct((1, *clip.image.height_width, 3), jnp.float32)
    like = shapes_of(clip, image, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return clip, {"params": from_transformers(read_weights(folder, "model"), like)}


def load_text_tower(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    weights_dtype: Any = np.float32,
    variant: str | None = None,
    put: Callable[[Any, np.ndarray], Any] | None = None,
    read: bool = True,
) -> tuple[TextTower, dict[str, Any]]:
    """Returns the same of a published `CLIPTextModelWithProjection`, as in Stable Diffusion 3's text_encoder folders.

    Args:
      folder: of it.
      dtype: what the network computes in.
      weights_dtype: what weights are converted to; None: as they are stored.
      variant: see `folder.read_weights`.
      put: see `from_transformers`; paths begin with "text".
      read: whether arrays are read; else names and shapes in the files are checked, and parameters are zeros that take
        no memory.

    Raises:
      ValueError: as `load_clip`.
    """
    tower = text_network(folder, dtype)
    stored = read_weights(folder, "model", variant, weights_dtype)
    weights = stored if read else without_memory(stored)
    return tower, {"params": from_transformers(weights, text_shapes(tower), put)["text"]}


def text_network(folder: str | os.PathLike, dtype: Any = jnp.float32) -> TextTower:
    """Returns the text tower that a folder's config.json describes; raises ValueError as `load_clip`."""
    return text_tower(_config(resolve(folder)), dtype)


def write_text_tower(folder: Path, tower: TextTower, params: Mapping[str, Any]) -> None:
    """Writes config.json and model.safetensors of a `CLIPTextModelWithProjection` into a folder that is there."""
    weights = to_transformers({"text": params["params"]})
    dtype = weights["text_model.embeddings.token_embedding.weight"].dtype.name
    about = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "dtype": dtype}
    write_json(folder / "config.json", about | _common_config(tower) | _places_and_tokens(tower))
    write_weights(folder / "model.safetensors", weights)


def text_shapes(tower: TextTower) -> dict[str, Any]:
    """Returns {"text": the tree of parameters as shapes}, nothing allocated."""
    return {"text": shapes_of(tower, jax.ShapeDtypeStruct((1, 2), jnp.int32))}


def load_normalisation(folder: str | os.PathLike) -> Normalisation | None:
    """Returns the normalisation of preprocessor_config.json; None where there is none, as in folders for texts alone.

    Raises:
      ValueError: it does not hold image_mean and image_std, three numbers each.
    """
    path = resolve(folder) / "preprocessor_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    try:
        (mean, std) = (_three(settings[name]) for name in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold image_mean and image_std, three numbers each: copy it again") from error
    return mean, std


def save_clip(
    folder: str | os.PathLike,
    clip: CLIP,
    params: Mapping[str, Any],
    tokenizer_json: str,
    normalisation: Normalisation | None = None,
) -> None:
    """Writes a folder that transformers and `load_clip` read, with `normalisation` also how images are prepared.

    Raises:
      ValueError: `folder` is there already, or this CLIP has a bias of the logits, or sees images that are not square,
        which transformers' does not.
    """
    if clip.bias is not None:
        raise ValueError("transformers' CLIPModel has no bias of the logits: train with loss.name=softmax to write it")
    image, text = clip.image, clip.text
    side = one_side(image.image_size, "images of transformers' CLIPModel")
    sizes = {"image_size": side, "patch_size": image.patch_size, "num_channels": 3}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image.projection,
        "vision_config": {"model_type": "clip_vision_model"} | _common_config(image) | sizes,
        "text_config": {"model_type": "clip_text_model"} | _common_config(text) | _places_and_tokens(text),
    }
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_weights(temporary / "model.safetensors", to_transformers(params["params"]))
        (temporary / "tokenizer.json").write_text(tokenizer_json, "utf-8")
        # Without this, transformers splits words as OpenAI's vocabulary wants it, whatever tokenizer.json says.
        reader = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "model_max_length": text.length}
        write_json(temporary / "tokenizer_config.json", reader | dict.fromkeys(("eos_token", "pad_token"), END))
        if normalisation:
            write_json(temporary / "preprocessor_config.json", _preprocessor(side, normalisation))


def text_tower(config: Mapping[str, Any], dtype: Any = jnp.float32) -> TextTower:
    """Returns the text tower that a text_config describes; raises ValueError for what our tower cannot be."""
    config = {**_TEXT, **config}
    end = config["eos_token_id"]
    return TextTower(
        **_common(config, dtype),
        vocabulary_size=config["vocab_size"],
        # A 2 is older than that field's meaning: the end is the largest token then.
        end_of_text=config["vocab_size"] - 1 if end == 2 else end,
        length=config["max_position_embeddings"],
    )


def text_tower_of(weights: Mapping[str, Any], activation: str, dtype: Any = jnp.float32) -> TextTower:
    """Returns the text tower that weights in transformers' names are for, with heads 64 wide.

    Raises:
      ValueError: they are not those of a `CLIPTextModelWithProjection`.
    """
    layers = {match[1] for name in weights if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    embeddings = "text_model.embeddings"
    names = (f"{embeddings}.token_embedding", f"{embeddings}.position_embedding", "text_projection")
    names = (*names, "text_model.encoder.layers.0.mlp.fc1")
    if missing := [name for name in names if f"{name}.weight" not in weights]:
        raise ValueError(f"these are not the weights of a CLIPTextModelWithProjection: they lack {few(missing)}")
    table, position, projection, hidden = (weights[f"{name}.weight"].shape for name in names)
    return TextTower(
        vocabulary_size=table[0],
        end_of_text=table[0] - 1,
        length=position[0],
        width=table[1],
        num_layers=len(layers),
        num_heads=max(table[1] // 64, 1),
        mlp_width=hidden[0],
        projection=projection[0],
        activation=activation,
        dtype=dtype,
    )


def _config(folder: Path) -> dict[str, Any]:
    """Returns the content of config.json; raises ValueError, naming what is there instead."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"cannot read {path}: {folder} is {identify(folder)}; needed is the folder of a CLIPModel")
    return read_json(path)


def _image_tower(config: Mapping[str, Any], dtype: Any) -> ImageTower:
    config = {**_IMAGE, **config}
    return ImageTower(**_common(config, dtype), image_size=config["image_size"], patch_size=config["patch_size"])


def _common_config(tower: ImageTower | TextTower) -> dict[str, Any]:
    """Returns transformers' settings of either tower."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": 1e-5,
        "projection_dim": tower.projection,
    }


def _places_and_tokens(tower: TextTower) -> dict[str, Any]:
    """Returns transformers' settings of a text tower alone."""
    places = {"vocab_size": tower.vocabulary_size, "max_position_embeddings": tower.length}
    return places | {"eos_token_id": tower.end_of_text, "bos_token_id": 0, "pad_token_id": tower.end_of_text}


def _three(numbers: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, numbers)
    return red, green, blue


def _preprocessor(size: int, normalisation: Normalisation) -> dict[str, Any]:
    mean, std = normalisation
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _common(config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    if config["hidden_act"] not in ACTIVATIONS or config["layer_norm_eps"] != 1e-5:
        raise ValueError(
            f"config.json asks for {config['hidden_act']} and layer norms of {config['layer_norm_eps']}: ours "
            f"have {' or '.join(ACTIVATIONS)}, and 1e-05"
        )
    return dict(
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        projection=config["projection_dim"],
        activation=config["hidden_act"],
        dtype=dtype,
    )


def _name(path: Any) -> str:
    """Returns transformers' name of the parameter at `path`."""
    *modules, leaf = (key.key for key in path)
    whole = leaf in ("position", "class_token", "logit_scale")
    ours = ".".join([*modules, leaf] if whole else modules)
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, ours):
            name = re.sub(pattern, replacement, ours).replace("image_model", "vision_model")
            name = name.replace("image_projection", "visual_projection")
            return name if name.endswith(_BARE) else f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
    raise ValueError(f"transformers' CLIPModel has no {ours}")


def _to_theirs(path: Any, weight: np.ndarray) -> np.ndarray:
    if path[-1].key != "kernel":
        return weight
    if path[-2].key == "patch_embedding":
        rows, width = weight.shape
        patch = round((rows / 3) ** 0.5)
        return weight.reshape(patch, patch, 3, width).transpose(3, 2, 0, 1)
    return weight.T


def _to_ours(path: Any, weight: np.ndarray) -> np.ndarray:
    if path[-1].key != "kernel":
        return weight
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]) if weight.ndim == 4 else weight.T
