"""How fast is the exact U-Net of DDPM on this device, in training and forward, and how fast is PyTorch's?

    python -m benchmarks.unet --batch 8 --peer_python /path/to/python/with/torch/and/diffusers --json OUT.json

Ours and the peer take turns, so that a machine whose speed drifts does not favour one; medians are reported, and ratios
round by round. Without a peer only ours is timed. On a GPU: `--batch 512 --dtype bfloat16 --fused_norms --cublas`; on a
CPU `--plain_convolutions` shows what Winograd's are worth, `--plain_norms` what group means as products are, and
`--plain_upsampling` what it is worth not to make the upsampled images, as `--transposed_upsampling` does on GPUs.
"""

from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import turns
from diffusion.networks import convolution, group_norm, upsampling
from diffusion.networks.unet import UNet
from diffusion.training import Experiment

# One forward pass of one image is 6.22 GMAC.
FORWARD_FLOP = 2 * 6.22e9


def make_ours(
    batch_size: int, dtype: str, fused_norms: bool = False, options: dict[str, Any] | None = None
) -> turns.Ours:
    """Returns this project's network and its own train step (Adam, averaging, clipping off)."""
    network = UNet(dtype=jnp.dtype(dtype), fused_norms=fused_norms)
    random = np.random.RandomState(0)
    x = random.randn(batch_size, 32, 32, 3).astype(np.float32)
    times = (np.arange(batch_size) % 1000).astype(np.float32)
    batch = {"x": x, "eps": random.randn(*x.shape).astype(np.float32), "time": times}

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        output: Any = network.apply(params, batch["x"], batch["time"], train=True, rngs={"dropout": key})
        return jnp.mean((output - batch["eps"]) ** 2, axis=(1, 2, 3)), {}

    experiment = Experiment(
        init=lambda key: network.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,))),
        loss=loss,
        optimizer=optax.adam(2e-4),
        learning_rate=lambda step: 2e-4,
        batches=lambda step: (_ for _ in ()),
        batch_size=batch_size,
    )
    return turns.Ours(
        experiment, lambda params, batch: network.apply(params, batch["x"], batch["time"]), batch, options
    )


def by_transposition(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `convolve_upsampled` in 16 products for 36: as the gradient of a convolution of stride 2, of 4x4 pixels.

    By XLA's count for an H100 the training step's products take 7% less, and 0.3 of 28.5 GB are not written.
    """
    batch, height, width, _ = x.shape
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    shifts = [((row, 1 - row), (column, 1 - column), (0, 0), (0, 0)) for row in (0, 1) for column in (0, 1)]
    wide = jnp.stack([jnp.pad(turned, shift) for shift in shifts]).sum(axis=0)
    y = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, kernel.shape[3]), x.dtype)
    strided = partial(convolution.by_xla, kernel=wide, stride=2, padding=((1, 1), (1, 1)))
    return jax.linear_transpose(strided, y)(x)[0]


def main() -> None:
    parser = turns.make_parser(__doc__)
    parser.add_argument("--fused_norms", action="store_true", help="time the network with fused norms, too")
    parser.add_argument("--plain_convolutions", action="store_true", help="time the network with XLA's own, too")
    parser.add_argument("--plain_norms", action="store_true", help="time it with means over an axis of groups, too")
    parser.add_argument("--plain_upsampling", action="store_true", help="time it with upsampled images made, too")
    parser.add_argument(
        "--transposed_upsampling", action="store_true", help="time it with transposed convolutions, too"
    )
    arguments = turns.parse(parser)
    for device, asked in {"GPUs": arguments.transposed_upsampling, "CPUs": arguments.plain_upsampling}.items():
        if asked and (jax.default_backend() == "cpu") != (device == "CPUs"):
            parser.error(f"upsampling differs in that way on {device} alone, this is {jax.default_backend()}")
    peer = turns.start_peer(arguments, "unet_peer.py", [])
    ours = make_ours(arguments.batch, arguments.dtype)
    variants = {}
    if arguments.fused_norms:
        variants["ours, fused norms"] = make_ours(arguments.batch, arguments.dtype, True)
    if arguments.cublas:
        name = "ours, fused norms, cuBLAS" if arguments.fused_norms else "ours, cuBLAS"
        variants[name] = make_ours(arguments.batch, arguments.dtype, arguments.fused_norms, turns.CUBLAS)
    if arguments.plain_convolutions:
        with mock.patch.object(convolution, "fits", return_value=False):
            variants["ours, plain convolutions"] = make_ours(arguments.batch, arguments.dtype)
    if arguments.plain_norms:
        with mock.patch.object(group_norm, "gain_and_shift", group_norm.by_axis):
            variants["ours, plain norms"] = make_ours(arguments.batch, arguments.dtype)
    if arguments.plain_upsampling:
        with mock.patch.object(upsampling, "by_differences", upsampling.by_repeating):
            variants["ours, plain upsampling"] = make_ours(arguments.batch, arguments.dtype)
    if arguments.transposed_upsampling:
        with mock.patch.object(upsampling, "by_repeating", by_transposition):
            variants["ours, transposed upsampling"] = make_ours(arguments.batch, arguments.dtype, arguments.fused_norms)
    turns.compare(arguments, ours, peer, FORWARD_FLOP, variants)


if __name__ == "__main__":
    main()
