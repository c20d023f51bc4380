"""The three text encoders of a published Stable Diffusion 3, each with its tokenizer: from its folder and back.

text_encoder, tokenizer      "clip_l"  CLIP-L
text_encoder_2, tokenizer_2  "clip_g"  OpenCLIP bigG
text_encoder_3, tokenizer_3  "t5"      T5 v1.1 XXL

Each may be absent from model_index.json, or null there.
"""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from diffusion.data import sentencepiece, text
from diffusion.networks.clip import TextTower
from diffusion.networks.t5 import T5Encoder
from diffusion.pretrained import clip, t5
from diffusion.pretrained.folder import read_json, resolve, write_json
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import few

Put = Callable[[Any, np.ndarray], Any]
# Ours -> the suffix of the folders' names, the class in model_index.json, and what names begin with in a single file.
PARTS = {
    "clip_l": ("", "CLIPTextModelWithProjection", "text_encoders.clip_l.transformer."),
    "clip_g": ("_2", "CLIPTextModelWithProjection", "text_encoders.clip_g.transformer."),
    "t5": ("_3", "T5EncoderModel", t5.SINGLE_FILE),
}
_TABLE, _PROJECTION = "text_model.embeddings.token_embedding.weight", "text_projection.weight"
_ACTIVATIONS = {"clip_l": "quick_gelu", "clip_g": "gelu"}


class Tower(NamedTuple):
    """A text encoder and what it reads.

    Attributes:
      module: the network.
      params: its parameters, {"params": ...}; None where they are elsewhere.
      tokenizer: its texts' ids.
      padding: the id behind the end of a text.
    """

    module: TextTower | T5Encoder
    params: Any
    tokenizer: Tokenizer
    padding: int


def read_towers(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    weights_dtype: Any = np.float32,
    variant: str | None = None,
    leave_out: Collection[str] = (),
    put: Put | None = None,
    weights: bool = True,
) -> dict[str, Tower]:
    """Returns the text encoders that the folder of a StableDiffusion3Pipeline has, by their names in `PARTS`.

    Args:
      folder: with model_index.json.
      dtype: what the networks compute in.
      weights_dtype: what weights are converted to; None: as they are stored.
      variant: see `folder.read_weights`.
      leave_out: names of encoders that are not to be read.
      put: see `t5.from_transformers`.
      weights: whether they are read; else their files are checked, and the parameters are None.

    Raises:
      ValueError: another kind of folder (which is named); a part that model_index.json has is missing, damaged or of
        another class; a tokenizer that does not belong to its encoder. No weights have been read by then.
    """
    folder = resolve(folder)
    found = _parts_of(folder, leave_out)
    if not found:
        raise ValueError(f"{folder} has no text encoder" + (f" but {few(leave_out)}" if leave_out else ""))
    words, modules = {}, {}
    for name, suffix in found.items():
        words[name] = read_tokenizer(name, folder / f"tokenizer{suffix}")
        network = t5.network if name == "t5" else clip.text_network
        modules[name] = network(folder / f"text_encoder{suffix}", dtype)
        _check_tokenizer(f"{folder}/tokenizer{suffix}", modules[name], words[name][0])
    towers = {}
    for name, suffix in found.items():
        load = t5.load_t5 if name == "t5" else clip.load_text_tower
        path = folder / f"text_encoder{suffix}"
        _, params = load(path, dtype, weights_dtype=weights_dtype, variant=variant, put=put, read=weights)
        towers[name] = Tower(modules[name], params if weights else None, *words[name])
    return towers


def read_tokenizer(name: str, folder: str | os.PathLike) -> tuple[Tokenizer, int]:
    """Returns the tokenizer in the folder of one, for the encoder `name`, and the id that it pads with.

    Raises:
      ValueError: it is missing, damaged or of another kind.
    """
    if name == "t5":
        tokenizer = sentencepiece.read_tokenizer(folder)
        default = sentencepiece.padding_of(tokenizer)
    else:
        tokenizer = text.read_tokenizer(folder)
        default = text.end_of_text(tokenizer)
    padding = text.read_padding(folder, tokenizer)
    return tokenizer, default if padding is None else padding


def write_towers(folder: Path, towers: Mapping[str, Tower]) -> dict[str, list[str | None]]:
    """Writes the encoders and tokenizers into the folder of a pipeline that is there; returns model_index.json's part.

    The weights are written in the dtypes that they have.
    """
    index: dict[str, list[str | None]] = {}
    for name, (suffix, kind, _) in PARTS.items():
        encoder, words = f"text_encoder{suffix}", f"tokenizer{suffix}"
        index |= {encoder: [None, None], words: [None, None]}
        if name not in towers:
            continue
        tower = towers[name]
        for part in (encoder, words):
            (folder / part).mkdir()
        if isinstance(tower.module, T5Encoder):
            t5.write_t5(folder / encoder, tower.module, tower.params)
        else:
            clip.write_text_tower(folder / encoder, tower.module, tower.params)
        index |= {encoder: ["transformers", kind], words: ["transformers", _write_tokenizer(folder / words, tower)]}
    return index


