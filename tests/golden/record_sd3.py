"""Records sd3_tiny.npz: pictures of a tiny StableDiffusion3Pipeline of diffusers, from given noise.

Run with PyTorch, diffusers and transformers installed, after record_sd3_text.py, whose text encoders it takes:
`python tests/golden/record_sd3.py`. The weights are not stored: `weight_of` makes each from its name.
With a folder as an argument it draws with that pipeline instead, and prints how far its pictures are from the recorded
ones: for a folder that --mode=export wrote, or one with a LoRA beside it.
"""

import json
import pathlib
import sys
import tempfile

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from record_sd3_text import HERE, NEGATIVES, PROMPTS, T5, T5_LENGTH, make_pipeline, weight_of, write_tokenizers

STEPS, SIZES, STRENGTH = 4, ((16, 16), (16, 24)), 0.5


def fill(peer):
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.from_numpy(weight_of(name, tuple(parameter.shape))))
    return peer.eval()


def parts() -> dict:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=T5["d_model"], caption_projection_dim=16, pooled_projection_dim=30, out_channels=4,
        pos_embed_max_size=12, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    return dict(transformer=fill(transformer), vae=fill(vae), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def noise(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).randn(count, 4, height // 2, width // 2).astype(np.float32))


def pictures(pipeline: StableDiffusion3Pipeline) -> dict[str, np.ndarray]:
    """With and without T5, guidance 1 and 7, two sizes; with blocks skipped; and from pictures."""
    given = dict(num_inference_steps=STEPS, max_sequence_length=T5_LENGTH, output_type="np")
    arrays = {}
    t5 = pipeline.text_encoder_3
    for case, encoder in (("all", t5), ("without_t5", None)):
        pipeline.text_encoder_3 = encoder
        for scale in (1.0, 7.0):
            for height, width in SIZES if encoder is t5 else SIZES[:1]:
                arrays[f"{case}/{scale:g}/{height}x{width}"] = pipeline(
                    PROMPTS, negative_prompt=NEGATIVES, guidance_scale=scale, height=height, width=width,
                    latents=noise(height, width), **given,
                ).images  # fmt: skip
    pipeline.text_encoder_3 = t5
    arrays["skipped"] = pipeline(
        PROMPTS, negative_prompt=NEGATIVES, guidance_scale=4.0, height=16, width=16, latents=noise(16, 16),
        skip_guidance_layers=[1], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=0.9, **given,
    ).images  # fmt: skip
    begun = torch.from_numpy(np.random.RandomState(1).randn(2, 4, 8, 8).astype(np.float32))
    generator = torch.Generator().manual_seed(3)
    arrays["img2img/eps"] = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3)).numpy()
    arrays["img2img/begun"] = begun.numpy()
    edit = StableDiffusion3Img2ImgPipeline(**pipeline.components)
    arrays["img2img"] = edit(
        PROMPTS, negative_prompt=NEGATIVES, image=begun, strength=STRENGTH, guidance_scale=7.0, generator=generator,
        **given,
    ).images  # fmt: skip
    return arrays


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "tokenizers"
        folder.mkdir()
        write_tokenizers(folder)
        text = make_pipeline(folder)
        pipeline = StableDiffusion3Pipeline(**{**text.components, **parts()})
        pipeline.set_progress_bar_config(disable=True)
        saved = pathlib.Path(name) / "saved"
        pipeline.save_pretrained(saved)  # before encoders are taken out, which its index would record
        arrays = pictures(pipeline)
        files = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
        for file in files:
            arrays[f"files/{file}"] = np.frombuffer((saved / file).read_bytes(), np.uint8)
    for key, value in arrays.items():
        print(key, value.shape, value.mean(), value.std())
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    asked = json.dumps({"prompts": PROMPTS, "negatives": NEGATIVES, "steps": STEPS, "strength": STRENGTH})
    np.savez_compressed(HERE / "sd3_tiny.npz", **arrays, asked=asked, versions=versions)


def compare(folder: str) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with np.load(HERE / "sd3_tiny.npz") as golden:
        print({name: float(np.abs(golden[name] - x).max()) for name, x in pictures(pipeline).items()})


if __name__ == "__main__":
    compare(sys.argv[1]) if sys.argv[1:] else main()
