"""Files of published weights: shards, variants, halves and hub caches are read one array at a time, or refused."""

import json
import os
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from published_folders import write_folder
from safetensors.numpy import load_file, save_file
from test_torch_files import Storage, as_zip, dumps, tensor

from diffusion.pretrained.folder import read_json, read_weights, resolve, weights_files
from diffusion.pretrained.strict import check_keys, shapes_of
from diffusion.pretrained.unet import load_unet

STEM = "diffusion_pytorch_model"
RNG = np.random.RandomState(0)
WEIGHTS = {"a.weight": RNG.randn(3, 4).astype(np.float32), "a.bias": RNG.randn(3).astype(np.float32)}
INDEX = f"{STEM}.safetensors.index.json"


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].shape == weight.shape
        np.testing.assert_array_equal(np.asarray(found[name]), weight, strict=True)


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards and their index."""
    for number, name in enumerate(WEIGHTS):
        save_file({name: WEIGHTS[name]}, tmp_path / f"part-{number}.safetensors")
    weight_map = {name: f"part-{number}.safetensors" for number, name in enumerate(WEIGHTS)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_floats_become_the_dtype_that_is_wanted(tmp_path, dtype):
    stored = {name: weight.astype(dtype) for name, weight in WEIGHTS.items()} | {"places": np.arange(4)}
    save_file(stored, tmp_path / f"{STEM}.safetensors")
    counters = {"places": np.arange(4)}
    equal(read_weights(tmp_path), {name: stored[name].astype(np.float32) for name in WEIGHTS} | counters)
    equal(read_weights(tmp_path, dtype=None), stored)
    halves = {name: stored[name].astype(ml_dtypes.bfloat16) for name in WEIGHTS} | counters
    equal(read_weights(tmp_path, dtype=ml_dtypes.bfloat16), halves)


def test_shards_are_one_set_of_weights(shards):
    equal(read_weights(shards), WEIGHTS)
    assert [path.name for path in weights_files(shards)] == ["part-0.safetensors", "part-1.safetensors"]


def test_shards_that_do_not_belong_together(shards):
    second, index = shards / "part-1.safetensors", shards / INDEX
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(ValueError, match=r"lacks part-1\.safetensors of 2 shards: download them again"):
        read_weights(shards)
    save_file(WEIGHTS, second)  # the other shard's array too
    with pytest.raises(ValueError, match=r"part-1\.safetensors and its index disagree: .* left over a\.weight"):
        read_weights(shards)
    save_file({"b": WEIGHTS["a.bias"]}, second)
    with pytest.raises(ValueError, match=r"missing a\.bias, left over b"):
        read_weights(shards)
    second.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"part-1\.safetensors is not an intact safetensors file"):
        read_weights(shards)
    for weight_map in ({}, [], None, {"a": "../a.safetensors"}, {"a": 3}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="weight_map"):
            read_weights(shards)


def test_variants(tmp_path):
    for variant, number in [("fp16", 1.0), ("ema", 2.0)]:
        save_file({"a": np.full(2, number, np.float32)}, tmp_path / f"{STEM}.{variant}.safetensors")
    assert np.asarray(read_weights(tmp_path, variant="ema")["a"])[0] == 2
    with pytest.raises(ValueError, match=f"has {STEM} only in the variants ema, fp16: name one"):
        read_weights(tmp_path)
    (tmp_path / f"{STEM}.ema.safetensors").unlink()
    assert np.asarray(read_weights(tmp_path)["a"])[0] == 1  # the only one there is
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / f"{STEM}.safetensors")
    assert np.asarray(read_weights(tmp_path)["a"])[0] == 0
    with pytest.raises(ValueError, match=rf"{STEM}\.bf16\.safetensors cannot be read"):
        read_weights(tmp_path, variant="bf16")


@pytest.mark.parametrize("stem, file", [(STEM, f"{STEM}.bin"), ("model", "pytorch_model.bin"), ("model", "model.bin")])
def test_files_of_pytorch_where_there_is_no_other(tmp_path, stem, file):
    numbers = np.arange(6, dtype=np.float32)
    (tmp_path / file).write_bytes(as_zip(dumps({"a": tensor()}), {"0": numbers.tobytes()}))
    equal(read_weights(tmp_path, stem), {"a": numbers.reshape(2, 3)})
    numbers[4] = np.inf
    (tmp_path / file).write_bytes(
        as_zip(dumps({"a": tensor(), "b": tensor(Storage(key="0"))}), {"0": numbers.tobytes()})
    )
    with pytest.raises(ValueError, match="holds 1 numbers of 6 that are not finite"):
        np.asarray(read_weights(tmp_path, stem)["b"])
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / f"{stem}.safetensors")
    equal(read_weights(tmp_path, stem), {"a": np.zeros((2, 3), np.float32)})


def test_numbers_that_do_not_fit_the_wanted_dtype_are_not_finite(tmp_path):
    save_file({"a": np.array([1.0, 1e300, -1e300])}, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match=rf"{STEM}\.safetensors: a holds 2 numbers of 3 that are not finite"):
        np.asarray(read_weights(tmp_path)["a"])


@pytest.mark.parametrize("dtype, name", [(np.uint8, "U8"), (np.int32, "I32"), (bool, "BOOL")])
def test_dtypes_of_no_weights_are_refused(tmp_path, dtype, name):
    save_file({"a": np.ones(3, dtype)}, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(ValueError, match=f"a is {name}: take this model's file in float32"):
        read_weights(tmp_path)


def test_memory_stays_near_the_weights_size(tmp_path):
    count, size = 8, 1 << 20
    weights = {str(number): np.full(size, number, ml_dtypes.bfloat16) for number in range(count)}
    save_file(weights, tmp_path / f"{STEM}.safetensors")
    del weights
    tracemalloc.start()
    try:
        found = read_weights(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < size  # nothing is read yet
        read = {name: np.asarray(weight) for name, weight in found.items()}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # All in float32, and beside them one array: as stored, and whether its numbers are finite.
    assert sum(weight.nbytes for weight in read.values()) == count * size * 4
    assert peak < count * size * 4 + 4 * size


@pytest.fixture
def cache(tmp_path):
    """A hub's cache directory: snapshots of links to blobs."""
    theirs = write_folder(tmp_path / "theirs", "defaults")
    cache = tmp_path / "models--google--ddpm"
    (cache / "blobs").mkdir(parents=True)
    for file in (path for path in theirs.rglob("*") if path.is_file()):
        link = cache / "snapshots" / "0123abc" / file.relative_to(theirs)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = cache / "blobs" / file.name
        os.replace(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return cache


def test_hub_caches(cache):
    expected = load_unet(cache / "snapshots" / "0123abc")[0]
    assert load_unet(cache)[0] == expected
    (cache / "snapshots" / "other").mkdir()
    with pytest.raises(ValueError, match="is a cache of 2 snapshots: name one"):
        load_unet(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    assert load_unet(cache)[0] == expected
    (cache / "blobs" / f"{STEM}.safetensors").unlink()
    with pytest.raises(
        ValueError, match=rf"{STEM}\.safetensors is a link to a file that is missing: download it again"
    ):
        load_unet(cache)


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/models") == tmp_path / "models"


def test_json_in_any_bytes(tmp_path):
    for content in (b"\xff\xfe", b"", b"3", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_json(tmp_path / "config.json")


def test_the_strict_check():
    shapes = {name: weight.shape for name, weight in WEIGHTS.items()}
    check_keys(WEIGHTS, shapes, "network")
    check_keys(WEIGHTS | {"count": np.zeros(())}, shapes, "network", optional={"count": ()})
    with pytest.raises(ValueError, match=r"count has shape \[1\], but this network needs \[\]"):
        check_keys(WEIGHTS | {"count": np.zeros(1)}, shapes, "network", optional={"count": ()})
    with pytest.raises(ValueError, match=r"a\.bias has shape \[3\], but this network needs \[3, 1\]"):
        check_keys(WEIGHTS, shapes | {"a.bias": (3, 1)}, "network")
    with pytest.raises(ValueError, match=r"this network: missing a\.bias, left over b$"):
        check_keys({"a.weight": WEIGHTS["a.weight"], "b": np.zeros(3)}, shapes, "network")
    with pytest.raises(ValueError, match="missing none, left over 0, 1, 10 and 4997 more") as error:
        check_keys(WEIGHTS | {f"{number}": np.zeros(1) for number in range(5000)}, shapes, "network")
    with pytest.raises(ValueError, match="left over xxx") as error:
        check_keys(WEIGHTS | {"x" * 100_000: np.zeros(1)}, shapes, "network")
    assert len(str(error.value)) < 300


def test_published_shards_are_those_of_the_whole_file(tmp_path):
    """The files that diffusers wrote, and the index it named them in."""
    folder = write_folder(tmp_path, "half_shards") / "unet"
    assert len(weights_files(folder)) == 4 and weights_files(folder) == weights_files(folder, variant="fp16")
    stored = {name: weight for path in weights_files(folder) for name, weight in load_file(path).items()}
    equal(read_weights(folder), {name: weight.astype(np.float32) for name, weight in stored.items()})


def test_a_network_is_traced_once_for_its_shapes():
    calls = []

    class Counted(nn.Module):
        width: int = 3

        @nn.compact
        def __call__(self, x):
            calls.append(x.shape)
            return nn.Dense(self.width)(x)

    x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    first = shapes_of(Counted(), x)
    assert first["Dense_0"].pop("kernel").shape == (2, 3)
    assert shapes_of(Counted(), x)["Dense_0"]["kernel"].shape == (2, 3) and len(calls) == 1
    assert shapes_of(Counted(4), x)["Dense_0"]["kernel"].shape == (2, 4) and len(calls) == 2
