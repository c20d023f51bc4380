"""The same U-Net in PyTorch (diffusers' UNet2DModel), timed on request: the other side of `benchmarks.unet`.

Runs in an interpreter that has torch and diffusers and nothing of this project.
"""

import diffusers
import torch
from turns_peer import DEVICE, make_parser, regression, serve


def make(batch_size, dtype, compiled):
    """Returns a step of Adam on the mean squared error with dropout, and the network alone."""
    net = diffusers.UNet2DModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256, 256, 256),
        downsample_padding=0,
        norm_eps=1e-6,
        attention_head_dim=None,
        dropout=0.1,
    ).to(DEVICE)
    # Compiled as its users do it: channels last, which is what its convolutions are fastest in.
    format = torch.channels_last if compiled else torch.contiguous_format
    net = net.to(memory_format=format)
    x = torch.randn(batch_size, 3, 32, 32, device=DEVICE).to(memory_format=format)
    eps = torch.randn_like(x)
    time = torch.arange(batch_size, device=DEVICE) % 1000
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=DEVICE == "cuda")
    if compiled:
        net.compile()

    return regression(net, lambda: net(x, time).sample, eps, optimizer, dtype)


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    serve(
        lambda compiled: make(arguments.batch, arguments.dtype, compiled),
        {"diffusers": diffusers.__version__},
    )
