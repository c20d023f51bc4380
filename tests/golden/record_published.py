"""Records published_tiny.npz: a tiny DDPMPipeline's folder, byte for byte as diffusers writes it, and its outputs.

Run with PyTorch, diffusers, JAX and Flax installed: `python tests/golden/record_published.py`. It also prints what
becomes of a model in the shape of google/ddpm-cifar10-32 on the way from diffusers to us and back.
"""

import pathlib
import tempfile

import diffusers
import jax
import numpy as np
import torch
from record_unet import CIFAR10, DDPM, make_peer, outputs
from safetensors.numpy import load_file

from diffusion.pretrained.pipeline import load_chain, save_pipeline
from diffusion.pretrained.unet import load_unet

HERE = pathlib.Path(__file__).parent
TINY = dict(
    DDPM,
    sample_size=32,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
)


def save(config, folder: pathlib.Path) -> diffusers.UNet2DModel:
    peer = make_peer(config)
    diffusers.DDPMPipeline(peer, diffusers.DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    return peer


def main():
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    inputs = {"x_t": rng.randn(2, 32, 32, 3).astype(np.float32), "time": np.array([0.0, 999.0], np.float32)}
    with tempfile.TemporaryDirectory() as temporary:
        tiny = pathlib.Path(temporary) / "tiny"
        peer = save(TINY, tiny)
        files = {str(path.relative_to(tiny)): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
        np.savez_compressed(
            HERE / "published_tiny.npz",
            **inputs,
            output=outputs(peer, **inputs),
            versions=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
            **{f"files/{name}": np.frombuffer(content, np.uint8) for name, content in files.items()},
        )

        theirs, ours = pathlib.Path(temporary) / "theirs", pathlib.Path(temporary) / "ours"
        peer = save(CIFAR10 | {"sample_size": 32}, theirs)
        network, params, _ = load_unet(theirs)
        chain = load_chain(theirs)
        assert chain is not None
        save_pipeline(ours, network, params, 32, chain)
        file = "unet/diffusion_pytorch_model.safetensors"
        before, after = load_file(theirs / file), load_file(ours / file)
        same = before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
        again = diffusers.DDPMPipeline.from_pretrained(ours).unet.eval()
        there = outputs(again, **inputs)
        here = np.asarray(jax.jit(network.apply)({"params": params}, **inputs))
        print(f"{sum(weight.size for weight in before.values()):,} parameters there and back: same bits {same}")
        print(f"outputs of size {np.std(there):.3f} differ by {np.max(np.abs(here - there)):.2e} at most")


if __name__ == "__main__":
    main()
