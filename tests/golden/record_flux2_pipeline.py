"""Records flux2_pipeline.npz: pictures of a tiny Flux2KleinPipeline of diffusers, from given noise and references.

Run with PyTorch, diffusers and transformers installed, after record_qwen3.py, whose encoder and tokenizer it takes:
`python tests/golden/record_flux2_pipeline.py`. The weights are not stored: each is a function of its name.
With a folder as an argument it draws with that pipeline instead, and prints how far its pictures are from the recorded
ones: for a folder that `pretrained.klein.save_pipeline` wrote.
"""

import json
import pathlib
import sys
import tempfile

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from clip_weights import weight_of
from record_qwen3 import STATES, TINY, fill

HERE = pathlib.Path(__file__).parent
PROMPTS = ["a photo of an astronaut", "the quick brown fox jumps over the dog, highly detailed"]
LENGTH, SIZES = 48, ((16, 16), (16, 24))
STEPS = {"distilled": 4, "base": 6}
SCALE = 4.0  # which the distilled one ignores
REFERENCES = ((64, 72), (70, 67))  # rows and columns: the second is cropped to 68 x 64


def no_gain(name: str) -> str:
    """The name by which `weight_of` takes the last modulation for what it is: a matrix."""
    return name.replace("norm_out.linear", "modulation_out")


def parts(folder: pathlib.Path) -> dict:
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=len(STATES) * TINY["hidden_size"], axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.copy_(torch.from_numpy(weight_of(no_gain(name), tuple(parameter.shape))))
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    fill(vae)
    for name, buffer in (("mean", vae.bn.running_mean), ("var", vae.bn.running_var)):
        found = weight_of(f"bn.running_{name}", tuple(buffer.shape))
        buffer.copy_(torch.from_numpy(found if name == "mean" else np.exp(found)))
    return dict(
        transformer=transformer.eval(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=fill(Qwen3ForCausalLM(Qwen3Config(**TINY))),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    with np.load(HERE / "qwen3_text.npz") as arrays:
        (folder / "tokenizer.json").write_bytes(arrays["tokenizer"].tobytes())
        (folder / "tokenizer_config.json").write_bytes(arrays["tokenizer_config"].tobytes())
    return folder


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, uint8."""
    random, y, x = np.random.RandomState(number), *np.mgrid[:height, :width] / 16
    waves = np.stack([np.sin(x + number), np.cos(y - number), np.sin(x * y / 4)], axis=-1)
    return (127.5 + 100 * waves + 8 * random.randn(height, width, 3)).clip(0, 255).astype(np.uint8)


def noise(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).randn(2, 16, height // 4, width // 4).astype(np.float32))


def pictures(pipeline: Flux2KleinPipeline) -> dict[str, np.ndarray]:
    """Of both kinds, with no, one and two references; and the size where none is asked for."""
    references = [Image.fromarray(picture(i, *size)) for i, size in enumerate(REFERENCES)]
    given = dict(max_sequence_length=LENGTH, text_encoder_out_layers=STATES, guidance_scale=SCALE, output_type="np")
    arrays = {}
    for kind, steps in STEPS.items():
        pipeline.register_to_config(is_distilled=kind == "distilled")
        for count in range(3):
            height, width = SIZES[count != 1]
            arrays[f"{kind}/{count}/{height}x{width}"] = pipeline(
                references[:count] or None, PROMPTS, height=height, width=width, latents=noise(height, width),
                num_inference_steps=steps, **given,
            ).images  # fmt: skip
    pipeline.register_to_config(is_distilled=True)
    image = pipeline(references[1:], PROMPTS, latents=noise(68, 64), num_inference_steps=1, **given).images
    arrays["size of the reference"] = np.array(image.shape[1:3])
    return arrays


def cropped(processor, image: Image.Image) -> np.ndarray:
    """A reference as the pipeline prepares it: uint8."""
    processor.check_image_input(image)
    if image.width * image.height > 1024**2:
        image = processor._resize_to_target_area(image, 1024**2)
    height, width = (side // 16 * 16 for side in (image.height, image.width))
    tensor = processor.preprocess(image, height=height, width=width, resize_mode="crop")
    return ((tensor[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        pipeline = Flux2KleinPipeline(**parts(write_tokenizer(pathlib.Path(name) / "tokenizer")))
        pipeline.set_progress_bar_config(disable=True)
        arrays = pictures(pipeline)
        saved = pathlib.Path(name) / "saved"
        pipeline.save_pretrained(saved)
        for file in ("model_index.json", "scheduler/scheduler_config.json", *(
            f"{part}/config.json" for part in ("transformer", "vae", "text_encoder")
        )):  # fmt: skip
            arrays[f"files/{file}"] = np.frombuffer((saved / file).read_bytes(), np.uint8)
    for part in ("transformer", "vae", "text_encoder"):
        found = {key: list(x.shape) for key, x in getattr(pipeline, part).state_dict().items()}
        arrays[f"names/{part}"] = np.array(json.dumps(found))
    for height, width in ((900, 1403), (1100, 1100), (130, 77)):
        found = cropped(
            pipeline.image_processor.__class__(vae_scale_factor=16), Image.fromarray(picture(2, height, width))
        )
        print(height, width, found.shape)
        arrays[f"cropped/{height}x{width}"] = found[::37, ::31]
    for key, value in arrays.items():
        if value.dtype == np.float32:
            print(key, value.shape, value.mean(), value.std())
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    asked = {"prompts": PROMPTS, "steps": STEPS, "scale": SCALE, "length": LENGTH, "states": STATES}
    np.savez_compressed(HERE / "flux2_pipeline.npz", **arrays, asked=json.dumps(asked), versions=versions)


def compare(folder: str) -> None:
    pipeline = Flux2KleinPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    with np.load(HERE / "flux2_pipeline.npz") as golden:
        print({name: float(np.abs(golden[name] - x).max()) for name, x in pictures(pipeline).items()})


if __name__ == "__main__":
    compare(sys.argv[1]) if sys.argv[1:] else main()
