"""--mode=check --target: chips, the roofline, the report; a step for chips that are not there, where plugins are."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SMALL, SMALL_TEXT, make_call
from test_hlo import UNET
from test_training import BATCH_SIZE, make_experiment, settings

from diffusion import compiler
from diffusion.networks import attention
from diffusion.runs.target import report, source_of, to_json, training_batch, verdict
from diffusion.runs.train import describe
from diffusion.training import RunError, ahead, make_mesh
from diffusion.training.ahead import PLUGINS, Ahead, compile_step, is_installed, link_seconds, roofline
from diffusion.training.chips import CHIPS, gpu_config, parse_target
from diffusion.training.flops import count_flops
from diffusion.training.program import Collective, Program
from experiments import cifar10, digits, scenes

ROOT = Path(__file__).parent.parent
BATCH = {"x": jax.ShapeDtypeStruct((BATCH_SIZE, 8), np.float32)}


def compiled(spec: str, num_devices: int) -> Ahead:
    """A step of the trainer's test compiled for as many CPUs, as if they were the chips of `spec`."""
    return compile_step(make_experiment(), settings(), parse_target(spec), make_mesh(num_devices), BATCH)


def test_targets_are_chips_and_how_many_or_the_sides_of_a_slice():
    assert parse_target("h100").topology == "1x1x1" and parse_target("h200:8").topology == "1x1x8"
    assert parse_target("a100:16").topology == "1x2x8"  # two hosts
    assert parse_target("v5e:4x4").count == 16 and parse_target("v5p:2x2x2").count == 8


@pytest.mark.parametrize(
    "spec, words",
    [
        ("h1000:8", "no chip 'h1000' is known: choose from h100, h200, a100, v5e"),
        ("h100:0", "'0' is no size: write h100:8"),
        ("h100:2x4", "GPUs have no sides: write h100:8"),
        ("h100:12", "whole hosts of 8"),
        ("v5e:16", "a slice of v5e has 2 sides, as v5e:2x2"),
        ("v5p:4x4", "a slice of v5p has 3 sides"),
        ("v5e:1x2", "the first two sides of a slice of several chips are even"),
    ],
)
def test_targets_that_are_none_are_refused(spec, words):
    with pytest.raises(RunError, match=words):
        parse_target(spec)


def test_a_gpus_text_holds_what_its_chip_says():
    text = gpu_config(CHIPS["a100"])
    assert "core_count: 108" in text and "major: 8 feature_extension: NONE" in text
    assert "device_memory_size: 85100068864" in text and "memory_bandwidth: 2039040000000" in text


def test_flops_are_those_of_products_in_loops_and_branches():
    def f(w, x):
        y, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)
        kernel = jnp.ones((3, 3, 2, 5), jnp.bfloat16)
        image = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
        numbers = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jax.lax.cond(z.sum() > 0, lambda: y @ w @ w, lambda: y @ w)

    found = count_flops(jax.make_jaxpr(f)(jnp.ones((8, 8)), jnp.ones((4, 8))))
    product = 2 * 4 * 8 * 8
    assert found == {"float32": 3 * product + 2 * product, "bfloat16": 2 * 16 * 5 * 9 * 2}


