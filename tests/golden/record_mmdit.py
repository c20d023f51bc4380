"""Records mmdit_tiny.npz: outputs of tiny SD3Transformer2DModels of diffusers, formed as SD3, 3.5-large, 3.5-medium.

Run with PyTorch and diffusers installed: `python tests/golden/record_mmdit.py`. The weights are a function of their
names and shapes (`seeded_weights`), so that only their shapes are stored.
"""

import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
TINY = dict(
    sample_size=12,
    patch_size=2,
    in_channels=3,
    out_channels=3,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=10,
    caption_projection_dim=32,
    pooled_projection_dim=7,
    pos_embed_max_size=9,
)
VARIANTS = {
    "sd3": {},
    "sd3_5_large": dict(qk_norm="rms_norm"),
    "sd3_5_medium": dict(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}


def seeded_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights that depend on name and shape alone: none is zero, and layers keep their inputs' size."""
    weights = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 25
        center = 1.0 if "norm_" in name and "linear" not in name else 0.0
        weights[name] = (center + random.randn(*shape) * fan_in**-0.5).astype(np.float32)
    return weights


def inputs() -> dict[str, np.ndarray]:
    """Images that are not square, a time near each end and one between, and prompts of five tokens."""
    random = np.random.RandomState(0)
    return {
        "x_t": random.randn(3, 8, 12, 3).astype(np.float32),
        "time": np.array([0.001, 0.5123, 1.0], np.float32),
        "context": random.randn(3, 5, 10).astype(np.float32),
        "pooled": random.randn(3, 7).astype(np.float32),
    }


def main():
    import diffusers
    import torch

    given = inputs()
    arrays = {"versions": f"diffusers {diffusers.__version__}, torch {torch.__version__}"}
    for variant, options in VARIANTS.items():
        peer = diffusers.SD3Transformer2DModel(**TINY, **options).eval()
        state = peer.state_dict()
        weights = seeded_weights(
            {name: tuple(tensor.shape) for name, tensor in state.items() if name != "pos_embed.pos_embed"}
        )
        weights["pos_embed.pos_embed"] = state["pos_embed.pos_embed"].numpy()
        peer.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        with torch.no_grad():
            output = peer(
                torch.from_numpy(given["x_t"].transpose(0, 3, 1, 2)),
                torch.from_numpy(given["context"]),
                torch.from_numpy(given["pooled"]),
                torch.from_numpy(given["time"] * np.float32(1000)),
                return_dict=False,
            )[0]
        arrays[f"{variant}/output"] = output.numpy().transpose(0, 2, 3, 1)
        arrays[f"{variant}/names"] = np.array(list(weights))
        arrays[f"{variant}/shapes"] = np.array([" ".join(map(str, weight.shape)) for weight in weights.values()])
        arrays["table"] = weights["pos_embed.pos_embed"]
        print(variant, np.std(arrays[f"{variant}/output"]))
    np.savez_compressed(HERE / "mmdit_tiny.npz", **arrays)


if __name__ == "__main__":
    main()
