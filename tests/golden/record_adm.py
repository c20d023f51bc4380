"""Records adm_tiny.npz: what OpenAI's own U-Net (guided-diffusion) computes with tiny random networks.

Run with PyTorch installed and https://github.com/openai/guided-diffusion (22e0df8) on PYTHONPATH:
`python tests/golden/record_adm.py`. The weights are not stored: `random_weights` makes the same ones wherever it runs,
and the tests call it too.
"""

import json
import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
# Arguments of UNetModel. Its normalisations have 32 groups, so 32 channels are the fewest.
CASES = {
    # The released ImageNet 64x64 model, smaller: classes, learned variance, blocks that resample, the new order.
    "released": dict(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=2,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_classes=5,
        num_head_channels=16,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    ),
    # The code's defaults, as improved-diffusion has them too: convolutions that resample, a number of heads.
    "convolutions": dict(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(1, 4),
        channel_mult=(1, 1, 2),
        num_heads=4,
        use_scale_shift_norm=True,
    ),
    # Levels narrower than the base, as in the 512x512 model, and the embedding added instead of scaling.
    "fractions": dict(
        image_size=8,
        in_channels=1,
        model_channels=64,
        out_channels=2,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(0.5, 1.5),
        num_head_channels=32,
        resblock_updown=True,
    ),
}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights with which activations keep their size; each is a function of its name and shape."""
    weights = {}
    for name, shape in shapes.items():
        normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        norm = any(part in name for part in ("in_layers.0.", "out_layers.0.", ".norm.", "out.0."))
        if len(shape) == 1:
            weights[name] = np.float32(norm and name.endswith("weight")) + 0.2 * normal
        else:
            weights[name] = normal * np.float32(np.prod(shape[1:]) ** -0.5)
    return weights


def main():
    import torch
    from guided_diffusion.unet import UNetModel

    rng = np.random.RandomState(0)
    arrays = {"versions": f"guided-diffusion 22e0df8, torch {torch.__version__}"}
    for case, arguments in CASES.items():
        peer = UNetModel(**arguments).eval()
        shapes = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
        peer.load_state_dict({name: torch.from_numpy(weight) for name, weight in random_weights(shapes).items()})
        size, channels = arguments["image_size"], arguments["in_channels"]
        inputs = {
            "x_t": rng.randn(2, size, size, channels).astype(np.float32),
            "time": np.array([3.0, 877.0], np.float32),
        }
        if "num_classes" in arguments:
            inputs["label"] = np.array([4, 1])
        with torch.no_grad():
            x_t = torch.from_numpy(inputs["x_t"].transpose(0, 3, 1, 2))
            label = torch.from_numpy(inputs["label"]) if "label" in inputs else None
            output = peer(x_t, torch.from_numpy(inputs["time"]), label).numpy().transpose(0, 2, 3, 1)
        arrays |= {f"{case}/{name}": array for name, array in inputs.items()} | {f"{case}/output": output}
        arrays[f"{case}/shapes"] = json.dumps(shapes)
        print(f"{case}: {sum(map(np.prod, shapes.values())):,} parameters, outputs of size {np.std(output):.3f}")
    np.savez_compressed(HERE / "adm_tiny.npz", **arrays)


if __name__ == "__main__":
    main()
