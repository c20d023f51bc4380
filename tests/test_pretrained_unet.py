"""Published DDPM folders against those that diffusers wrote (recorded goldens): there and back, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_folders import CASES, NAMES, TINY, inputs, write_folder
from safetensors.numpy import load_file, save_file

from diffusion.networks.unet import UNet
from diffusion.pretrained.folder import read_weights
from diffusion.pretrained.pipeline import load_chain, save_pipeline
from diffusion.pretrained.scheduler import Chain
from diffusion.pretrained.unet import load_unet, save_unet, to_diffusers
from diffusion.pretrained.unet_config import config_of, network_of

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
    return write_folder(tmp_path / "theirs")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_published_config_is_the_papers_network():
    network, shape = network_of(CIFAR10)
    assert network == UNet(dropout=0.0, out_channels=3) and shape == (32, 32, 3)
    back = config_of(network, 32, 3)
    assert {**CIFAR10, **back, "_diffusers_version": "0.0.4"} == {**back, **CIFAR10}


def test_a_folder_computes_what_diffusers_does(folder):
    network, params, config = load_unet(folder)
    assert config["block_out_channels"] == [4, 8]
    output = jax.jit(network.apply)({"params": params}, TINY["x_t"], TINY["time"])
    # Outputs are of order 1 and pass about 40 float32 roundings of products: 1e-5 leaves a factor of ten.
    np.testing.assert_allclose(output, TINY["output"], atol=1e-5)


@pytest.mark.parametrize("case", NAMES)
def test_every_kind_of_folder_computes_what_diffusers_does(tmp_path, case):
    network, params, _ = load_unet(write_folder(tmp_path, case))
    output = jax.jit(network.apply)({"params": params}, **inputs(case))
    np.testing.assert_allclose(output, CASES[f"{case}/output"], atol=1e-5)  # as above


@pytest.mark.parametrize("case", NAMES)
def test_every_kind_of_folder_there_and_back_bit_for_bit(tmp_path, case):
    theirs = write_folder(tmp_path / "theirs", case)
    network, params, config = load_unet(theirs)
    size = config["sample_size"]
    save_unet(tmp_path / "ours", network, params, size if isinstance(size, int) else tuple(size))
    stored = read_weights(theirs / "unet", dtype=None)
    written = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == stored.keys()
    for name, weight in stored.items():
        # Halves become float32, of which each is one exactly.
        np.testing.assert_array_equal(written[name], np.asarray(weight).astype(np.float32), strict=True)
    again, same, back = load_unet(tmp_path / "ours")
    assert again == network and {**config, **back} == {**back, **config}
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_there_and_back_bit_for_bit(folder, tmp_path):
    network, params, _ = load_unet(folder)
    chain = load_chain(folder)
    assert chain == Chain()
    save_pipeline(tmp_path / "ours", network, params, 32, Chain())
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        ours, theirs = (json.loads((root / name).read_text()) for root in (tmp_path / "ours", folder))
        assert theirs == {**theirs, **ours} and theirs.keys() - ours.keys() <= {"_diffusers_version"}


def test_files_of_2022_name_attention_otherwise(folder):
    _, expected, _ = load_unet(folder)
    weights = load_file(folder / WEIGHTS)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load_unet(folder)[1], expected)


def test_every_key_once_and_every_shape_equal(folder):
    weights, key = load_file(folder / WEIGHTS), "mid_block.resnets.0.conv1.weight"
    infinite = weights[key].copy()
    infinite[0, 0], infinite[1, 1, 1, 1] = np.inf, np.nan
    for wrong, message in [
        ({name: weight for name, weight in weights.items() if name != key}, f"missing {key}, left over none"),
        (weights | {"extra.bias": weights[key]}, r"missing none, left over extra\.bias"),
        (weights | {key: weights[key][:, :-1].copy()}, rf"{key} has shape \[8, 7, 3, 3\], .* needs \[8, 8, 3, 3\]"),
        (weights | {key: infinite}, rf"{key} holds 10 numbers of 576 that are not finite"),
        (weights | {key: weights[key].astype(np.int8)}, f"{key} is I8: take this model's file in float32"),
    ]:
        save_file(wrong, folder / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            load_unet(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "relu"),
        ("norm_eps", 0),
        ("downsample_padding", 2),
        ("time_embedding_type", "fourier"),
        ("freq_shift", 2),
        ("flip_sin_to_cos", "yes"),
        ("time_embedding_dim", 512),
        ("resnet_time_scale_shift", "spatial"),
        ("mid_block_type", None),
        ("mid_block_scale_factor", 2),
        ("add_attention", None),
        ("attn_norm_num_groups", 0),
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 0),
        ("attention_head_dim", 3),
        ("attention_head_dim", "wide"),
        ("attention_head_dim", [4, 4, 4]),
        ("norm_num_groups", 3),
        ("layers_per_block", "two"),
        ("sample_size", None),
        ("sample_size", [32]),
        ("block_out_channels", [4, 6, 8]),
        ("block_out_channels", [4, -8]),
        ("up_block_types", ["UpBlock2D", "SkipUpBlock2D"]),
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
        ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]),
        ("downsample_type", "fir"),
        ("cross_attention_dim", 8),
        ("x" * 5000, list(range(5000))),
    ],
)
def test_what_our_network_cannot_honour_is_refused_by_name(folder, field, value):
    change(folder / "unet" / "config.json", **{field: value})
    named = {"norm_num_groups": "3 groups", "attention_head_dim": "heads of 3 channels|attention_head_dim"}
    with pytest.raises(ValueError, match=named.get(field, field[:100])) as error:
        load_unet(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_silent_config_means_diffusers_defaults(folder):
    path = folder / "unet" / "config.json"
    fields = json.loads(path.read_text())
    named = ("freq_shift", "norm_eps", "downsample_padding", "flip_sin_to_cos", "attention_head_dim")
    path.write_text(json.dumps({field: value for field, value in fields.items() if field not in named}))
    network = load_unet(folder)[0]
    assert (network.freq_shift, network.norm_eps, network.downsample_padding) == (0, 1e-5, 1)
    assert network.flip_sin_to_cos and network.head_channels == 8


def test_a_config_without_a_size_needs_it_named(folder):
    expected = load_unet(folder)[0]
    change(folder / "unet" / "config.json", sample_size=None)
    assert load_unet(folder, image_size=32)[0] == expected


def test_classes_with_and_without_a_null_class(tmp_path):
    folder = write_folder(tmp_path / "theirs", "classes")
    network, params, _ = load_unet(folder)
    assert (network.num_classes, network.null_class) == (3, False)
    x_t, time = inputs("classes")["x_t"], inputs("classes")["time"]
    with pytest.raises(ValueError, match="no null class: labels must be given"):
        network.apply({"params": params}, jnp.asarray(x_t), jnp.asarray(time))
    guided, same, _ = load_unet(folder, null_class=True)
    assert (guided.num_classes, guided.null_class) == (2, True)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    # What we write keeps which of the two it is.
    for number, written in enumerate([network, guided]):
        save_unet(tmp_path / str(number), written, params, 8)
        assert load_unet(tmp_path / str(number))[0] == written


def test_names_of_the_first_months(tmp_path):
    folder = write_folder(tmp_path, "ddpm")
    expected = load_unet(folder)[0]
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    names = {field: [f"UNetRes{name}" for name in config[field]] for field in ("down_block_types", "up_block_types")}
    path.write_text(json.dumps(config | names | {"act_fn": "swish"}))
    assert load_unet(folder)[0] == expected


def test_networks_there_and_back():
    for network, size in [
        (UNet(out_channels=3, head_channels=64, num_classes=10), 32),
        (UNet(out_channels=6, attention_resolutions=(), multipliers=(1, 2)), (64, 32)),
        (UNet(out_channels=3, multipliers=(1, 2), scale_shift=True, resblock_updown=True, middle_norm=False), 16),
        (UNet(out_channels=3, up_attention_resolutions=(), middle_attention=False, num_heads=1), 32),
    ]:
        assert network_of(config_of(network, size, 3))[0] == network


def test_networks_that_diffusers_does_not_have():
    two_heads = UNet(num_heads=2, attention_resolutions=(8,))
    assert config_of(two_heads, 32, 3)["attention_head_dim"] == 128
    assert config_of(two_heads.clone(head_channels=(1, 2, 128, 128)), 32, 3)["attention_head_dim"] == 128
    for network, message in [
        (two_heads.clone(attention_resolutions=(32,)), "set head_channels to one number"),
        (two_heads.clone(up_attention_resolutions=(32,)), "set head_channels to one number"),
        (UNet(time_scale=1000.0), "multiplies it by 1000"),
        (UNet(multipliers=(2, 2)), "as many channels as its first level has, 256"),
        (UNet(middle_norm=False), "normalises before the attention"),
    ]:
        with pytest.raises(ValueError, match=message):
            config_of(network, 32, 3)
    text = {"conv_in": {"kernel": np.zeros((3, 3, 3, 4))}, "middle_attention_text": {"query": {"bias": np.zeros(4)}}}
    with pytest.raises(ValueError, match="UNet2DModel has no middle_attention_text"):
        to_diffusers(text)


def test_files_that_are_damaged(folder, tmp_path):
    network, params, _ = load_unet(folder)
    with pytest.raises(ValueError, match="is there already"):
        save_unet(folder, network, params, 32)
    with pytest.raises(ValueError, match="multiplies it by"):
        save_pipeline(tmp_path / "new" / "folder", network.clone(time_scale=2.0), params, 32, Chain())
    assert not any((tmp_path / "new").iterdir())
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not an intact safetensors file"):
        load_unet(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        load_unet(folder)
    for content in ("{", "[]", "[" * 100_000, None):
        (folder / "unet" / "config.json").unlink()
        if content is not None:
            (folder / "unet" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_unet(folder)
        (folder / "unet" / "config.json").touch()


def test_other_models_are_named_for_what_they_are(folder):
    for name, content, message in [
        ("model_index.json", {"_class_name": "LDMPipeline"}, r"is a latent diffusion pipeline \(LDMPipeline\): needed"),
        ("model_index.json", {"_class_name": "ScoreSdeVePipeline"}, r"is a pipeline of NCSN\+\+"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "is the U-Net of a text-to-image model"),
    ]:
        path = folder / name
        before = path.read_text()
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_unet(folder)
        path.write_text(before)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read \S+config.json: \S+ is a DDPM pipeline"):
        load_unet(folder)
    with pytest.raises(ValueError, match="nowhere is no file or folder; needed is the folder of a DDPMPipeline"):
        load_unet(folder / "nowhere")
