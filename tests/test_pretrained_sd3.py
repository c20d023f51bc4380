"""Stable Diffusion 3's published forms: its authors' names, its folder there and back, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.clip_weights import weight_of
from golden.record_sd3_original import CONTEXT, DEPTH, DUAL, POOLED, TABLE, WIDTH, checksum, shapes
from helpers import make_call
from published_sd3 import FILE, write_pipeline
from published_vaes import weights_of
from safetensors.numpy import load_file, save_file

from diffusion.networks.mmdit import position_table
from diffusion.pretrained import mmdit, mmdit_original, sd3, sd3_text, vae
from diffusion.pretrained.folder import read_file
from diffusion.runs import weights
from diffusion.runs.run import open_run
from diffusion.training import RunError
from experiments.sd3 import TASK

ORIGINAL = np.load(Path(__file__).parent / "golden" / "sd3_original.npz")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a tiny pipeline."""
    return write_pipeline(tmp_path_factory.mktemp("published"))


@pytest.fixture
def copied(published, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(published, tmp_path / "copied")


def original_weights(prefix=""):
    found = {name: weight_of(name, shape) for name, shape in shapes().items()}
    found["pos_embed"] = position_table(TABLE, TABLE, WIDTH, TABLE, mmdit_original.BASE_SIZE)[None]
    return {f"{prefix}{name}": x for name, x in found.items()}


def test_the_authors_names_become_what_diffusers_makes_of_them(tmp_path):
    save_file(original_weights(), tmp_path / "file.safetensors")
    stored = read_file(tmp_path / "file.safetensors")
    network = mmdit_original.network_of(stored)
    assert (network.width, network.depth, network.dual_attention, network.qk_norm) == (WIDTH, DEPTH, DUAL, True)
    assert (network.context_width, network.pooled_width, network.table_size) == (CONTEXT, POOLED, TABLE)
    renamed = mmdit_original.from_original(stored)
    assert renamed.keys() == {*ORIGINAL.files, "pos_embed.pos_embed"} - {"versions"}
    for name in ORIGINAL.files:
        if name != "versions":
            array = np.asarray(renamed[name])
            assert array.shape == renamed[name].shape == tuple(ORIGINAL[name][1:].astype(int))
            # Sums of the same terms, whose order is the processor's: n roundings of at most the sum of their sizes.
            rounding = array.size * 2.0**-53 * np.abs(array).sum()
            assert abs(checksum(array) - ORIGINAL[name][0]) <= 2 * rounding, name
    params = mmdit.from_diffusers(network, renamed)  # which fits, strictly
    assert params["block_0"]["image_qkv"]["kernel"].shape == (WIDTH, 3, 1, WIDTH)
    with pytest.raises(ValueError, match=r"not those of an MM-DiT: joint_blocks\.0\.x_block\.extra"):
        mmdit_original.from_original({**stored, "joint_blocks.0.x_block.extra.weight": stored["pos_embed"]})
    with pytest.raises(ValueError, match="not those of an MM-DiT"):
        mmdit_original.network_of({"encoder.weight": stored["pos_embed"]})


def read_pipeline(folder):
    """The parts of a folder, as a run has them."""
    network, params = mmdit.load_mmdit(folder / "transformer")
    towers = sd3_text.read_towers(folder)
    return sd3.StableDiffusion3(network, params, vae.load_vae(folder), towers, sd3.read_shift(folder))


def test_a_folder_there_and_back_is_the_same_bit_for_bit(published, tmp_path):
    sd3.save_pipeline(tmp_path / "again", read_pipeline(published))
    for part, file in (
        ("transformer", FILE),
        ("vae", FILE),
        *((f"text_encoder{i}", "model.safetensors") for i in ("", "_2", "_3")),
    ):
        ours, theirs = (load_file(folder / part / file) for folder in (tmp_path / "again", published))
        ours.pop("text_model.embeddings.position_ids", None)
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            np.testing.assert_array_equal(ours[name], x)
    assert sd3.is_pipeline(tmp_path / "again") and sd3.read_shift(tmp_path / "again") == 3.0


def test_half_precision_and_shards_are_read(copied):
    path = copied / "transformer"
    whole = load_file(path / FILE)
    half = {name: x.astype(jnp.bfloat16) for name, x in whole.items()}
    (path / FILE).unlink()
    names = sorted(half)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, own in parts.items():
        save_file({name: half[name] for name in own}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (path / f"{FILE}.index.json").write_text(json.dumps(index))
    placed = []

    def put(path, array):
        placed.append(array.nbytes)
        return jax.device_put(array)

    _, params = mmdit.load_mmdit(path, weights_dtype=jnp.bfloat16, put=put)
    leaves = jax.tree.leaves(params)
    assert len(placed) == len(leaves) and all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    kernel = half["context_embedder.weight"].T
    np.testing.assert_array_equal(params["params"]["context_in"]["kernel"], kernel)


def damage(kind, path):
    match kind:
        case "truncated":
            data = (path / "transformer" / FILE).read_bytes()
            (path / "transformer" / FILE).write_bytes(data[: len(data) // 2])
        case "missing":
            (path / "transformer" / FILE).unlink()
        case "shard":
            index = {"weight_map": {"proj_out.bias": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
            (path / "transformer" / FILE).unlink()
            (path / "transformer" / f"{FILE}.index.json").write_text(json.dumps(index))
        case "tokenizer":
            shutil.rmtree(path / "tokenizer_3")
            shutil.copytree(path / "tokenizer", path / "tokenizer_3")
        case "scheduler":
            change(path / "scheduler" / "scheduler_config.json", {"use_dynamic_shifting": True})
        case "pipeline":
            change(path / "model_index.json", {"_class_name": "FluxPipeline"})
        case "transformer":
            change(path / "transformer" / "config.json", {"joint_attention_dim": 41})
        case "field":
            change(path / "transformer" / "config.json", {"qk_norm": "layer_norm"})


def change(path, fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not an intact safetensors file"),
        ("missing", "cannot be read: .*transformer has no such file"),
        ("shard", "lacks diffusion_pytorch_model-00001-of-00002.safetensors of 1 shards"),
        ("tokenizer", "tokenizer_3"),
        ("scheduler", "cannot honour use_dynamic_shifting=True"),
        ("pipeline", "is a FLUX.1 pipeline"),
        ("transformer", r"context_embedder.weight has shape \[16, 40\], but this MM-DiT needs \[16, 41\]"),
        ("field", "cannot honour qk_norm='layer_norm'"),
    ],
)
def test_damaged_folders_are_refused_before_anything_is_written(copied, tmp_path, kind, message):
    damage(kind, copied)
    call = make_call(TASK, "sd3", tmp_path / "run", "--mode=import", f"--weights={copied}")
    with pytest.raises(Exception, match=message) as refused:
        weights.import_weights(call)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
    assert not (tmp_path / "run").exists()


def test_other_sizes_than_the_autoencoder_has_are_refused(published, tmp_path):
    sizes = "--config.sampling.size=(17, 16)"
    call = make_call(TASK, "sd3", tmp_path / "run", "--mode=import", f"--weights={published}", sizes)
    with pytest.raises(ValueError, match="17x16x3 have no whole latents"):
        weights.import_weights(call)


@pytest.mark.filterwarnings("ignore:a text of .* tokens is truncated")
def test_a_single_file_becomes_a_pipeline(published, tmp_path):
    """The published parts under their authors' names, with the text encoders that a file holds."""
    found = original_weights(mmdit_original.PREFIX)
    for name, (suffix, _, prefix) in sd3_text.PARTS.items():
        own = load_file(published / f"text_encoder{suffix}" / "model.safetensors")
        found |= {f"{prefix}{key}": x for key, x in own.items() if name != "clip_l" or key != "text_projection.weight"}
    autoencoder = {key: x for key, x in weights_of("flux2_original").items() if not key.startswith("bn.")}
    found |= {f"first_stage_model.{key}": x for key, x in autoencoder.items()}
    save_file(found, tmp_path / "sd3.safetensors")
    pipeline = sd3.read_single_file(tmp_path / "sd3.safetensors", published)
    assert pipeline.shift == 3.0 and set(pipeline.towers) == {"clip_l", "clip_g", "t5"}
    assert pipeline.network.depth == DEPTH
    np.testing.assert_allclose(pipeline.autoencoder.shift, 0.0609)

    flags = ("--mode=import", f"--weights={tmp_path / 'sd3.safetensors'}", "--config.condition.length=16")
    with pytest.raises(RunError, match="holds no tokenizers: add --tokenizers=DIR"):
        weights.import_weights(make_call(TASK, "sd3", tmp_path / "run", *flags))
    weights.import_weights(make_call(TASK, "sd3", tmp_path / "run", *flags, f"--tokenizers={published}"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    run = open_run(tmp_path / "run", num_devices=1)
    kernel = run.params["network"]["params"]["block_1"]["image_qkv"]["kernel"]
    np.testing.assert_array_equal(
        kernel, pipeline.params["params"]["block_1"]["image_qkv"]["kernel"].astype(kernel.dtype)
    )
    drawn = run.sample(prompts=["a cat"], num_samples=1, num_steps=1, size=(4, 8))
    assert drawn.shape == (1, 4, 8, 3)
