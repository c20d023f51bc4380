"""Records lora_flux2.npz: adapters in diffusers' form, and what a tiny Flux2KleinPipeline draws with them.

Run with PyTorch, diffusers, transformers and peft installed: `python tests/golden/record_lora_flux2.py`. The pipeline
is that of record_flux2_pipeline.py, distilled, with a picture to edit; the adapters are those of drawn_adapters.py.
With a folder as an argument, it asserts that diffusers draws the picture.npy there, which is ours: with the pipeline in
the folder, or with the adapters in it. test_flux2_training.py leaves both in its --basetemp: exported*/klein, */ours.
"""

import pathlib
import sys
import tempfile

import numpy as np
from diffusers import Flux2KleinPipeline
from drawn_adapters import compare, record
from PIL import Image
from record_flux2_pipeline import LENGTH, PROMPTS, REFERENCES, STATES, STEPS, noise, parts, write_tokenizer
from record_flux2_pipeline import picture as reference

# Of diffusers' script, and of the text's stream and the MLPs.
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"]
OTHERS = ["add_q_proj", "to_add_out", "ff.linear_in", "ff.linear_out"]


def tiny() -> Flux2KleinPipeline:
    with tempfile.TemporaryDirectory() as name:
        pipeline = Flux2KleinPipeline(**parts(write_tokenizer(pathlib.Path(name) / "tokenizer")), is_distilled=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Flux2KleinPipeline) -> np.ndarray:
    return pipeline(
        [Image.fromarray(reference(0, *REFERENCES[0]))], PROMPTS, height=16, width=16, latents=noise(16, 16),
        num_inference_steps=STEPS["distilled"], max_sequence_length=LENGTH, text_encoder_out_layers=STATES,
        output_type="np",
    ).images  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:]:
        compare(pathlib.Path(sys.argv[1]), tiny(), picture)
    else:
        targets, without = ATTENTION + OTHERS, ("flux2_pipeline.npz", "distilled/1/16x16")
        record("lora_flux2.npz", tiny(), tiny().transformer, targets, picture, without)
