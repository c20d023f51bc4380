"""A tiny Stable Diffusion 3 as published: recorded configs, and weights made from their names."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from golden.clip_weights import weight_of
from published_text import write_text_folder
from safetensors.numpy import save_file

from diffusion.pretrained import mmdit, vae
from diffusion.pretrained.strict import without_memory

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "sd3_tiny.npz")
ASKED = json.loads(str(GOLDEN["asked"]))
TABLE = "pos_embed.pos_embed"
T5_LENGTH = 16


def write_pipeline(path: pathlib.Path) -> pathlib.Path:
    """Writes the folder of the pipeline that sd3_tiny.npz was recorded of, and returns its path."""
    write_text_folder(path)
    for name in GOLDEN.files:
        if name.startswith("files/"):
            file = path / name.removeprefix("files/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(GOLDEN[name].tobytes())
    network = mmdit.read_network(path / "transformer")
    names = mmdit.to_diffusers(network, without_memory(mmdit.shapes(network)))
    weights = {name: x if name == TABLE else weight_of(name, x.shape) for name, x in names.items()}
    save_file({name: np.ascontiguousarray(x) for name, x in weights.items()}, path / "transformer" / FILE)
    module = vae.read_settings(path).module
    names = vae.to_diffusers({"params": without_memory(vae.shapes(module))})
    save_file({name: weight_of(name, x.shape) for name, x in names.items()}, path / "vae" / FILE)
    return path


FILE = "diffusion_pytorch_model.safetensors"


def noise(height: int, width: int) -> jnp.ndarray:
    """The noise that the recorded pictures were drawn from."""
    drawn = np.random.RandomState(0).randn(2, 4, height // 2, width // 2).astype(np.float32)
    return jnp.asarray(drawn.transpose(0, 2, 3, 1))
