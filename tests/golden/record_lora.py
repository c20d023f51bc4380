"""Records lora_tiny.npz: adapters in diffusers' form, and what a tiny StableDiffusion3Pipeline draws with them.

Run with PyTorch, diffusers, transformers and peft installed: `python tests/golden/record_lora.py`. The pipeline is that
of record_sd3.py, the adapters are those of drawn_adapters.py.
With a folder as an argument, it loads the pytorch_lora_weights.safetensors there into the same pipeline and asserts
that it draws picture.npy, which is ours: test_lora.py leaves such a folder, exported, in its --basetemp.
"""

import pathlib
import sys
import tempfile

import numpy as np
from diffusers import StableDiffusion3Pipeline
from drawn_adapters import compare, record
from record_sd3 import NEGATIVES, PROMPTS, STEPS, T5_LENGTH, make_pipeline, noise, parts, write_tokenizers

GUIDANCE = 7.0
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


if __name__ == "__main__":
    if sys.argv[1:]:
        compare(pathlib.Path(sys.argv[1]), tiny(), picture)
    else:
        targets = ATTENTION + ADDED + OTHERS
        record("lora_tiny.npz", tiny(), parts()["transformer"], targets, picture, ("sd3_tiny.npz", "all/7/16x16"))
