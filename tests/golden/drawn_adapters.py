"""What record_lora.py and record_lora_flux2.py share: adapters in diffusers' form, and what a pipeline draws with them.

The adapters are made as diffusers' training scripts make them, with alpha = 2 rank, but with drawn numbers in both
factors. Needs PyTorch, diffusers, transformers and peft.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

HERE = pathlib.Path(__file__).parent
FILE = "pytorch_lora_weights.safetensors"
RANK = 3


def write_lora(folder: pathlib.Path, pipeline_class: Any, transformer: torch.nn.Module, targets: list[str]) -> None:
    """Writes seeded adapters for modules of a transformer, to which they are added."""
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    random = np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                drawn = random.randn(*parameter.shape) * (0.1 if "lora_B" in name else 0.5)
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )


def record(
    name: str,
    pipeline: Any,
    transformer: torch.nn.Module,
    targets: list[str],
    picture: Callable[[Any], np.ndarray],
    golden: tuple[str, str],
) -> None:
    """Writes the golden `name`: adapters for modules of a transformer like the pipeline's, and the picture with them.

    Args:
      name: of the .npz file.
      pipeline: without adapters, which it has afterwards.
      transformer: another of the same weights.
      targets: modules of the transformer.
      picture: picture(pipeline) -> images.
      golden: file and array of the picture that was recorded without adapters.
    """
    without = picture(pipeline)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_lora(folder, type(pipeline), transformer, targets)
        pipeline.load_lora_weights(folder, weight_name=FILE)
        written = np.frombuffer((folder / FILE).read_bytes(), np.uint8)
    images = picture(pipeline)
    file, array = golden
    with np.load(HERE / file) as recorded:
        print(f"without adapters, from {file}:", np.abs(without - recorded[array]).max())
    print("the adapters change pictures by", np.abs(images - without).max(), "bytes of the file:", written.size)
    versions = f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    np.savez_compressed(HERE / name, adapters=written, picture=images, versions=versions)


def compare(folder: pathlib.Path, pipeline: Any, picture: Callable[[Any], np.ndarray]) -> None:
    """Asserts that diffusers draws the picture in a folder with the pipeline, or the adapters, beside it."""
    without = picture(pipeline)
    if (folder / "model_index.json").exists():
        pipeline = type(pipeline).from_pretrained(folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
    else:
        pipeline.load_lora_weights(folder, weight_name=FILE)
    images, ours = picture(pipeline), np.load(folder / "picture.npy")
    print("pictures are changed by", np.abs(images - without).max())
    print("from ours:", np.abs(images - ours).max())
    np.testing.assert_allclose(images, ours, atol=1e-3)