def test_of_branches_for_platforms_the_one_of_bfloat16_counts():
    x = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)
    wide = lambda x, w: (x.astype(jnp.float32) @ w.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    f = lambda x, w: jax.lax.platform_dependent(x, w, cpu=wide, default=jnp.matmul)  # noqa: E731
    assert count_flops(jax.make_jaxpr(f)(*x)) == {"bfloat16": 2 * 4 * 8 * 2}


def test_the_roofline_of_a_program_is_that_of_its_bytes_and_flops():
    chip, target = CHIPS["h100"], parse_target("h100:2")
    program = Program(UNET)
    times = roofline(program, Counter({"bfloat16": int(2 * 989e12)}), target)
    assert times.products == pytest.approx(1.0)  # two chips' work of a second
    # Products and convolutions hide their bytes behind a second of work; the reduction and the copy do not.
    others = [one for one in program.kernels if one.kind in ("reduction", "copy")]
    assert times.memory == pytest.approx(sum(one.read + one.written for one in others) / chip.bandwidth)
    seconds = [(one.read + one.written) / chip.bandwidth for one in program.kernels]
    assert times.launches == pytest.approx(sum(max(0.0, chip.launch - s) for s in seconds)) and times.launches > 0
    assert times.floor == pytest.approx(times.products + times.memory + times.launches)


@pytest.mark.parametrize(
    "kind, size, sent", [("all-reduce", 8.0, 14.0), ("all-gather", 8.0, 7.0), ("reduce-scatter", 1.0, 7.0)]
)
def test_rings_send_each_part_to_every_other_device(kind, size, sent):
    # Of 8 parts on 8 devices each sends 7; an all-reduce is a scatter and a gather.
    assert link_seconds(Collective(kind, size, 8, 1), CHIPS["h100"]) == pytest.approx(sent / 450e9)


def test_a_step_is_compiled_and_reported():
    found = compiled("h100:2", 2)
    # w and b, float32: 513 numbers, of the average and of Adam's two moments as well, and Adam's count.
    assert found.memory["parameters"] == found.memory["averages"] == 513 * 4
    assert found.memory["optimizer"] == 2 * 513 * 4 + 4
    assert found.memory["batch"] == BATCH_SIZE * 8 * 4 / 2  # of two devices each has half
    # Forward two products, backward four, but none for the gradient by the noise.
    assert found.flops["float32"] % (2 * BATCH_SIZE * 8 * 64) == 0
    lines = report(found, "data:2,fsdp:1,tensor:1", BATCH_SIZE, ["a note"])
    assert max(map(len, lines)) <= 100 and lines[-1].startswith("fits: ") and "a note" in lines[1]
    assert any(line.split()[:1] == ["all-reduce"] for line in lines)
    plain = json.loads(json.dumps(to_json(found, BATCH_SIZE)))
    assert plain["collectives"]["all-reduce"]["count"] >= 1 and plain["fits"] == lines[-1]


def test_a_step_that_does_not_fit_is_told_apart_and_by_how_much():
    found = compiled("h100:2", 2)
    tight = found._replace(target=found.target._replace(chip=found.target.chip._replace(memory=found.needed)))
    assert verdict(tight).startswith("does not fit: ") and "too much per device" in verdict(tight)
    close = found._replace(target=found.target._replace(chip=found.target.chip._replace(memory=found.needed / 0.9)))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.94" in verdict(close)
    assert "made no program (why)" in verdict(found._replace(refused="why", program=None))


def test_a_batch_is_that_of_training(tmp_path):
    call = make_call(scenes.TASK, "scenes", tmp_path, *SMALL_TEXT, "--config.data.num_examples=64", "--mode=check")
    source, notes = source_of(call)
    model, _ = describe("scenes", call.config, source, None, scenes.VOCABULARY)
    batch = training_batch(call.config, model)
    assert notes == [] and batch["text"].shape == (16, 12) and batch["image"].shape == (16, 16, 16, 3)


def test_data_that_are_not_there_are_stood_in_for_by_a_size(tmp_path):
    flags = ("--config.data.name=folder", f"--config.data.dir={tmp_path / 'none'}", "--mode=check")
    call = make_call(cifar10.TASK, "cifar10", tmp_path, *flags)
    with pytest.raises(RunError, match=r"give --config\.data\.image_size=SIDE"):
        source_of(call)
    call.config.data.image_size = 32
    source, notes = source_of(call)
    assert source.image_shape == (32, 32, 3) and notes[0].startswith("no data: images of 32x32x3 are assumed")


@pytest.mark.parametrize("spec", ["h100:8", "v5e:2x2"])
def test_a_plugin_that_is_missing_is_named_in_one_line(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(ahead, "is_installed", lambda name: False)
    with pytest.raises(RunError, match=r"is not installed: pip install 'diffusion-jax\[aot\]'"):
        make_call(digits.TASK, "digits", tmp_path, *SMALL, "--mode=check", f"--target={spec}")


@pytest.mark.parametrize("devices, largest", [(("9.0", "9.0"), 256), (("8.0",), 128), ((None,), 0)])
def test_kernels_are_chosen_by_the_gpus_of_the_target(monkeypatch, devices, largest):
    """In this process, whose own devices are CPUs; a TPU has no capability, and changes nothing."""
    jaxs = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(jaxs, "check_compute_capability", jaxs.check_compute_capability)  # to be set back
    monkeypatch.setattr(compiler, "TARGET", [])
    monkeypatch.setattr(attention, "_has_plugin", lambda: largest > 0)
    ahead.trace_for([SimpleNamespace(**({"compute_capability": found} if found else {})) for found in devices])
    assert attention.largest_head() == largest and len(compiler.TARGET) == (len(devices) if largest else 0)
    assert jaxs.check_compute_capability("9.0") is (largest == 256)


def test_a_jax_that_cannot_be_told_of_the_target_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(compiler, "TARGET", [])
    monkeypatch.delattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability")
    ahead.trace_for([SimpleNamespace(compute_capability="9.0")])
    assert "heads over 128 is counted without kernels" in caplog.text and not compiler.TARGET


def test_a_target_is_for_checks(tmp_path):
    with pytest.raises(RunError, match="--target is not read by --mode=sample, but by check"):
        make_call(digits.TASK, "digits", tmp_path, "--mode=sample", "--target=h100")


def check_for(spec: str, folder: Path, *arguments: str) -> dict:
    """Compiles a run's step for a machine in a process of its own, as a user does, and returns what it reports."""
    if missing := [name for name in PLUGINS[parse_target(spec).chip.platform] if not is_installed(name)]:
        pytest.skip(f"{missing[0]} is not installed: pip install 'diffusion-jax[aot]'")
    command = [sys.executable, "-m", *arguments, "--mode=check", f"--target={spec}", f"--workdir={folder}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("fits: ")
    return json.loads((folder / "check" / f"{spec.replace(':', '_')}.json").read_text())


@pytest.mark.parametrize("spec", ["h100:2", "v5e:2x2"])
def test_a_tiny_step_compiles_for_a_machine_that_is_not_there(tmp_path, spec):
    changes = (*SMALL_TEXT, "--config.optimizer.name=adam", "--config.training.ema_profiles=()")
    found = check_for(spec, tmp_path, "experiments.scenes", *changes)
    assert found["kernels"]["in all"]["count"] > 50 and "all-reduce" in found["collectives"]


def test_fused_norms_are_kernels_on_every_gpu_of_a_mesh(tmp_path):
    """Of each norm a kernel and its gradient's, and no device gathers the others' images for them."""
    changes = (*SMALL, "--config.network.fused_norms=True", "--config.network.dtype=bfloat16")
    found = check_for("h100:2", tmp_path, "experiments.digits", *changes)
    norms = 5 * 2 + 1 + 1  # two in a block, attention's, the last one
    assert found["kernels"]["custom"]["count"] == 2 * norms
    assert set(found["collectives"]) == {"all-reduce"}
