"""Records inception.npz (features of pytorch-fid and torch-fidelity), inception_torch_files.npz (small weight files).

Run with PyTorch, torchvision, pytorch-fid and torch-fidelity installed: `python tests/golden/record_inception.py`. The
network's weights are not stored: `random_weights` makes the same ones wherever it runs, and the tests call it too.
"""

import io
import pathlib
import tempfile
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights with which activations keep their size through the depth; each a function of its name and shape."""
    weights = {}
    for name, shape in shapes.items():
        normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros((), np.int64)
        elif name.endswith("running_var"):
            weights[name] = np.exp(0.2 * normal)
        elif name.endswith("bn.weight"):
            weights[name] = 1 + 0.2 * normal
        elif len(shape) == 1:
            weights[name] = 0.2 * normal
        else:
            weights[name] = normal * np.float32((2 / np.prod(shape[1:])) ** 0.5)
    return weights


def images() -> dict[str, np.ndarray]:
    """uint8 images of waves and noise: two small ones, and one that grows in one direction and shrinks in the other."""
    rng = np.random.RandomState(0)

    def make(count, height, width):
        y, x = np.mgrid[:height, :width] / np.float64(max(height, width))
        y, x = y[..., None], x[..., None]
        waves = [np.sin(rng.randn(3) * 9 * x + rng.randn(3) * 9 * y + rng.randn(3)) for _ in range(count)]
        noisy = 128 + 90 * np.stack(waves) + 25 * rng.randn(count, height, width, 3)
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8)

    return {"small": make(2, 32, 32), "wide": make(1, 40, 320)}


def record_features():
    import pytorch_fid.inception
    import torch
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity
    import torchvision

    module = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    state = {name: torch.from_numpy(np.asarray(weight)) for name, weight in random_weights(shapes).items()}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    peer = pytorch_fid.inception.InceptionV3([3]).eval()
    whole = pytorch_fid.inception.fid_inception_v3().eval()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        graph = fidelity.FeatureExtractorInceptionV3("graph", ["2048", "logits"], file.name)

    arrays = {}
    for name, image in images().items():
        x = torch.from_numpy(image.transpose(0, 3, 1, 2))
        with torch.no_grad():
            pixels = torch.nn.functional.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
            arrays[f"{name}/pytorch/pool3"] = peer(x / 255)[0][:, :, 0, 0].numpy()
            arrays[f"{name}/pytorch/logits"] = whole(2 * pixels - 1).numpy()
            pool3, logits = graph(x)
            arrays[f"{name}/tensorflow/pool3"] = pool3.numpy()
            arrays[f"{name}/tensorflow/logits"] = logits.numpy()
    for name, array in arrays.items():
        print(name, array.shape, f"root mean square {np.sqrt(np.mean(array**2)):.3f}, spread {array.std():.3f}")
    np.savez_compressed(
        HERE / "inception.npz",
        **arrays,
        **{f"{name}/image": image for name, image in images().items()},
        shapes=np.array([f"{name} {' '.join(map(str, shape))}".strip() for name, shape in shapes.items()]),
        versions=f"pytorch-fid 0.3.0, torch-fidelity 0.4.0, torch {torch.__version__}",
    )


def record_torch_files():
    import torch

    numbers = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tensors = {
        "float32": numbers,
        "transposed": numbers.T,
        "part": numbers[1:5:2, 1:],
        "float64": numbers.double(),
        "float16": numbers.half(),
        "bfloat16": numbers.bfloat16(),
        "int64": torch.arange(-3, 3) * 2**40,
        "int32": torch.arange(-3, 3, dtype=torch.int32) * 2**20,
        "int16": torch.arange(-3, 3, dtype=torch.int16) * 2**10,
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "uint8": torch.arange(250, 256).to(torch.uint8),
        "bool": torch.tensor([[True, False, True]]),
        "scalar": torch.tensor(7.5),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    kinds = {
        "tensors": tensors,
        "module": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "nested": {"state_dict": module.state_dict(), "epoch": 3},
        "list": [numbers],
        "whole_module": module,
        "complex": {"z": torch.zeros(2, dtype=torch.complex64)},
    }
    arrays = {}
    for kind, content in kinds.items():
        for form, as_zip in (("zip", True), ("stream", False)):
            out = io.BytesIO()
            torch.save(content, out, _use_new_zipfile_serialization=as_zip)
            arrays[f"{kind}.{form}"] = np.frombuffer(out.getvalue(), np.uint8)
    out = io.BytesIO()
    torch.save(tensors, out, pickle_protocol=4)
    arrays["tensors.protocol_4"] = np.frombuffer(out.getvalue(), np.uint8)
    for kind in ("tensors", "module"):
        for name, tensor in kinds[kind].items():
            bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            arrays[f"{kind}/{name}"] = bits.detach().contiguous().numpy()
    arrays["versions"] = np.array(f"torch {torch.__version__}")
    np.savez_compressed(HERE / "inception_torch_files.npz", **arrays)


if __name__ == "__main__":
    record_torch_files()
    record_features()
