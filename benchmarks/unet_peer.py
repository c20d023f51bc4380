"""The same U-Net in PyTorch (diffusers' UNet2DModel), timed on request: the other side of `benchmarks.unet`.

Runs in an interpreter that has torch and diffusers and nothing of this project. Reads lines of JSON from standard
input, {"mode": "eager" | "compiled", "what": "train" | "forward", "count": n}, and answers each with the seconds of n
single runs. The first line it prints describes it.
"""

import argparse
import json
import sys
import time

import diffusers
import torch


def make(batch_size, dtype, channels_last):
    """Returns train() and forward(): a step of Adam on the mean squared error with dropout, and the network alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = diffusers.UNet2DModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256, 256, 256),
        downsample_padding=0,
        norm_eps=1e-6,
        attention_head_dim=None,
        dropout=0.1,
    ).to(device)
    format = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=format)
    x = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=format)
    eps = torch.randn_like(x)
    time = torch.arange(batch_size, device=device) % 1000
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=device == "cuda")
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def train():
        net.train()
        with autocast:
            loss = ((net(x, time).sample - eps) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def forward():
        net.eval()
        with autocast:
            net(x, time)

    def compile():
        net.compile()

    return train, forward, compile


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    torch.set_float32_matmul_precision("high")
    made = {}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        mode = request["mode"]
        if mode not in made:
            # Compiled as its users do it: channels last, which is what its convolutions are fastest in.
            train, forward, compile = make(arguments.batch, arguments.dtype, channels_last=mode == "compiled")
            if mode == "compiled":
                compile()
            made[mode] = {"train": train, "forward": forward}
        seconds = []
        for _ in range(request["count"]):
            begun = time.perf_counter()
            made[mode][request["what"]]()
            synchronize()
            seconds.append(time.perf_counter() - begun)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
