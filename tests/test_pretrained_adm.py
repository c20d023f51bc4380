"""ADM's checkpoints against OpenAI's own U-Net (a recorded golden), and what is refused."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from golden.record_adm import CASES, random_weights
from safetensors.numpy import save_file
from test_torch_files import Storage, as_zip, dumps, tensor

from diffusion.networks.unet import UNet
from diffusion.pretrained.adm import load_adm
from diffusion.pretrained.scheduler import Chain

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "adm_tiny.npz")


def weights_of(case: str) -> dict[str, np.ndarray]:
    return random_weights({name: tuple(shape) for name, shape in json.loads(str(GOLDEN[f"{case}/shapes"])).items()})


def flags(case: str) -> dict[str, Any]:
    arguments = CASES[case]
    return dict(
        new_attention_order=arguments.get("use_new_attention_order", False),
        num_heads=arguments.get("num_heads"),
        head_channels=arguments.get("num_head_channels"),
    )


@pytest.fixture
def write(tmp_path):
    """Writes weights as torch.save does, and returns the path."""

    def write(weights: dict[str, np.ndarray]) -> pathlib.Path:
        state, storages = {}, {}
        for number, (name, array) in enumerate(weights.items()):
            array = np.ascontiguousarray(array, np.float32)
            strides = tuple(stride // 4 for stride in array.strides)
            state[name] = tensor(Storage(array.size, str(number)), 0, array.shape, strides)
            storages[str(number)] = array.tobytes()
        path = tmp_path / "model.pt"
        path.write_bytes(as_zip(dumps(state), storages))
        return path

    return write


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_computes_what_openais_code_does(write, case):
    path = write(weights_of(case))
    network, params, shape, _ = load_adm(path, 8, **flags(case))
    assert shape == (8, 8, CASES[case]["in_channels"])
    inputs = {name: GOLDEN[f"{case}/{name}"] for name in ("x_t", "time", "label") if f"{case}/{name}" in GOLDEN.files}
    output = jax.jit(network.apply)({"params": params}, **inputs)
    # Outputs are of size 0.6. The angles of the time embedding, up to 877, are off by float32's rounding of the
    # frequencies: 877 * 2^-24 = 5e-5 in a sine or two of 32; heads or their order taken wrong give 1e-1.
    np.testing.assert_allclose(output, GOLDEN[f"{case}/output"], atol=2e-5)


def test_the_architecture_follows_from_the_shapes(write):
    adm: dict[str, Any] = dict(norm_eps=1e-5, freq_shift=0, flip_sin_to_cos=True, downsample_padding=1, dropout=0.0)
    for case, expected in {
        "released": UNet(
            32, (1, 2), None, 2, (4,), head_channels=16, num_classes=5, null_class=False, out_channels=6,
            scale_shift=True, resblock_updown=True, **adm,
        ),
        "convolutions": UNet(
            32, (1, 1, 2), None, 1, (8, 2), num_heads=4, out_channels=3, scale_shift=True, **adm
        ),
        "fractions": UNet(
            64, (), (32, 96), 1, (4,), head_channels=32, out_channels=2, resblock_updown=True, **adm
        ),
    }.items():  # fmt: skip
        assert load_adm(write(weights_of(case)), 8, **flags(case)).network == expected


def test_chains_of_the_flags(write):
    released = write(weights_of("released"))
    assert load_adm(released, 8, **flags("released"), noise_schedule="cosine").chain == Chain(
        beta="cosine", variance="learned", spacing="linspace"
    )
    convolutions = write(weights_of("convolutions"))
    assert load_adm(convolutions, 8, **flags("convolutions"), num_steps=4000).chain == Chain(
        4000, first=2.5e-5, last=0.005, spacing="linspace"
    )


def test_a_null_class_where_there_is_one(write):
    network = load_adm(write(weights_of("released")), 8, **flags("released"), null_class=True, dropout=0.3).network
    assert (network.num_classes, network.null_class, network.dropout) == (4, True, 0.3)


def test_safetensors_too(write, tmp_path):
    weights = weights_of("convolutions")
    save_file(weights, tmp_path / "model.safetensors")
    expected = load_adm(write(weights), 8, **flags("convolutions"))
    found = load_adm(tmp_path / "model.safetensors", 8, **flags("convolutions"))
    assert found.network == expected.network
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_wrong_weights_and_flags_are_one_clear_line(write):
    weights = weights_of("convolutions")
    heads: dict[str, Any] = dict(new_attention_order=False, num_heads=4)
    key = "middle_block.1.qkv.weight"
    nan = weights[key].copy()
    nan[3, 4] = np.nan
    attentions = {name: weight for name, weight in weights.items() if "input_blocks.1.1." not in name}
    for wrong, size, options, message in [
        (weights, 8, heads | {"num_heads": None}, "give num_heads or head_channels"),
        (weights, 8, heads | {"head_channels": 8}, "give num_heads or head_channels"),
        (weights, 8, heads | {"num_heads": 0}, "give num_heads or head_channels"),
        (weights, 8, heads | {"num_heads": 5}, "heads of 6 channels do not divide"),
        (weights, 8, heads | {"noise_schedule": "sigmoid"}, "unknown noise_schedule 'sigmoid': choose"),
        (weights, 10, heads, "image size 10x10 cannot be halved 2 times"),
        (weights | {key: nan}, 8, heads, f"{key} holds 1 numbers of 12288 that are not finite"),
        (weights | {key: weights[key][:-1]}, 8, heads, rf"{key} has shape \[191, 64, 1\]"),
        (weights | {"extra": nan}, 8, heads, "missing none, left over extra"),
        (attentions, 8, heads, r"attention at heights \[2\] on the way down and \[8, 2\] up"),
        ({"lora_A": nan}, 8, heads, r"model\.pt: it is a LoRA"),
        ({name: weight for name, weight in weights.items() if "output" not in name}, 8, heads, "it is a classifier"),
        (
            weights | {"input_blocks.0.0.weight": np.zeros((32, 6, 3, 3))}, 8, heads,
            "maps 6 channels to 3: an upsampler",
        ),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            load_adm(write(wrong), size, **options)
        assert "\n" not in str(error.value)
