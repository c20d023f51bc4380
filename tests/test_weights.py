"""--mode=import and --mode=export: published models become runs, runs published folders; no data is read for either."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from golden.record_adm import CASES as ADM_FLAGS
from golden.record_adm import random_weights
from helpers import do_call
from published_folders import GOLDEN, NAMES, write_folder
from safetensors.numpy import save_file

from diffusion import training
from diffusion.data.samples import load_samples
from diffusion.model.config import make_settings
from diffusion.model.experiment import abstract_batch, make_learner
from diffusion.pretrained.pipeline import load_pipeline
from diffusion.pretrained.unet import load_unet
from diffusion.runs.run import open_run, read_description
from diffusion.training import RunError
from diffusion.training.checkpoints import open_existing
from experiments import cifar10, digits

SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ADM = np.load(GOLDEN / "adm_tiny.npz")
BLIND = cifar10.TASK._replace(read=None)  # reading data is an error


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "theirs")


@pytest.fixture
def do(tmp_path):
    """do(mode, *flags) -> the folder of the run, of which a mode is done without any data."""

    def do(mode, *arguments, run="run", task=BLIND):
        return do_call(task, task.name, tmp_path / run, f"--mode={mode}", *arguments).workdir

    return do


def raw_params(folder, run):
    """Returns the weights that training would go on with."""
    learner, batch = make_learner(run.config, run.model), abstract_batch(run.config, run.model)
    abstract = training.abstract_train_state(learner, make_settings(run.config), run.mesh, batch)
    with open_existing(folder) as checkpoints:
        return checkpoints.restore(abstract).params


def equal(tree, other):
    """Raises AssertionError unless trees have the same bits."""
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_published_folder_becomes_a_run_and_the_run_that_folder(do, folder, tmp_path):
    made = do("import", f"--weights={folder}", "--config.data.dir=/data")
    stored: Any = read_description(made)
    assert stored["experiment"] == json.loads((made / "config.json").read_text())["experiment"] == "cifar10"
    (file,) = stored["weights"]
    assert file["file"] == "diffusion_pytorch_model.safetensors" and len(file["sha256"]) == 64
    run = open_run(made, num_devices=1)
    config = run.config
    assert config.network.multipliers == (1, 2) and config.network.dtype == "float32" and config.data.dir == "/data"
    assert config.sampling.sampler.to_dict() == {"name": "ancestral", "variance": "large"}
    assert config.sampling.num_steps == 1000 and config.sampling.threshold.name == "clip"
    params = {"params": load_unet(folder)[1]}
    assert run.step == 0
    equal(run.params, params)
    equal(raw_params(made, run), params)

    out = tmp_path / "samples.npz"
    do("sample", "--num_samples=3", "--steps=2", f"--out={out}")
    assert load_samples(out).shape == (3, 32, 32, 3)

    do("export", f"--weights={tmp_path / 'ours'}")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    theirs, ours = (json.loads((root / SCHEDULER).read_text()) for root in (folder, tmp_path / "ours"))
    assert {**theirs, **ours} == theirs


@pytest.mark.parametrize(
    "case",
    # Without those whose files alone differ, and "classes", whose threshold is not ours.
    [case for case in NAMES if case not in ("classes", "shards", "half_shards")],
)
def test_every_published_network_and_chain_survives_import_and_export(do, tmp_path, case):
    variant = "fp16" if case == "half" else None
    theirs = write_folder(tmp_path / "theirs", case)
    do("import", f"--weights={theirs}", *([f"--variant={variant}"] if variant else []))
    do("export", f"--weights={tmp_path / 'ours'}")
    expected, found = load_pipeline(theirs, variant), load_pipeline(tmp_path / "ours")
    assert found.network == expected.network and found.image_shape == expected.image_shape
    equal(found.params, expected.params)
    theirs: Any = expected.chain
    # A DDPMScheduler, the only one that is written, has no sampler of its own and always ends in clean data.
    chain = theirs._replace(sampler="ancestral", settings={}, left_out={}, final="zero")
    if theirs.sampler not in ("ancestral", None):
        chain = chain._replace(variance="large")  # DDIM and multistep solvers publish none
    if theirs.spacing != "leading":
        chain = chain._replace(steps_offset=0)  # which nothing else reads
    assert found.chain == chain


def test_a_trained_run_is_exported_and_imported_bit_for_bit(trained, tmp_path):
    source, task = trained("digits_classes"), digits.TASK._replace(read=None)
    exported, back = tmp_path / "published", tmp_path / "back"
    do_call(task, "digits", source, "--mode=export", f"--weights={exported}")
    do_call(task, "digits", back, "--mode=import", f"--weights={exported}")
    run = open_run(source, num_devices=1)
    same = {
        "sampling.sampler": "dpm_solver_pp",
        "sampling.grid": "uniform",
        "sampling.num_steps": 3,
        "sampling.guidance": 1.5,
    }
    again = open_run(back, changes=same, num_devices=1)
    assert run.step == 6
    equal(again.params, run.params)
    assert again.config.sampling.to_dict() == run.config.sampling.to_dict() | {"batch_size": 100}
    np.testing.assert_array_equal(again.sample(4, seed=1), run.sample(4, seed=1))


def test_a_scheduler_at_the_root_is_read(do, folder):
    expected = read_description(do("import", f"--weights={folder}"))["config"]
    (folder / SCHEDULER).rename(folder / "scheduler_config.json")
    (folder / "scheduler").rmdir()
    change(folder / "scheduler_config.json", beta_end=0.03)
    found = read_description(do("import", f"--weights={folder}", run="other"))["config"]
    assert found["process"] == expected["process"] | {"last": 0.03}
    assert found | {"process": expected["process"]} == expected


def test_without_a_scheduler_the_config_is_taken_with_a_warning(do, folder, caplog):
    (folder / SCHEDULER).unlink()
    (folder / "scheduler").rmdir()
    arguments = [f"--weights={folder}", "--config.process.beta=cosine", "--config.sampling.num_steps=7"]
    config: Any = read_description(do("import", *arguments))["config"]
    assert [record.message.split(" has no scheduler")[0] for record in caplog.records] == [str(folder)]
    assert config["process"]["beta"] == "cosine" and config["sampling"]["num_steps"] == 7
    assert not config["loss"]["learned_variance"]


def test_classes_without_a_null_class_are_drawn_but_not_guided(do, tmp_path):
    theirs = write_folder(tmp_path / "theirs", "classes")
    with pytest.raises(RunError, match=r"sample_max_value=1\.5 of a dynamic threshold"):
        do("import", f"--weights={theirs}")
    change(theirs / SCHEDULER, sample_max_value=1.0)
    run = open_run(do("import", f"--weights={theirs}"), num_devices=1)
    assert run.config.sampling.threshold.name == "clip" and run.config.condition.dropout == 0
    one, other = (run.sample(labels=[label], num_steps=2) for label in (0, 2))
    assert one.shape == (1, 8, 8, 3) and np.any(one != other)
    with pytest.raises(ValueError, match="class 3 does not exist"):
        run.sample(labels=[3], num_steps=2)
    with pytest.raises(ValueError, match="needs an embedding of no class, and this model has none"):
        run.sample(labels=[0], num_steps=2, guidance=2.0)
    do("export", f"--weights={tmp_path / 'ours'}")
    expected, found = load_pipeline(theirs), load_pipeline(tmp_path / "ours")
    assert found.network == expected.network and found.network.num_classes == 3
    equal(found.params, expected.params)


def test_the_last_class_is_no_class_where_the_call_says_so(do, tmp_path):
    theirs = write_folder(tmp_path / "theirs", "classes")
    change(theirs / SCHEDULER, sample_max_value=1.0)
    run = open_run(do("import", f"--weights={theirs}", "--null_class"), num_devices=1)
    plain, guided = (run.sample(labels=[1], num_steps=2, guidance=scale) for scale in (1.0, 4.0))
    assert np.any(plain != guided)
    with pytest.raises(ValueError, match="class 2 does not exist"):
        run.sample(labels=[2], num_steps=2)


def adm_file(path, case):
    """Writes a checkpoint of guided-diffusion, and returns its path."""
    shapes = json.loads(str(ADM[f"{case}/shapes"]))
    save_file(random_weights({name: tuple(shape) for name, shape in shapes.items()}), path)
    return path


def test_a_file_of_adm_becomes_a_run_that_computes_what_openais_code_does(do, tmp_path):
    file = adm_file(tmp_path / "model.safetensors", "released")
    heads = f"--config.network.head_channels={ADM_FLAGS['released']['num_head_channels']}"
    flags = ["--config.data.image_size=8", heads, "--config.process.beta=cosine", "--new_attention_order"]
    run = open_run(do("import", f"--weights={file}", *flags), num_devices=1)
    inputs = [ADM[f"released/{name}"] for name in ("x_t", "time", "label")]
    output = jax.jit(run.model.network.apply)(run.params, *inputs)
    # As tests/test_pretrained_adm.py derives; heads or their order taken wrong give 1e-1.
    np.testing.assert_allclose(output, ADM["released/output"], atol=2e-5)
    config = run.config
    assert config.process.beta == "cosine" and config.loss.learned_variance and config.condition.name == "classes"
    assert config.sampling.sampler.variance == "learned" and config.sampling.num_steps == 1000
    out = tmp_path / "samples.npz"
    do("sample", "--label=0,4", "--steps=2", f"--out={out}")
    assert load_samples(out).shape == (2, 8, 8, 3)


def test_what_a_file_of_adm_does_not_hold_is_to_be_given(do, tmp_path):
    file = adm_file(tmp_path / "model.safetensors", "convolutions")
    sized = [f"--weights={file}", "--config.data.image_size=8"]
    with pytest.raises(RunError, match=r"add --config\.data\.image_size=N"):
        do("import", f"--weights={file}", "--nonew_attention_order")
    with pytest.raises(RunError, match="add --new_attention_order or --nonew_attention_order"):
        do("import", *sized)
    assert not (tmp_path / "run").exists()
    run = open_run(do("import", *sized, "--nonew_attention_order", "--config.network.num_heads=4"), num_devices=1)
    network: Any = run.model.network
    assert (network.num_heads, network.head_channels, network.num_classes) == (4, None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={new}"], "--weights is missing"),
        (["--workdir={new}", "--weights=nowhere"], "nowhere"),
        (["--workdir={theirs}", "--weights={theirs}"], "is there already"),
        (["--workdir={new}", "--weights={theirs}", "--wieghts=3"], "did you mean --weights"),
        (["--workdir={new}", "--weights={theirs}", "--config.network.x=3"], "x is not a field of network.name=unet"),
        (["--workdir={new}", "--weights={theirs}", "--checkpoint=3"], "--checkpoint is for the use of a trained model"),
    ],
)
def test_bad_arguments_leave_nothing(do, folder, tmp_path, arguments, message):
    given = [argument.format(new=tmp_path / "new", theirs=folder) for argument in arguments]
    with pytest.raises((RunError, ValueError), match=message) as refused:
        do("import", *given)
    assert "\n" not in str(refused.value)
    assert [child.name for child in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("unet/config.json", {"out_channels": 6}, r"conv_out.bias has shape \[3\], but this U-Net needs \[6\]"),
        ("unet/config.json", {"act_fn": "relu"}, "act_fn='relu'"),
        (SCHEDULER, {"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
    ],
)
def test_folders_that_cannot_be_honoured_leave_nothing(do, folder, tmp_path, file, fields, message):
    change(folder / file, **fields)
    with pytest.raises(ValueError, match=message) as refused:
        do("import", f"--weights={folder}")
    assert "\n" not in str(refused.value)
    assert [child.name for child in tmp_path.iterdir()] == ["theirs"]


def test_exports_that_no_pipeline_holds_leave_nothing(kinds, trained, tmp_path):
    for arguments, message in [
        ([], "--weights is missing"),
        ([f"--weights={tmp_path}"], "is there already"),
        ([f"--weights={tmp_path / 'new'}", "--config.sampling.threshold.low=-0.5"], "clips evenly or not"),
        ([f"--weights={tmp_path / 'new'}", "--config.sampling.threshold=dynamic"], "clips evenly or not"),
    ]:
        with pytest.raises((RunError, ValueError), match=message):
            kinds["digits"].do(trained("digits"), "--mode=export", *arguments)
    assert not list(tmp_path.iterdir())
