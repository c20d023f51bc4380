"""Published autoencoders become ours and folders again bit for bit; what does not fit is refused by name."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from published_vaes import ARRAYS, CASES, IMAGES, golden, record, weights_of, write_pair, write_vae
from safetensors.numpy import load_file, save_file

from diffusion.networks.vae import fold, unfold
from diffusion.pretrained.autoencoders import load_autoencoder
from diffusion.pretrained.tiny_vae import load_tiny, save_tiny
from diffusion.pretrained.vae import load_vae, save_vae
from diffusion.pretrained.vae_original import load_original

FILE = "diffusion_pytorch_model.safetensors"
# CompVis's names <- diffusers', for what `record_vae.py` has no original of; levels are turned round by the test.
ORIGINAL = {
    "_blocks.0.resnets.": ".0.block.",
    "_blocks.1.resnets.": ".1.block.",
    "_blocks.0.downsamplers.0.": ".0.downsample.",
    "_blocks.1.upsamplers.0.": ".1.upsample.",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def edit(folder, **fields):
    """Changes fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_folders_come_back_bit_for_bit(case, tmp_path):
    published = load_autoencoder(write_vae(tmp_path / "theirs", case))
    (save_tiny if case == "tiny" else save_vae)(tmp_path / "ours", published)
    assert_same(load_file(tmp_path / "ours" / FILE), weights_of(case))
    again = load_autoencoder(tmp_path / "ours")
    assert (again.module, again.patch, again.sampled) == (published.module, published.patch, published.sampled)
    np.testing.assert_array_equal(again.shift, published.shift, strict=True)
    np.testing.assert_array_equal(again.scale, published.scale, strict=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, published.params))
    assert ARRAYS[f"{case}/opens_ours"]  # by diffusers: the script asserted equal weights and outputs


def test_latents_are_shifted_and_scaled_as_pipelines_do(tmp_path):
    sd1, sd3, other = (load_vae(write_vae(tmp_path / case, case)) for case in ("sd1", "sd3", "no_attention"))
    np.testing.assert_array_equal([*sd1.shift, *sd1.scale], np.array([0] * 4 + [0.18215] * 4, np.float32), strict=True)
    np.testing.assert_array_equal(
        [*sd3.shift, *sd3.scale], np.array([0.0609] * 16 + [1.5305] * 16, np.float32), strict=True
    )
    # diffusers' latents_mean and latents_std: (z - mean) * scaling_factor / std.
    np.testing.assert_array_equal([*other.shift, *other.scale], [0.5, -1, 2, 0, 0.25, 0.125, 1, 0.5])
    assert sd1.sampled and sd3.sampled and sd1.patch == sd3.patch == 1


def test_flux2_is_its_authors_code(tmp_path):
    path = tmp_path / "ae.safetensors"
    save_file(weights_of("flux2_original"), path)
    published = load_original(path)
    module, params, shift, scale, patch, sampled = published
    assert (module.channels, module.latent_channels, module.blocks_per_level, patch, sampled) == (
        (32, 64),
        4,
        1,
        2,
        False,
    )
    apply = jax.jit(lambda x, method: module.apply(params, x, method=method), static_argnums=1)
    x_0 = (fold(apply(IMAGES, "encode").mean, patch) - shift) * scale
    # Of order 1 after some 20 products; the scales are up to 2.
    np.testing.assert_allclose(x_0, golden("flux2_original", "x_0"), atol=2e-5)
    z = unfold(record.latents(x_0.shape) / scale + shift, patch)
    np.testing.assert_allclose(apply(z, "decode"), golden("flux2_original", "decoded"), atol=2e-5)

    save_vae(tmp_path / "flux2", published)
    again = load_vae(tmp_path / "flux2")
    assert again.module == module
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))


def test_fitted_statistics_replace_those_that_were_published(tmp_path):
    published = load_vae(write_vae(tmp_path / "flux2", "flux2"))
    fitted = published._replace(shift=published.shift + 1, scale=2 * published.scale)
    save_vae(tmp_path / "fitted", fitted)
    again = load_vae(tmp_path / "fitted")
    np.testing.assert_array_equal(again.shift, fitted.shift)
    # The variance is rounded to float32 once, which halves in its root; then the scale is.
    np.testing.assert_allclose(again.scale, fitted.scale, rtol=2e-7)
    with pytest.raises(ValueError, match="scales above 100 have no batch normalisation"):
        save_vae(tmp_path / "large", published._replace(scale=published.scale * 1e4))


