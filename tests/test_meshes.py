"""Meshes of data, fsdp and tensor: what they are made of, what they cut, and that a run is the same on all of them."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SHORT, SMALL, make_call
from jax.sharding import PartitionSpec
from test_training import WIDE, init_width, make_experiment, settings

from benchmarks import meshes
from diffusion.networks import clip, mmdit, unet
from diffusion.training import RunError, batch_sharding, make_mesh, on_mesh, sharding, train
from diffusion.training.dry_run import dry_run
from diffusion.training.sharding import mesh_sizes, partition, state_shardings
from experiments import digits

EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
RULES = (("w$", (None, "tensor")),)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("", (8, 1, 1)),
        ("data:8", (8, 1, 1)),
        ("fsdp:8", (1, 8, 1)),
        ("fsdp:-1", (1, 8, 1)),
        ("fsdp:4", (2, 4, 1)),
        ("tensor:2, fsdp:2", (2, 2, 2)),
        ("data:1,fsdp:-1,tensor:4", (1, 2, 4)),
    ],
)
def test_a_mesh_is_made_of_its_sizes(spec, sizes):
    mesh = make_mesh(spec=spec)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert batch_sharding(mesh).shard_shape((16, 3)) == (16 // (sizes[0] * sizes[1]), 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data:3", "training.mesh=data:3 is a mesh of 3 devices, and there are 8"),
        ("fsdp:3", "is a mesh of a multiple of 3 devices, and there are 8"),
        ("data:2,fsdp:2", "is a mesh of 4 devices, and there are 8"),
        ("model:8", "'model' is no axis: write sizes of data, fsdp and tensor"),
        ("data", "'data' has no size"),
        ("data:0", "'data' has no size"),
        ("data:4,data:2", "'data' is given twice"),
        ("data:-1,fsdp:-1", "only one axis can be -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_in_one_line(spec, message):
    with pytest.raises(RunError, match=re.escape(message)) as refused:
        mesh_sizes(spec, 8)
    assert "\n" not in str(refused.value)


def test_tensor_stays_within_a_process(monkeypatch):
    devices = [SimpleNamespace(process_index=number // 2) for number in range(8)]
    monkeypatch.setattr(sharding, "find_devices", lambda: devices)
    with pytest.raises(RunError, match="tensor:4 reaches over several processes"):
        make_mesh(spec="tensor:4")


def test_a_mesh_that_does_not_fit_the_run_is_refused_before_anything_is_written(tmp_path):
    flags = (*SMALL, *SHORT, "--config.training.mesh=tensor:5")
    with pytest.raises(RunError, match="multiple of 5 devices"):
        make_call(digits.TASK, "digits", tmp_path / "run", *flags)
    with pytest.raises(RunError, match=r"batch of 16 cannot be split into 8 devices x 3 .*data:4,fsdp:2,tensor:1"):
        dry_run(
            make_experiment(), settings(accumulate=3), mesh=make_mesh(spec="fsdp:2"), num_examples=9, folder=tmp_path
        )
    tiny = meshes.tiny_run({**meshes.TINY, "network.width": 36, "network.num_heads": 3})
    with pytest.raises(
        RunError, match=r"tensor:2 does not divide 3, axis 0 of .*/image_out/kernel \(3, 12, 36\): choose"
    ):
        meshes.make_experiment(tiny.config, tiny.model, tiny.source, make_mesh(spec="tensor:2"))
    assert list(tmp_path.iterdir()) == []


def test_tables_cut_what_they_name_and_fsdp_the_longest_axis_that_is_left():
    def cut(path, shape, rules, sizes=EIGHT, **options):
        return partition(path, shape, sizes, rules, **options)

    path = "opt_state/0/mu/params/block_0/image_qkv/kernel"
    assert cut(path, (64, 3, 4, 16), mmdit.RULES) == PartitionSpec("fsdp", None, "tensor", None)
    assert cut("ema/params/block_3/text_mlp_1/kernel", (64, 256), mmdit.RULES) == PartitionSpec("fsdp", "tensor")
    assert cut("params/block_3/text_mlp_1/bias", (256,), mmdit.RULES) == PartitionSpec("tensor")
    assert cut("params/patch_out/kernel", (64, 128), mmdit.RULES) == PartitionSpec(None, "fsdp")
    assert cut("params/patch_out/bias", (128,), mmdit.RULES) == PartitionSpec()  # small
    assert cut("params/text/block_1/query/kernel", (64, 64), clip.RULES) == PartitionSpec("fsdp", "tensor")
    conv = "params/down_0_block_1/conv_2/kernel"
    assert cut(conv, (3, 3, 32, 64), unet.RULES) == PartitionSpec(None, None, "tensor", "fsdp")
    # Another shape under the same name, as the factored moments of some optimizers: the table is not for it.
    assert cut(path, (64, 128), mmdit.RULES) == PartitionSpec(None, "fsdp")
    assert cut("w", (63, 65), ()) == PartitionSpec()  # nothing divides
    both = ("data", "fsdp")
    assert cut("w", (64, 128), (), spread=both) == PartitionSpec(None, both)
    assert cut("w", (64, 128), (), {"data": 8, "fsdp": 1, "tensor": 1}, spread=both) == PartitionSpec(None, "data")
    assert cut("w", (64, 128), (), {"data": 8, "fsdp": 1, "tensor": 1}) == PartitionSpec()


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.contrib.muon(1e-2), optax.sgd(1e-2, momentum=0.9)])
def test_averages_and_moments_are_cut_like_their_parameter(optimizer):
    params = {"w": jnp.zeros((8, WIDE)), "b": jnp.zeros(())}
    placed = state_shardings(
        make_mesh(spec="fsdp:2,tensor:2"), {"params": params, "opt": optimizer.init(params)}, RULES
    )
    moments = [
        sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(placed["opt"])
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("/w")
    ]
    assert moments and {sharding.spec for sharding in moments} == {placed["params"]["w"].spec}
    assert placed["params"]["w"].spec == PartitionSpec("fsdp", "tensor")


def test_a_checkpoint_of_one_mesh_is_resumed_on_another(tmp_path):
    experiment = make_experiment(init=init_width(WIDE), rules=RULES)

    def run(folder, spec, **changes):
        folder.mkdir(exist_ok=True)
        description: Any = {"experiment": "test", "config": {}}
        return train(
            experiment, settings(**changes), workdir=folder, mesh=make_mesh(spec=spec), description=description
        )

    whole = run(tmp_path / "whole", "")
    run(tmp_path / "parts", "fsdp:8", num_steps=4)
    run(tmp_path / "parts", "fsdp:2,tensor:2", num_steps=8)
    parts = run(tmp_path / "parts", "data:2,tensor:4")
    assert int(parts.step) == 12 and parts.params["w"].addressable_shards[0].data.shape == (8, WIDE // 4)
    # float32 sums in another order: a few units of 2^-24 a step.
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-4, atol=1e-5)


def test_a_dry_run_reports_the_mesh_and_what_each_device_holds(tmp_path):
    experiment = make_experiment(init=init_width(WIDE), rules=RULES)
    mesh = make_mesh(spec="fsdp:2,tensor:2")
    found = dry_run(experiment, settings(), mesh=mesh, num_examples=100, folder=tmp_path / "check")
    assert found.warnings == []
    assert "mesh         data:2,fsdp:2,tensor:2" in found.lines
    (row,) = [" ".join(line.split()) for line in found.lines if "params" in line and "split" in line]
    size = 4 * 8 * WIDE / 4 / 1e6
    assert row == f"params 1 arrays split along axis 0 over fsdp, axis 1 over tensor {size:.1f} MB per device"


@pytest.mark.parametrize("scan", [False, True])
def test_fsdp_gathers_weights_and_never_the_images_of_a_batch(scan):
    network = mmdit.MMDiT(
        width=64, depth=3, num_heads=2, out_channels=3, context_width=8, pooled_width=8, table_size=8, base_size=8
    ).clone(scan=scan)
    mesh = make_mesh(spec="fsdp:8")

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))

    inputs = dict(x_t=array(16, 16, 16, 3), time=array(16), context=array(16, 12, 8), pooled=array(16, 8))
    params = jax.eval_shape(network.init, jax.random.key(0), **inputs)
    placed = state_shardings(mesh, params, mmdit.RULES)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
    apply = on_mesh(mesh, lambda params, inputs: network.apply(params, **inputs))
    program = jax.jit(apply, out_shardings=batch_sharding(mesh)).lower(params, inputs).compile().as_text() or ""
    gathered = [tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", program)]
    assert (64, 256) in gathered and (256, 64) in gathered
    tokens = 16 * 8 * 8
    assert not [shape for shape in gathered if tokens in shape or (shape[0] == 16 and len(shape) > 2)]
    assert not re.search(rf"f32\[{tokens},\S* all-reduce\(", program)


@pytest.fixture
def quickly_compiled():
    """Programs that run once need not be optimised."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_run_has_the_same_losses_and_samples_on_every_mesh(quickly_compiled):
    tiny = meshes.tiny_run({**meshes.TINY, "network.depth": 1, "optimizer.name": "adam"})
    table = meshes.compare_meshes(tiny, ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"], num_steps=3)
    first, *others = table.values()
    assert first["losses"][0] != first["losses"][-1]
    for other in others:
        assert other["largest relative difference"] < 1e-5
        assert other["largest difference of samples"] <= 1  # a value on the edge between two levels
        assert other["MB per device"]["parameters"] < 0.6 * first["MB per device"]["parameters"]
