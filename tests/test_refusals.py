"""What a command line cannot ask for is refused in one line, before anything is computed or written."""

import jax.numpy as jnp
import pytest
from helpers import CLIP, config_of, do, make_call
from published_folders import write_folder

from diffusion.model.config import plain
from diffusion.runs.command_line import run_to_end
from diffusion.runs.run import open_run
from diffusion.training import Checkpoints, RunError, TrainState
from experiments import cifar10, clip

# --- fields that only training may set


@pytest.mark.parametrize("mode", ["sample", "evaluate", "img2img", "export"])
def test_what_was_trained_is_not_another_run_afterwards(kinds, trained, mode, refused):
    kind, folder = kinds["digits"], trained("digits")
    for change, difference in [
        ("process.num_steps=100", r"process\.num_steps: 1000 -> 100"),
        ("loss.prediction=v", r"loss\.prediction: eps -> v"),
        ("training.ema_decay=0.9999", r"training\.ema_decay: 0\.995 -> 0\.9999"),
        ("process=flow", r"process\.beta: linear -> \(none\); .*process\.name: ddpm -> flow"),
        ("seed=1", "seed: 0 -> 1"),
    ]:
        line = rf"{folder} was trained with another config \(there -> asked\): {difference}"
        refused(line, lambda change=change: kind.call(folder, f"--mode={mode}", f"--config.{change}"))
    free = ("--config.sampling.guidance=2", "--config.evaluation.num_samples=7", "--config.data.dir=elsewhere")
    config = kind.call(folder, f"--mode={mode}", *free, "--steps=4").config
    assert (config.sampling.num_steps, config.sampling.guidance, config.data.dir) == (4, 2.0, "elsewhere")


@pytest.mark.parametrize("mode", ["evaluate", "score", "export"])
def test_neither_is_a_clip(tmp_path, mode, refused):
    folder = tmp_path / "run"
    with Checkpoints(folder / "checkpoints") as checkpoints:  # of which only the description is read
        state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {}, {}, {})
        checkpoints.save(0, state, {"experiment": "clip", "config": plain(config_of("clip"))})
    call = lambda *more: make_call(clip.TASK, "clip", folder, f"--mode={mode}", *more, **CLIP)  # noqa: E731
    refused(r"network\.projection: 512 -> 8", lambda: call("--config.network.projection=8"))
    refused(r"training\.ema_decay: 0\.995 -> 0\.5", lambda: call("--config.training.ema_decay=0.5"))
    assert call("--config.evaluation.num_sets=3").config.evaluation.num_sets == 3


def test_a_network_is_refused_at_sampling_in_one_line(trained, kinds, refused):
    line = r"network\.channels: 8 -> 16; network\.num_groups: 4 -> 8$"
    flags = ("--mode=sample", "--config.network.channels=16", "--config.network.num_groups=8")
    refused(line, lambda: kinds["digits"].call(trained("digits"), *flags))


# --- seeds


@pytest.mark.parametrize("seed", [2**32, -1])
def test_a_seed_is_checked_wherever_it_is_given(kinds, trained, tmp_path, seed, refused):
    line = f"seed is {seed}: it must be 0 to 4294967295"
    kind, folder = kinds["digits"], trained("digits")
    refused(line, lambda: kind.call(tmp_path / "run", f"--config.seed={seed}"))
    for mode in ("sample", "img2img", "evaluate", "train"):
        refused(line, lambda mode=mode: kind.call(folder, *kind.flags, f"--mode={mode}", f"--seed={seed}"))
    refused(line, lambda: kinds["captions"].call(tmp_path / "run", "--mode=sample", f"--seed={seed}"))
    refused(line, lambda: make_call(clip.TASK, "clip", tmp_path / "run", f"--config.seed={seed}", **CLIP))
    refused(line, lambda: open_run(folder, num_devices=1).sample(2, seed=seed))


def test_every_seed_of_several_is_checked(kinds, trained, monkeypatch, refused):
    monkeypatch.setattr("diffusion.runs.evaluate.draw_samples", None)
    flags = ("--mode=evaluate", "--seed=4294967295", "--num_seeds=2", "--num_samples=24")
    refused("seed is 4294967296", lambda: do(kinds["digits"].call(trained("digits"), *flags)))


# --- flags that change nothing


@pytest.mark.parametrize(
    ("mode", "flag", "readers"),
    [
        ("progressive", "--images=a.png", "sample, interpolate, inpaint, img2img"),
        ("progressive", "--strength=0.5", "interpolate, img2img, sample"),
        ("img2img", "--mask=left", "inpaint, sample"),
        ("evaluate", "--label=3", "sample, interpolate, inpaint, img2img, progressive"),
        ("evaluate", "--sweep_steps=5", "sweep"),
        ("likelihood", "--out=a.npz", "sample, interpolate, inpaint, img2img, progressive, train, evaluate"),
        ("sample", "--metrics=fid", "train, evaluate, sweep"),
        ("export", "--variant=fp16", "import"),
        ("train", "--prompt=a red two", "sample, interpolate, inpaint, img2img, progressive"),
    ],
)
def test_flags_that_a_mode_does_not_read_are_refused(kinds, trained, mode, flag, readers, refused):
    line = f"{flag.partition('=')[0]} is not read by --mode={mode}, but by {readers}: leave it out"
    refused(line, lambda: kinds["digits"].call(trained("digits"), f"--mode={mode}", flag))


def test_two_flags_of_one_field_are_refused(kinds, trained, refused):
    for flags in (
        ("--steps=2", "--config.sampling.num_steps=2"),
        ("--sampler=euler", "--config.sampling.sampler=ddim"),
        ("--sampler=euler", "--config.sampling.sampler.name=ddim"),
    ):
        first = flags[0].partition("=")[0].replace("--steps", "--sampling_steps")  # of which it is the old name
        line = f"{first} and {flags[1].partition('=')[0]} say the same: leave one out"
        refused(line, lambda flags=flags: kinds["digits"].call(trained("digits"), "--mode=sample", *flags))


def test_fields_that_a_published_model_has_otherwise_are_refused(tmp_path, refused):
    folder = write_folder(tmp_path / "theirs")
    for change, difference in [
        ("network.channels=64", r"network\.channels=64: .*theirs has 4"),
        ("process.num_steps=500", r"process\.num_steps=500: .*theirs has 1000"),
        ("process=flow", r"process\.name=flow: .*theirs has ddpm"),
        ("process.beta=cosine", r"process\.beta=cosine: .*theirs has linear"),
    ]:
        flags = ("--mode=import", f"--weights={folder}", f"--config.{change}")
        call = make_call(cifar10.TASK, "cifar10", tmp_path / "run", *flags)
        refused(rf"--config\.{difference}: leave it out", lambda call=call: do(call))


# --- messages


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RunError("two\nlines"), "error: two lines"),
        (ValueError("a  wide \t gap"), "error: a wide gap (--traceback shows where)"),
        (RunError("many " * 5000), "error: many many many"),
        (OSError(2, "No such file", "x" * 9000), "error: [Errno 2] No such file: 'xxx"),
        (MemoryError("72.8 TiB"), "error: not enough memory (72.8 TiB)"),
    ],
)
def test_an_error_is_one_line_that_can_be_read(error, line, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as left:
        run_to_end(work)
    said = str(left.value.code)
    assert said.startswith(line) and "\n" not in said and len(said) < 600
    assert capsys.readouterr() == ("", "")