def test_a_single_file_of_stable_diffusion(tmp_path):
    """The names and layouts of CompVis: attention of 1x1 convolutions, levels of the decoder counted from the image."""
    expected, weights = load_vae(write_vae(tmp_path / "sd1", "sd1")), {}
    for name, array in weights_of("sd1").items():
        if name.startswith("decoder.up_blocks."):
            name = (
                name.replace("blocks.0", "blocks.x").replace("blocks.1.", "blocks.0.").replace("blocks.x", "blocks.1")
            )
        if "attentions" in name and array.ndim == 2:
            array = array[:, :, None, None]
        for theirs, original in ORIGINAL.items():
            name = name.replace(theirs, original)
        weights[f"first_stage_model.{name}"] = array
    path = tmp_path / "sd.safetensors"
    save_file(weights | {"model.diffusion_model.out.0.bias": np.zeros(3, np.float32)}, path)
    found = load_original(path, 0.18215, prefix="first_stage_model.", groups=4)
    assert found.module == expected.module
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, expected.params))
    np.testing.assert_array_equal(found.scale, expected.scale)
    with pytest.raises(ValueError, match="does not hold the scaling factor of its latents: name it"):
        load_original(path, prefix="first_stage_model.", groups=4)
    with pytest.raises(
        ValueError, match=r"is a Stable Diffusion checkpoint in one file: with prefix='vae.' it holds no"
    ):
        load_original(path, 1.0, prefix="vae.")
    with pytest.raises(ValueError, match=r"in one file: with prefix='' it holds no autoencoder"):
        load_original(path, 1.0, groups=4)


