"""Records lora_tiny.npz: adapters in diffusers' form, and what a tiny StableDiffusion3Pipeline draws with them.

Run with PyTorch, diffusers, transformers and peft installed: `python tests/golden/record_lora.py`. The pipeline is that
of record_sd3.py. The adapters are made as diffusers' training script makes them, with alpha = 2 rank, but with drawn
numbers in both factors.
With a folder as an argument, it loads the pytorch_lora_weights.safetensors there into the same pipeline and asserts
that it draws picture.npy, which is ours: test_lora.py leaves such a folder, exported, in its --basetemp.
"""

import pathlib
import sys
import tempfile

import diffusers
import numpy as np
import peft
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from record_sd3 import NEGATIVES, PROMPTS, STEPS, T5_LENGTH, make_pipeline, noise, parts, write_tokenizers

HERE = pathlib.Path(__file__).parent
FILE = "pytorch_lora_weights.safetensors"
RANK, GUIDANCE = 3, 7.0
# Of diffusers' script, and of the image's own attention and the MLPs.
ATTENTION = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
ADDED = [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
OTHERS = ["attn2.to_q", "attn2.to_v", "ff.net.0.proj", "ff.net.2"]


def tiny() -> StableDiffusion3Pipeline:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizers(folder)
        text = make_pipeline(folder)
    pipeline = StableDiffusion3Pipeline(**{**text.components, **parts()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: StableDiffusion3Pipeline) -> np.ndarray:
    return pipeline(
        PROMPTS, negative_prompt=NEGATIVES, guidance_scale=GUIDANCE, height=16, width=16, latents=noise(16, 16),
        num_inference_steps=STEPS, max_sequence_length=T5_LENGTH, output_type="np",
    ).images  # fmt: skip


def write_lora(folder: pathlib.Path) -> None:
    """Writes seeded adapters as diffusers' script for Stable Diffusion 3 does."""
    transformer = parts()["transformer"]
    targets = ATTENTION + ADDED + OTHERS
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    random = np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                drawn = random.randn(*parameter.shape) * (0.1 if "lora_B" in name else 0.5)
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )


def main() -> None:
    pipeline = tiny()
    without = picture(pipeline)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_lora(folder)
        pipeline.load_lora_weights(folder, weight_name=FILE)
        written = np.frombuffer((folder / FILE).read_bytes(), np.uint8)
    images = picture(pipeline)
    golden = np.load(HERE / "sd3_tiny.npz")["all/7/16x16"]
    print("without adapters, from sd3_tiny.npz:", np.abs(without - golden).max())
    print("the adapters change pictures by", np.abs(images - without).max(), "bytes of the file:", written.size)
    versions = f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    np.savez_compressed(HERE / "lora_tiny.npz", adapters=written, picture=images, versions=versions)


def compare(folder: str) -> None:
    """Asserts that diffusers, with the adapters in a folder, draws the picture that is beside them."""
    pipeline = tiny()
    without = picture(pipeline)
    pipeline.load_lora_weights(folder, weight_name=FILE)
    images, ours = picture(pipeline), np.load(pathlib.Path(folder) / "picture.npy")
    print("the adapters change pictures by", np.abs(images - without).max())
    print("from ours:", np.abs(images - ours).max())
    np.testing.assert_allclose(images, ours, atol=1e-3)


if __name__ == "__main__":
    compare(sys.argv[1]) if sys.argv[1:] else main()
