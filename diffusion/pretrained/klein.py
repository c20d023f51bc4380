"""A published FLUX.2 [klein]: the folder of its pipeline, distilled or not.

model_index.json, scheduler/, text_encoder/, tokenizer/, transformer/ and vae/
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from diffusion.networks.flux2 import Flux2
from diffusion.networks.qwen3 import Qwen3
from diffusion.pretrained import flux2, flux2_config, qwen3, vae
from diffusion.pretrained.flow_scheduler import SCHEDULER, read_flow_scheduler, write_flow_scheduler
from diffusion.pretrained.folder import new_folder, read_json, resolve, write_json
from diffusion.pretrained.identify import identify
from diffusion.pretrained.shards import LARGEST
from diffusion.pretrained.strict import few
from diffusion.pretrained.vae import PublishedAutoencoder

CLASS = "Flux2KleinPipeline"
# What each part has to be, in diffusers' and transformers' names; for some, any of several.
_PARTS = {
    "scheduler": (SCHEDULER,),
    "text_encoder": (qwen3.CAUSAL,),
    "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
    "transformer": (flux2_config.CLASS,),
    "vae": (vae.FLUX2,),
}


class Klein(NamedTuple):
    """A whole pipeline.

    Attributes:
      network: the transformer.
      params: its parameters, {"params": ...}.
      autoencoder: of its latents.
      encoder: of its text, `whole`.
      encoder_params: its parameters, {"params": ...}.
      tokenizer: of the encoder.
      padding: the id that it pads with.
      distilled: to few steps without guidance.
    """

    network: Flux2
    params: dict[str, Any]
    autoencoder: PublishedAutoencoder
    encoder: Qwen3
    encoder_params: dict[str, Any]
    tokenizer: Tokenizer
    padding: int
    distilled: bool


def read_index(folder: str | os.PathLike) -> bool:
    """Returns whether a pipeline is distilled to few steps without guidance.

    Raises:
      ValueError: the folder is not a pipeline's (what it is is named), a part is of another class, or its scheduler
        steps as ours does not.
    """
    root = resolve(folder)
    path = root / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    if index.get("_class_name") != CLASS:
        raise ValueError(f"{folder} is {identify(root)}; needed is the folder of a {CLASS}")
    for part, classes in _PARTS.items():
        match index.get(part):
            case [str(), str(kind)] if kind in classes:
                continue
            case found:
                raise ValueError(f"{path}: {part} is {few([str(found)])}, needed is a {classes[0]}")
    distilled = index.get("is_distilled", False)
    if not isinstance(distilled, bool):
        raise ValueError(f"{path}: is_distilled is {few([str(distilled)])}, neither true nor false")
    read_flow_scheduler(root, {"use_dynamic_shifting": (True,), "time_shift_type": ("exponential",)})
    return distilled


def save_pipeline(folder: str | os.PathLike, pipeline: Klein, largest: int = LARGEST) -> None:
    """Writes a folder that diffusers and ours read, in the dtypes of the parameters.

    Args:
      folder: to be made.
      pipeline: what is written.
      largest: bytes of a file, see `write_sharded`.

    Raises:
      ValueError: `folder` is there already, or layers of the text encoder were left out.
    """
    with new_folder(folder) as temporary:
        for part in ("text_encoder", "tokenizer", "transformer"):
            (temporary / part).mkdir()
        qwen3.write_qwen3(temporary / "text_encoder", pipeline.encoder, pipeline.encoder_params, largest)
        _write_tokenizer(temporary / "tokenizer", pipeline.tokenizer, pipeline.padding)
        flux2.write_flux2(temporary / "transformer", pipeline.network, pipeline.params, largest)
        vae.save_vae(temporary / "vae", pipeline.autoencoder)
        write_flow_scheduler(temporary, use_dynamic_shifting=True, shift=3.0)
        libraries = {part: "transformers" if part in ("text_encoder", "tokenizer") else "diffusers" for part in _PARTS}
        index = {part: [libraries[part], classes[0]] for part, classes in _PARTS.items()}
        index |= {"_class_name": CLASS, "is_distilled": pipeline.distilled}
        write_json(temporary / "model_index.json", index)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, padding: int) -> None:
    """Writes tokenizer.json, and the template as transformers fills it: only a user's turn is in it."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
        "{%- endif %}{%- endif %}"
    )
    tokens = {"pad_token": tokenizer.id_to_token(padding), "eos_token": "<|im_end|>", "unk_token": None}
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "chat_template": template}
    write_json(folder / "tokenizer_config.json", config | tokens)