def test_pipelines_variants_halves_and_old_names(tmp_path):
    expected = load_vae(write_vae(tmp_path / "sd1", "sd1"))
    folder = write_vae(tmp_path / "pipeline" / "vae", "sd1")
    (folder / FILE).unlink()
    weights = {name: array.astype(np.float16) for name, array in weights_of("sd1").items()}
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(new, old): array for name, array in weights.items()}  # before diffusers 0.15
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    found = load_autoencoder(tmp_path / "pipeline", variant="fp16", dtype=ml_dtypes.bfloat16)
    assert found.module == expected.module
    for half, whole in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        assert half.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(half, whole.astype(np.float16).astype(ml_dtypes.bfloat16))
    save_vae(tmp_path / "half", found)
    assert {array.dtype for array in load_file(tmp_path / "half" / FILE).values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize(
    "case, fields, message",
    [
        ("sd1", dict(act_fn="gelu"), "our AutoencoderKL cannot honour act_fn='gelu' .only 'silu' or 'swish'."),
        ("sd1", dict(norm_type="spatial"), "diffusers' AutoencoderKL has no field norm_type"),
        (
            "sd1",
            dict(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
            "down_block_types is .*ours has",
        ),
        ("sd1", dict(up_block_types=["UpDecoderBlock2D"]), "up_block_types is .*at all 2 levels"),
        ("sd1", dict(out_channels=4), "maps images of 3 channels to 4"),
        ("sd1", dict(latent_channels=0), "latent_channels is 0, not a whole number of at least 1"),
        ("sd1", dict(block_out_channels="8"), "block_out_channels is '8', not a list of channels"),
        ("sd1", dict(norm_num_groups=3), "3 groups do not divide 8 channels"),
        ("sd1", dict(scaling_factor=0), "scaling_factor holds 0, not a number above 0"),
        ("sd1", dict(scaling_factor=None), "scaling_factor holds None, not a number"),
        ("sd1", dict(shift_factor=float("nan")), "shift_factor holds nan, not a number"),
        ("sd1", dict(latents_mean=[0, 0, 0, 0]), "latents_mean and latents_std belong together"),
        ("no_attention", dict(latents_std=[1, 2]), "latents_std is .1, 2., not one number for each of 4 channels"),
        ("no_attention", dict(latents_std=[1, 1, 1, 0]), "latents_std holds 0, not a number above 0"),
        ("no_attention", dict(shift_factor=0.5), "both a shift_factor and latents_mean"),
        ("sd1", dict(layers_per_block=2), "weights do not fit this autoencoder: missing .*left over none"),
        ("sd1", dict(latent_channels=8), r"has shape \[16, 4, 3, 3\], but this autoencoder needs \[16, 8, 3, 3\]"),
        ("sd3", dict(use_quant_conv=True), "missing quant_conv.bias, quant_conv.weight"),
        ("sd1", dict(mid_block_add_attention=False), "left over decoder.mid_block.attentions.0.group_norm.bias"),
        ("flux2", dict(patch_size=[1, 2]), r"patch_size is \[1, 2\]: ours has square patches"),
        ("flux2", dict(patch_size=[1, 1]), r"bn.running_mean has shape \[128\], .* needs \[32\]"),
        (
            "flux2",
            dict(decoder_block_out_channels=[4]),
            "decoder_block_out_channels has 1 levels, block_out_channels 2",
        ),
        ("flux2", dict(batch_norm_eps=-1.0), "batch_norm_eps holds -1.0, not a number above 0"),
        ("flux2", dict(scaling_factor=1.0), "diffusers' AutoencoderKLFlux2 has no field scaling_factor"),
        ("tiny", dict(act_fn="silu"), "our AutoencoderTiny cannot honour act_fn='silu'"),
        ("tiny", dict(scaling_factor=0.5), "our AutoencoderTiny cannot honour scaling_factor=0.5"),
        ("tiny", dict(encoder_block_out_channels=[8, 8, 16]), "its levels have 8, 16 channels"),
        ("tiny", dict(num_encoder_blocks=[1, 2]), "as many in the encoder as in the decoder"),
        (
            "tiny",
            dict(num_encoder_blocks=[1, 2, 2]),
            "weights do not fit this tiny autoencoder: missing encoder.layers.7",
        ),
        (
            "sd1",
            dict(_class_name="AutoencoderDC"),
            "is an autoencoder .AutoencoderDC.: needed is the",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(case, fields, message, tmp_path):
    folder = edit(write_vae(tmp_path / case, case), **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_autoencoder(folder)
    assert "\n" not in str(error.value)


def test_other_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is a folder without config.json.*needed is the folder of an AutoencoderKL"):
        load_autoencoder(tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"is an autoencoder .AutoencoderTiny.: needed is the folder of an AutoencoderKL"
    ):
        load_vae(write_vae(tmp_path / "tiny", "tiny"))
    with pytest.raises(
        ValueError, match=r"is an autoencoder .AutoencoderKL.: needed is the folder of an AutoencoderTiny"
    ):
        load_tiny(write_vae(tmp_path / "sd1", "sd1"))
    with pytest.raises(ValueError, match="there is no such file"):
        load_original(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is there already"):
        save_vae(tmp_path / "sd1", load_vae(tmp_path / "sd1"))


def test_taesd_pairs(tmp_path):
    folder = write_pair(tmp_path / "pair", "taef2_seeded")
    published = load_autoencoder(folder)
    # FLUX.2's latents after its normalisation: patches of 2x2 of them are its channels.
    assert (published.patch, published.sampled, published.shift.shape) == (2, False, (128,))
    assert (published.shift == 0).all() and (published.scale == 1).all()
    with pytest.raises(ValueError, match="neither the normalisation of TAEF2's blocks nor patches"):
        save_tiny(tmp_path / "ours", published)
    encoder = folder / "taef2_encoder.safetensors"
    shutil.copy(encoder, folder / "taesd_encoder.safetensors")
    with pytest.raises(ValueError, match="needed is one pair"):
        load_autoencoder(folder)
    (folder / "taesd_encoder.safetensors").unlink()
    weights = load_file(encoder)
    save_file({name: array for name, array in weights.items() if name != "2.weight"}, encoder)
    with pytest.raises(ValueError, match="do not fit together: convolutions make 3 levels of one, 4 of the other"):
        load_autoencoder(folder)
    save_file({"other": weights["0.weight"]}, encoder)
    with pytest.raises(ValueError, match=r"taef2_encoder.safetensors is .*: needed is an encoder of TAESD"):
        load_autoencoder(folder)
    encoder.unlink()
    with pytest.raises(ValueError, match=r"needed is one pair, NAME_encoder.pth and NAME_decoder.pth"):
        load_autoencoder(folder)


def test_only_what_diffusers_has_is_written(tmp_path):
    tiny = load_tiny(write_vae(tmp_path / "tiny", "tiny"))
    with pytest.raises(ValueError, match="have shift 0 and scale 1, but these have others"):
        save_tiny(tmp_path / "ours", tiny._replace(scale=2 * tiny.scale))
    sd1 = load_vae(write_vae(tmp_path / "sd1", "sd1"))
    with pytest.raises(ValueError, match="this one has other decoder_channels"):
        save_vae(tmp_path / "ours", sd1._replace(module=sd1.module.clone(decoder_channels=(4, 8))))
    assert not (tmp_path / "ours").exists()
