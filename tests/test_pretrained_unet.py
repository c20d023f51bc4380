"""Published DDPM folders against one that diffusers wrote (a recorded golden): there and back, and what is refused."""

import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion.networks.unet import UNet
from diffusion.pretrained.pipeline import Chain, load_chain, save_pipeline
from diffusion.pretrained.unet import config_of, load_unet, network_of, save_unet

GOLDEN = pathlib.Path(__file__).parent / "golden" / "published_tiny.npz"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# config.json of google/ddpm-cifar10-32, as its authors' diffusers 0.0.4 wrote it.
CIFAR10 = json.loads("""{
  "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": null,
  "block_out_channels": [128, 256, 256, 256], "center_input_sample": false,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
  "flip_sin_to_cos": false, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
  "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
  "time_embedding_type": "positional",
  "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
}""")


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder as diffusers wrote it."""
    for name, content in np.load(GOLDEN).items():
        if name.startswith("files/"):
            path = tmp_path / "theirs" / name.removeprefix("files/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.tobytes())
    return tmp_path / "theirs"


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_published_config_is_the_papers_network():
    network, shape = network_of(CIFAR10)
    assert network == UNet(dropout=0.0, out_channels=3) and shape == (32, 32, 3)
    back = config_of(network, 32, 3)
    assert {**CIFAR10, **back, "_diffusers_version": "0.0.4"} == {**back, **CIFAR10}


def test_a_folder_computes_what_diffusers_does(folder):
    golden = np.load(GOLDEN)
    network, params, config = load_unet(folder)
    assert config["block_out_channels"] == [4, 8]
    output = jax.jit(network.apply)({"params": params}, golden["x_t"], golden["time"])
    # Outputs are of order 1 and pass about 40 float32 roundings of products: 1e-5 leaves a factor of ten.
    np.testing.assert_allclose(output, golden["output"], atol=1e-5)


def test_there_and_back_bit_for_bit(folder, tmp_path):
    network, params, _ = load_unet(folder)
    chain = load_chain(folder)
    assert chain == Chain()
    save_pipeline(tmp_path / "ours", network, params, 32, Chain())
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        ours, theirs = (json.loads((root / name).read_text()) for root in (tmp_path / "ours", folder))
        # What we leave out has diffusers' default there.
        left_out = {"_diffusers_version", "thresholding", "dynamic_thresholding_ratio", "clip_sample_range"}
        left_out |= {"sample_max_value", "timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}
        assert {**theirs, **ours} == theirs and theirs.keys() - ours.keys() <= left_out


def test_files_of_2022_name_attention_otherwise(folder):
    _, expected, _ = load_unet(folder)
    weights = load_file(folder / WEIGHTS)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load_unet(folder)[1], expected)


def test_every_key_once_and_every_shape_equal(folder):
    weights, key = load_file(folder / WEIGHTS), "mid_block.resnets.0.conv1.weight"
    for wrong, message in [
        ({name: weight for name, weight in weights.items() if name != key}, f"missing .*{key}"),
        (weights | {"extra.bias": weights[key]}, r"left over .*extra\.bias"),
        (weights | {key: weights[key][:, :-1].copy()}, f"{key} becomes"),
        (weights | {key: weights[key].astype(np.float16)}, f"{key} is float16"),
    ]:
        save_file(wrong, folder / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            load_unet(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "relu"),
        ("norm_eps", 1e-5),
        ("downsample_padding", 1),
        ("time_embedding_type", "fourier"),
        ("freq_shift", 0),
        ("flip_sin_to_cos", True),
        ("center_input_sample", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("mid_block_scale_factor", 2),
        ("add_attention", False),
        ("class_embed_type", "timestep"),
        ("attention_head_dim", 3),
        ("norm_num_groups", 3),
        ("layers_per_block", "two"),
        ("sample_size", None),
        ("block_out_channels", [4, 6]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("cross_attention_dim", 8),
        ("_class_name", "UNet2DConditionModel"),
    ],
)
def test_what_our_network_cannot_honour_is_refused_by_name(folder, field, value):
    change(folder / "unet" / "config.json", **{field: value})
    named = {"attention_head_dim": "heads of 3 channels", "norm_num_groups": "3 groups", "_class_name": str(value)}
    with pytest.raises(ValueError, match=named.get(field, field)) as error:
        load_unet(folder)
    assert "\n" not in str(error.value)


def test_a_silent_config_means_diffusers_defaults(folder):
    path = folder / "unet" / "config.json"
    fields = json.loads(path.read_text())
    for name in ("freq_shift", "norm_eps", "downsample_padding", "flip_sin_to_cos"):
        path.write_text(json.dumps({field: value for field, value in fields.items() if field != name}))
        with pytest.raises(ValueError, match=name):
            load_unet(folder)
    path.write_text(json.dumps({field: value for field, value in fields.items() if field != "attention_head_dim"}))
    assert load_unet(folder)[0].head_channels == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "scaled_linear"),
        ("prediction_type", "flow_prediction"),
        ("variance_type", "fixed_small_log"),
        ("trained_betas", [0.1]),
        ("thresholding", True),
        ("steps_offset", 1),
        ("rescale_betas_zero_snr", True),
        ("num_train_timesteps", "1000"),
        ("noise", 1),
        ("_class_name", "PNDMScheduler"),
    ],
)
def test_chains_that_are_not_ddpms_are_refused_by_name(folder, field, value):
    change(folder / "scheduler" / "scheduler_config.json", **{field: value})
    with pytest.raises(ValueError, match=value if field == "_class_name" else field):
        load_chain(folder)


def test_chains_there_and_back(tmp_path, folder):
    network, params, _ = load_unet(folder)
    for number, chain in enumerate([Chain(300, "cosine", variance="small"), Chain(prediction="v", clip=False)]):
        save_pipeline(tmp_path / str(number), network, params, 32, chain)
        assert load_chain(tmp_path / str(number)) == chain
    assert load_chain(folder / "unet") is None
    with pytest.raises(ValueError, match="no prediction 'F'"):
        save_pipeline(tmp_path / "edm", network, params, 32, Chain(prediction="F"))


def test_networks_there_and_back():
    for network, size in [
        (UNet(out_channels=3, head_channels=64, num_classes=10), 32),
        (UNet(out_channels=6, attention_resolutions=(), multipliers=(1, 2)), (64, 32)),
    ]:
        assert network_of(config_of(network, size, 3))[0] == network
    two_heads = UNet(num_heads=2, attention_resolutions=(8,))
    assert config_of(two_heads, 32, 3)["attention_head_dim"] == 128
    with pytest.raises(ValueError, match="set head_channels"):
        config_of(two_heads.clone(attention_resolutions=(32,)), 32, 3)
    with pytest.raises(ValueError, match="multiplies it by 1000"):
        config_of(UNet(time_scale=1000.0), 32, 3)


def test_files_that_are_not_whole(folder, tmp_path):
    network, params, _ = load_unet(folder)
    with pytest.raises(ValueError, match="is there already"):
        save_unet(folder, network, params, 32)
    with pytest.raises(ValueError, match="multiplies it by"):
        save_pipeline(tmp_path / "new" / "folder", network.clone(time_scale=2.0), params, 32, Chain())
    assert not any((tmp_path / "new").iterdir())
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_unet(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model\.safetensors"):
        load_unet(folder)
    for content in ("{", "[]", None):
        (folder / "unet" / "config.json").unlink()
        if content is not None:
            (folder / "unet" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_unet(folder)
        (folder / "unet" / "config.json").touch()