def towers_of_file(
    weights: Mapping[str, Any],
    tokenizers: Mapping[str, tuple[Tokenizer, int]],
    dtype: Any = jnp.float32,
    put: Put | None = None,
) -> dict[str, Tower]:
    """Returns the text encoders of the single-file form, which holds no settings: shapes say what they are.

    Args:
      weights: of the file; names of other networks are not looked at.
      tokenizers: of `read_tokenizer`, for each encoder that is wanted; the file has none.
      dtype: what the networks compute in.
      put: see `t5.from_transformers`.

    Raises:
      ValueError: weights of a wanted encoder are missing or do not fit, or a tokenizer is not theirs.
    """
    towers = {}
    for name, (tokenizer, padding) in tokenizers.items():
        prefix = PARTS[name][-1]
        own = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
        if not own:
            raise ValueError(f"the file has no {prefix}*: read {name} from another, or leave it out")
        if name == "t5":
            module = t5.encoder_of(own, dtype)
            params = t5.from_transformers(own, t5.shapes(module), put)
        else:
            if name == "clip_l" and _TABLE in own:
                # SD3 reads CLIP-L's pooled vector as it is, whatever projection the file has; folders say it so.
                own[_PROJECTION] = np.eye(own[_TABLE].shape[-1], dtype=np.float32)
            module = clip.text_tower_of(own, _ACTIVATIONS[name], dtype)
            params = clip.from_transformers(own, clip.text_shapes(module), put)["text"]
        _check_tokenizer(f"the tokenizer of {name}", module, tokenizer)
        towers[name] = Tower(module, {"params": params}, tokenizer, padding)
    return towers


def _parts_of(folder: Path, leave_out: Collection[str]) -> dict[str, str]:
    """Returns the suffix of each encoder's folders; raises ValueError for what model_index.json should not say."""
    if unknown := [name for name in leave_out if name not in PARTS]:
        raise ValueError(f"no text encoder is called {few(unknown)}: choose from {', '.join(PARTS)}")
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        raise ValueError(f"{folder} is {identify(folder)}; needed is the folder of a StableDiffusion3Pipeline")
    found = {}
    for name, (suffix, kind, _) in PARTS.items():
        encoder, words = (_class_of(path, index, f"{part}{suffix}") for part in ("text_encoder", "tokenizer"))
        if encoder is None or name in leave_out:
            continue
        if encoder != kind:
            raise ValueError(f"{path}: text_encoder{suffix} is a {few([encoder])}, needed is a {kind}")
        if words is None:
            raise ValueError(
                f"{path} has text_encoder{suffix} and no tokenizer{suffix}: copy the published folder whole"
            )
        for part in ("text_encoder", "tokenizer"):
            if not (folder / f"{part}{suffix}").is_dir():
                raise ValueError(f"{folder} lacks {part}{suffix}: copy it there, or make it null in model_index.json")
        found[name] = suffix
    return found


def _class_of(path: Path, index: Mapping[str, Any], part: str) -> str | None:
    match index.get(part):
        case None | [None, None]:
            return None
        case [str(), str(kind)]:
            return kind
    raise ValueError(f"{path}: {part} is not a library and a class: copy the published folder whole")


def _check_tokenizer(where: str, module: TextTower | T5Encoder, tokenizer: Tokenizer) -> None:
    try:
        if isinstance(module, T5Encoder):
            sentencepiece.check_vocabulary(tokenizer, module.vocab_size)
        else:
            text.check_vocabulary(tokenizer, module.vocabulary_size, module.end_of_text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _write_tokenizer(folder: Path, tower: Tower) -> str:
    """Writes a tokenizer, and returns the class that reads it in transformers."""
    tokenizer, padding = tower.tokenizer, tower.tokenizer.id_to_token(tower.padding)
    if isinstance(tower.module, T5Encoder):
        whole, kind = sentencepiece.to_json(tokenizer), "T5TokenizerFast"
        tokens = {"eos_token": sentencepiece.END, "unk_token": "<unk>", "model_max_length": 512}
    else:
        whole, kind = text.to_json(tokenizer), "CLIPTokenizer"
        if tokenizer.model.end_of_word_suffix:
            tokenizer.model.save(str(folder))  # vocab.json and merges.txt, as published
        else:  # one of our own, which transformers' CLIPTokenizer would split as OpenAI's
            kind = "PreTrainedTokenizerFast"
        tokens = {"bos_token": text.START, "eos_token": text.END, "model_max_length": tower.module.length}
        tokens["unk_token"] = text.END
    (folder / "tokenizer.json").write_text(whole, "utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": kind, "pad_token": padding} | tokens)
    return kind
