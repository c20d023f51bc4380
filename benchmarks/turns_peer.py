"""The side of `benchmarks.turns` that runs in an interpreter with PyTorch and nothing of this project.

Reads lines of JSON from standard input, {"mode": "eager" | "compiled", "what": "train" | "forward", "count": n,
"uncounted": m}, and answers each with the seconds per run of n runs, after m that do not count. The first line that it
prints describes it.
"""

import argparse
import json
import sys
import time

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_parser():
    """Returns the flags of every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    return parser


def regression(net, apply, target, optimizer, dtype):
    """Returns a step of the optimizer on the mean squared error of apply() to `target`, and apply() alone."""
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16")

    def train():
        net.train()
        with autocast:
            loss = ((apply() - target) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def forward():
        net.eval()
        with autocast:
            apply()

    return {"train": train, "forward": forward}


def serve(make, versions):
    """Answers until the input ends; make(compiled) returns {"train": a step, "forward": a pass}, of no arguments."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    torch.set_float32_matmul_precision("high")
    made = {}
    versions = {"torch": torch.__version__, **versions, "threads": torch.get_num_threads()}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        mode = request["mode"]
        if mode not in made:
            made[mode] = make(mode == "compiled")
        run = made[mode][request["what"]]
        for _ in range(request["uncounted"]):
            run()
        synchronize()
        begun = time.perf_counter()
        for _ in range(request["count"]):
            run()
        synchronize()
        print(json.dumps((time.perf_counter() - begun) / request["count"]), flush=True)
