"""What a file or a folder of weights is, in a few words: for the one line that refuses it."""

import os
import zipfile
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffusion.pretrained.folder import TORCH_SUFFIXES, read_json, resolve
from diffusion.pretrained.strict import few
from diffusion.pretrained.torch_files import read_torch_names

# Names that diffusers gives classes of pipelines and networks: the first that a class begins with is taken.
_CLASSES = {
    "DDPMPipeline": "a DDPM pipeline",
    "DDIMPipeline": "a DDPM pipeline",
    "PNDMPipeline": "a DDPM pipeline",
    "StableDiffusion3": "a Stable Diffusion 3 pipeline",
    "StableDiffusionXL": "a Stable Diffusion XL pipeline",
    "StableDiffusion": "a Stable Diffusion pipeline",
    "Flux2Klein": "a FLUX.2 [klein] pipeline",
    "Flux2Pipeline": "a FLUX.2 pipeline",
    "Flux2Transformer": "the transformer of FLUX.2",
    "FluxTransformer": "the transformer of FLUX.1",
    "Flux": "a FLUX.1 pipeline",
    "DiTPipeline": "a DiT pipeline",
    "DiTTransformer": "the transformer of DiT",
    "Transformer2DModel": "the transformer of DiT or PixArt",
    "SD3Transformer": "the transformer of Stable Diffusion 3",
    "LDM": "a latent diffusion pipeline",
    "ConsistencyModel": "a pipeline of a consistency model",
    "ScoreSde": "a pipeline of NCSN++ (a variance-exploding process)",
    "KarrasVe": "a pipeline of a variance-exploding process",
    "UNet2DConditionModel": "the U-Net of a text-to-image model, as Stable Diffusion 1 and 2 have it",
    "UNet2DModel": "a U-Net of diffusers",
    "Autoencoder": "an autoencoder",
    "VQModel": "an autoencoder",
    "CLIP": "a CLIP of transformers",
    "T5": "a T5 of transformers",
    "Qwen": "a Qwen of transformers",
}
# Parts of names that only such a file has, all of one line at once; the first line that fits is taken.
_NAMES = [
    (("lora",), "a LoRA, which changes the weights of another model"),
    (("double_blocks.",), "FLUX's transformer in its authors' names"),
    (("joint_blocks.",), "Stable Diffusion 3's transformer in its authors' names"),
    (("model.diffusion_model.",), "a Stable Diffusion checkpoint in one file"),
    (("input_blocks.", "output_blocks.", "time_embed."), "a U-Net of OpenAI's guided-diffusion (ADM)"),
    (("input_blocks.", "time_embed."), "a classifier of OpenAI's guided-diffusion (ADM)"),
    (("visual.", "positional_embedding"), "a CLIP in the names of OpenAI and open_clip"),
    (("vision_model.", "text_model."), "the weights of a CLIPModel of transformers"),
    (("Mixed_5b.",), "FID's Inception-v3"),
    (("x_embedder.", "adaLN_modulation"), "a DiT in its authors' names"),
    (("encoder.", "decoder.", "quant_conv"), "the weights of an autoencoder of diffusers"),
    (("down_blocks.", "time_embedding.", "attn2."), "the weights of a UNet2DConditionModel of diffusers"),
    (("down_blocks.", "time_embedding."), "the weights of a UNet2DModel of diffusers"),
    (("transformer_blocks.", "proj_out"), "the weights of a transformer of diffusers"),
]


def identify(path: str | os.PathLike) -> str:
    """Returns what is at `path`, as "a LoRA, which changes the weights of another model"; never raises.

    Nothing but settings and names is read.
    """
    try:
        path = resolve(path)
        if path.is_dir():
            return _folder(path)
        return _file(path) if path.is_file() else "no file or folder"
    except (OSError, ValueError) as error:
        return f"not readable ({few([str(error)])})"


def identify_names(names: Collection[str]) -> str:
    """Returns which model has arrays of these names."""
    for parts, what in _NAMES:
        if all(any(part in name for name in names) for part in parts):
            return what
    return f"a file of {len(names)} arrays of a model that is not known here ({few(sorted(names))})"


def _folder(folder: Path) -> str:
    entries = sorted(path.name for path in folder.iterdir())
    if "model_index.json" in entries:
        return _class(read_json(folder / "model_index.json").get("_class_name"))
    if "adapter_config.json" in entries or any("lora" in name for name in entries):
        return _NAMES[0][1]
    if any(name.startswith("open_clip") for name in entries):
        return "a model of open_clip"
    if "config.json" in entries:
        config = read_json(folder / "config.json")
        (architecture,) = [*(config.get("architectures") or []), None][:1]
        return _class(config.get("_class_name") or architecture or config.get("model_type"))
    files = [name for name in entries if name.endswith((".safetensors", *TORCH_SUFFIXES))]
    if len(files) == 1:
        return f"a folder without settings, whose {files[0]} is {_file(folder / files[0])}"
    return f"a folder without config.json ({few(entries)})"


def _class(name: object) -> str:
    if not isinstance(name, str):
        return "a folder whose settings do not name their class"
    what = next((what for start, what in _CLASSES.items() if name.startswith(start)), "another kind of model")
    return f"{what} ({few([name])})"


def _file(path: Path) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/__torch__" in name for name in archive.namelist()):
                return "a TorchScript program, as OpenAI's files of CLIP are"
    if path.suffix in TORCH_SUFFIXES:
        return identify_names(read_torch_names(path))
    try:
        with safe_open(path, "np") as opened:
            return identify_names(list(opened.keys()))
    except (SafetensorError, TypeError):
        return "a file that is neither safetensors nor PyTorch's"
