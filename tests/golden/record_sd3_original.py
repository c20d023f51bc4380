"""Records sd3_original.npz: what diffusers makes of an MM-DiT under its authors' names.

Run with PyTorch and diffusers installed: `python tests/golden/record_sd3_original.py`. Neither weights nor result are
stored: `weight_of` makes each weight from its name, and `checksum` of each converted one depends on its order.
"""

import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
WIDTH, DEPTH, DUAL, PATCH, CHANNELS, CONTEXT, POOLED, TABLE = 64, 3, 2, 2, 4, 40, 30, 6


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny MM-DiT of 3.5-medium's kind under its authors' names, but for the position table."""
    found: dict[str, tuple[int, ...]] = {"x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH)}

    def dense(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    found["x_embedder.proj.bias"] = (WIDTH,)
    dense("context_embedder", CONTEXT, WIDTH)
    for name, inputs in (("t_embedder", 256), ("y_embedder", POOLED)):
        dense(f"{name}.mlp.0", inputs, WIDTH)
        dense(f"{name}.mlp.2", WIDTH, WIDTH)
    for i in range(DEPTH):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{stream}"
            last = stream == "context_block" and i == DEPTH - 1
            dual = stream == "x_block" and i < DUAL
            dense(f"{block}.adaLN_modulation.1", WIDTH, (2 if last else 9 if dual else 6) * WIDTH)
            for attention in ("attn", "attn2") if dual else ("attn",):
                dense(f"{block}.{attention}.qkv", WIDTH, 3 * WIDTH)
                found[f"{block}.{attention}.ln_q.weight"] = found[f"{block}.{attention}.ln_k.weight"] = (64,)
                if not last:
                    dense(f"{block}.{attention}.proj", WIDTH, WIDTH)
            if not last:
                dense(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH)
                dense(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
    dense("final_layer.linear", WIDTH, PATCH**2 * CHANNELS)
    dense("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    return found


def checksum(array: np.ndarray) -> float:
    """A number that changes when two entries change places."""
    flat = np.asarray(array, np.float64).reshape(-1)
    return float(flat @ np.sin(np.arange(1, flat.size + 1)))


def main() -> None:
    import diffusers
    import torch
    from clip_weights import weight_of
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    weights = {name: torch.from_numpy(weight_of(name, shape)) for name, shape in shapes().items()}
    weights["pos_embed"] = torch.zeros(1, TABLE**2, WIDTH)
    converted = {name: x.numpy() for name, x in convert(weights).items()}
    converted.pop("pos_embed.pos_embed")
    found = {name: np.array([checksum(x), *x.shape]) for name, x in converted.items()}
    print(len(found), "tensors")
    np.savez_compressed(HERE / "sd3_original.npz", **found, versions=f"diffusers {diffusers.__version__}")


if __name__ == "__main__":
    main()
