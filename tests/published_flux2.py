"""A tiny FLUX.2 [klein] as published: recorded configs, and weights made from their names."""

import json
import pathlib

import numpy as np
from golden.clip_weights import weight_of
from safetensors.numpy import save_file

GOLDEN_FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN, TEXT = np.load(GOLDEN_FOLDER / "flux2_pipeline.npz"), np.load(GOLDEN_FOLDER / "qwen3_text.npz")
ASKED = json.loads(str(GOLDEN["asked"]))
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def weights_of(part: str) -> dict[str, np.ndarray]:
    """Returns the weights of a part of the pipeline that flux2_pipeline.npz was recorded of."""
    found = {}
    for name, shape in json.loads(str(GOLDEN[f"names/{part}"])).items():
        if name.endswith("num_batches_tracked"):
            found[name] = np.array(0, np.int64)
            continue
        weight = weight_of(name.replace("norm_out.linear", "modulation_out"), tuple(shape))
        found[name] = np.exp(weight) if name == "bn.running_var" else weight
    return found


def write_pipeline(path: pathlib.Path, distilled: bool = True) -> pathlib.Path:
    """Writes the folder of that pipeline, and returns its path."""
    for name in GOLDEN.files:
        if name.startswith("files/"):
            file = path / name.removeprefix("files/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(GOLDEN[name].tobytes())
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "is_distilled": distilled}))
    (path / "tokenizer").mkdir()
    for name in ("tokenizer", "tokenizer_config"):
        (path / "tokenizer" / f"{name}.json").write_bytes(TEXT[name].tobytes())
    for part, file in FILES.items():
        save_file(weights_of(part), path / part / file)
    return path


def noise(height: int, width: int) -> np.ndarray:
    """The noise that the recorded pictures were drawn from."""
    drawn = np.random.RandomState(0).randn(2, 16, height // 4, width // 4).astype(np.float32)
    return drawn.transpose(0, 2, 3, 1)


def picture(number: int, height: int, width: int) -> np.ndarray:
    """A recorded reference, as golden/record_flux2_pipeline.py has it."""
    random, (y, x) = np.random.RandomState(number), np.mgrid[:height, :width] / 16
    waves = np.stack([np.sin(x + number), np.cos(y - number), np.sin(x * y / 4)], axis=-1)
    return (127.5 + 100 * waves + 8 * random.randn(height, width, 3)).clip(0, 255).astype(np.uint8)


REFERENCES = (picture(0, 64, 72), picture(1, 70, 67))
