"""The same MM-DiT in PyTorch (diffusers' SD3Transformer2DModel), timed on request, for `benchmarks.mmdit`.

Runs in an interpreter that has torch and diffusers and nothing of this project.
"""

import diffusers
import torch
from turns_peer import DEVICE, make_parser, regression, serve

SIDE, CHANNELS, WORDS, HEAD = 8, 32, 12, 32


def make(batch_size, dtype, width, depth, compiled):
    """Returns a step of AdamW on the mean squared error, and the network alone."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=depth,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    ).to(DEVICE)
    x = torch.randn(batch_size, CHANNELS, SIDE, SIDE, device=DEVICE)
    velocity = torch.randn_like(x)
    context = torch.randn(batch_size, WORDS, width, device=DEVICE)
    pooled = torch.randn(batch_size, width, device=DEVICE)
    time = torch.linspace(0, 1000, batch_size, device=DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
    if compiled:
        net.compile()

    def apply():
        return net(hidden_states=x, timestep=time, encoder_hidden_states=context, pooled_projections=pooled).sample

    return regression(net, apply, velocity, optimizer, dtype)


if __name__ == "__main__":
    parser = make_parser()
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--depth", type=int, required=True)
    arguments = parser.parse_args()
    serve(
        lambda compiled: make(arguments.batch, arguments.dtype, arguments.width, arguments.depth, compiled),
        {"diffusers": diffusers.__version__},
    )
