"""Records lora_flux2.npz: adapters in diffusers' form, and what a tiny Flux2KleinPipeline draws with them.

Run with PyTorch, diffusers, transformers and peft installed: `python tests/golden/record_lora_flux2.py`. The pipeline
is that of record_flux2_pipeline.py, distilled, with a picture to edit. The adapters are made as diffusers' training
script makes them, with alpha = 2 rank, but with drawn numbers in both factors.
With a folder as an argument, it asserts that diffusers draws the picture.npy there, which is ours: with the pipeline in
the folder, or with the adapters in it. test_flux2_training.py leaves both in its --basetemp: exported*/klein, */ours.
"""

import pathlib
import sys
import tempfile

import diffusers
import numpy as np
import peft
import torch
from diffusers import Flux2KleinPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from record_flux2_pipeline import LENGTH, PROMPTS, REFERENCES, STATES, STEPS, noise, parts, write_tokenizer
from record_flux2_pipeline import picture as reference

HERE = pathlib.Path(__file__).parent
FILE = "pytorch_lora_weights.safetensors"
RANK = 3
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


def write_lora(folder: pathlib.Path) -> None:
    """Writes seeded adapters as diffusers' script for FLUX.2 [klein] does."""
    transformer = tiny().transformer
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ATTENTION + OTHERS))
    random = np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                drawn = random.randn(*parameter.shape) * (0.1 if "lora_B" in name else 0.5)
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    Flux2KleinPipeline.save_lora_weights(
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
    with np.load(HERE / "flux2_pipeline.npz") as golden:
        print("without adapters, from flux2_pipeline.npz:", np.abs(without - golden["distilled/1/16x16"]).max())
    print("the adapters change pictures by", np.abs(images - without).max(), "bytes of the file:", written.size)
    versions = f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    np.savez_compressed(HERE / "lora_flux2.npz", adapters=written, picture=images, versions=versions)


def compare(folder: pathlib.Path) -> None:
    """Asserts that diffusers draws the picture in a folder with the pipeline, or the adapters, beside it."""
    pipeline = tiny()
    without = picture(pipeline)
    if (folder / "model_index.json").exists():
        pipeline = Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
    else:
        pipeline.load_lora_weights(folder, weight_name=FILE)
    images, ours = picture(pipeline), np.load(folder / "picture.npy")
    print("pictures are changed by", np.abs(images - without).max())
    print("from ours:", np.abs(images - ours).max())
    np.testing.assert_allclose(images, ours, atol=1e-3)


if __name__ == "__main__":
    compare(pathlib.Path(sys.argv[1])) if sys.argv[1:] else main()
