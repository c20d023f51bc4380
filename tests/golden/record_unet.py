"""Records unet_tiny.npz: a tiny UNet2DModel of diffusers with random weights, two inputs and its outputs.

Run with PyTorch, diffusers, JAX and Flax installed: `python tests/golden/record_unet.py`. It also prints how far our
network is from diffusers' in the shape of google/ddpm-cifar10-32.
"""

import pathlib
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from diffusion.networks.unet import UNet
from diffusion.pretrained.unet import from_diffusers

HERE = pathlib.Path(__file__).parent
# config.json of google/ddpm-cifar10-32, where it differs from the defaults of the class.
DDPM = dict(
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
    norm_eps=1e-6,
    attention_head_dim=None,
)
CIFAR10 = dict(
    DDPM,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(128, 256, 256, 256),
)
# Three levels, two heads, classes with a null class, and neither square images nor as many outputs as inputs.
TINY = dict(
    DDPM,
    out_channels=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
    num_class_embeds=4,
)


def make_peer(config) -> diffusers.UNet2DModel:
    """A peer whose every parameter is random: zero-initialised layers would hide what comes before them."""
    peer = diffusers.UNet2DModel(**config).eval()
    for name, parameter in peer.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, fan_in**-0.5)
    return peer


def outputs(peer, x_t, time, label=None):
    to_torch = lambda x: None if x is None else torch.from_numpy(x)  # noqa: E731
    with torch.no_grad():
        images = to_torch(x_t.transpose(0, 3, 1, 2))
        output = peer(images, to_torch(time), class_labels=to_torch(label)).sample
    return output.numpy().transpose(0, 2, 3, 1)


def weights_of(peer) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in peer.state_dict().items()}


def main():
    torch.manual_seed(0)
    rng = np.random.RandomState(0)

    tiny = make_peer(TINY)
    inputs = {
        "x_t": rng.randn(4, 8, 12, 3).astype(np.float32),
        "time": np.array([0.0, 1.0, 512.25, 999.0], np.float32),
        "label": np.array([0, 1, 2, 3]),
    }
    np.savez_compressed(
        HERE / "unet_tiny.npz",
        **inputs,
        output=outputs(tiny, **inputs),
        versions=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
        **{f"weights/{name}": weight for name, weight in weights_of(tiny).items()},
    )

    peer = make_peer(CIFAR10)
    x_t = rng.randn(4, 32, 32, 3).astype(np.float32)
    time = np.array([0.0, 10.0, 500.0, 999.0], np.float32)
    network = UNet()
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.asarray(x_t), jnp.asarray(time))["params"]
    params = from_diffusers(weights_of(peer), like)
    ours = jax.jit(network.apply)({"params": params}, x_t, time)
    theirs = outputs(peer, x_t, time)
    print(
        f"ddpm-cifar10-32: outputs of size {np.std(theirs):.3f} differ by {np.max(np.abs(ours - theirs)):.2e} at most"
    )


if __name__ == "__main__":
    main()
