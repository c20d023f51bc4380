"""The text encoders of a tiny Stable Diffusion 3 as published: recorded files, and weights made from their names."""

import json
import pathlib

import numpy as np
from golden.clip_weights import weight_of
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXT = np.load(GOLDEN / "sd3_text.npz")
T5_TEXT = np.load(GOLDEN / "t5_text.npz")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIP_LENGTH, T5_LENGTH = 9, 16


def weights_of(part: str) -> dict[str, np.ndarray]:
    """Returns the weights of an encoder, in transformers' names."""
    return {name: weight_of(name, tuple(shape)) for name, shape in json.loads(str(TEXT[f"names/{part}"])).items()}


def write_text_folder(path: pathlib.Path) -> pathlib.Path:
    """Writes model_index.json, the encoders and the tokenizers into a new folder, and returns its path."""
    for name in TEXT.files:
        if name.startswith("files/"):
            file = path / name.removeprefix("files/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(TEXT[name].tobytes())
    for part in ENCODERS:
        save_file(weights_of(part), path / part / "model.safetensors")
    (path / "tokenizer_3" / "spiece.model").write_bytes(T5_TEXT["model"].tobytes())
    return path
