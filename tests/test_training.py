"""The trainer on a problem small enough to know the answer, and on dropout and noise where only equality is known."""

import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.training import (
    Checkpoints,
    Experiment,
    Mean,
    RunError,
    Settings,
    abstract_train_state,
    abstract_weights,
    check_finite,
    digest,
    init_state,
    make_mesh,
    make_train_step,
    place_batch,
    state_shardings,
    train,
)
from diffusion.training import loop as training_loop
from diffusion.training.step import ema_decay_at

BATCH_SIZE = 16
WIDTH = 64
WIDE = 512  # of weights that are large enough to be cut


def noisy_loss(params, batch, key):
    """A loss with noise and dropout, so that a wrong key is noticed."""
    eps_key, dropout_key = jax.random.split(key)
    eps = jax.random.normal(eps_key, batch["x"].shape)
    hidden = jnp.tanh((batch["x"] + eps) @ params["w"])
    kept = jax.random.bernoulli(dropout_key, 0.9, hidden.shape)
    losses = jnp.mean((hidden * kept @ params["w"].T - eps) ** 2, axis=1) + params["b"] ** 2
    big = (jnp.abs(eps[:, 0]) > 1).astype(jnp.float32)
    return losses, {"loss_of_big": Mean(losses * big, big)}


def batches_from(start_step):
    step = start_step
    while True:
        yield {"x": np.random.RandomState(step).randn(BATCH_SIZE, 8).astype(np.float32)}
        step += 1


def init_width(width):
    return lambda key: {"w": jax.random.normal(key, (8, width)) / 8, "b": jnp.ones(())}


def make_experiment(loss=noisy_loss, **changes):
    experiment = Experiment(
        init=init_width(WIDTH),
        loss=loss,
        optimizer=optax.adam(1e-2),
        learning_rate=lambda step: 1e-2,
        batches=batches_from,
        batch_size=BATCH_SIZE,
    )
    return experiment._replace(**changes)


def test_weights_are_described_without_the_loss_being_traced():
    def untraced(*_):
        raise AssertionError("the loss was traced")

    batch = next(batches_from(0))
    how = settings(ema_profiles=(0.05,))
    whole = abstract_train_state(make_experiment(), how, make_mesh(), batch)
    weights = abstract_weights(make_experiment(untraced), how, make_mesh())
    assert weights == whole._replace(opt_state=None, metrics=None) and weights.profiles
    with pytest.raises(AssertionError, match="was traced"):
        abstract_train_state(make_experiment(untraced), how, make_mesh(), batch)


def run_steps(experiment, num_steps, mesh, *, spread=("fsdp",), accumulate=1):
    batch = place_batch(mesh, next(experiment.batches(0)))
    state = init_state(experiment, 0, batch)
    shardings = state_shardings(mesh, state, experiment.rules, spread)
    state = jax.device_put(state, shardings)
    step = make_train_step(experiment, seed=0, ema_decay=0.9, accumulate=accumulate, log_every=num_steps)
    chex.clear_trace_counter()  # raises where it is compiled again after the first step
    step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0, out_shardings=(shardings, None))
    losses, batches = [], experiment.batches(0)
    for _ in range(num_steps):
        state, report = step(state, place_batch(mesh, next(batches)))
        losses.append(float(report.loss))
    return state, losses


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("spread", [("fsdp",), ("data", "fsdp")])
def test_eight_devices_give_the_noise_and_loss_of_one(spread):
    experiment = make_experiment(init=init_width(WIDE))
    one, losses = run_steps(experiment, 5, make_mesh(1))
    eight, eight_losses = run_steps(experiment, 5, make_mesh(8), spread=spread)
    # float32 sums in another order: a few units of 2^-24 a step.
    np.testing.assert_allclose(eight_losses, losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.params, eight.params)


def test_sharded_state_is_really_spread():
    state, _ = run_steps(make_experiment(init=init_width(WIDE)), 1, make_mesh(8), spread=("data", "fsdp"))
    w = state.params["w"]
    assert {shard.data.shape for shard in w.addressable_shards} == {(8, WIDE // 8)}
    assert state.opt_state[0].mu["w"].sharding == state.ema["w"].sharding == w.sharding


def test_accumulated_gradient_is_that_of_the_whole_batch():
    def quiet_loss(params, batch, key):
        del key
        losses = jnp.mean((batch["x"] @ params["w"] - 1.0) ** 2, axis=1)
        return losses, {}

    experiment = make_experiment(quiet_loss)
    whole, _ = run_steps(experiment, 3, make_mesh(2))
    parts, _ = run_steps(experiment, 3, make_mesh(2), accumulate=4)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts.metrics["loss"].total, whole.metrics["loss"].total, rtol=1e-6)
    assert float(parts.metrics["loss"].count) == 3 * BATCH_SIZE


def test_microbatches_draw_different_noise():
    seen = []

    def spying_loss(params, batch, key):
        jax.debug.callback(lambda k: seen.append(tuple(np.ravel(k))), jax.random.key_data(key))
        return jnp.sum(batch["x"] ** 2, axis=1) * params["b"], {}

    run_steps(make_experiment(spying_loss), 2, make_mesh(1), accumulate=2)
    jax.effects_barrier()
    assert len(set(seen)) == 4


def test_moving_average_follows_its_recursion():
    decays = [float(ema_decay_at(step, 0.9)) for step in range(200)]
    np.testing.assert_allclose(decays[:2], [1 / 10, 2 / 11], rtol=1e-6)
    assert max(decays) == pytest.approx(0.9) and decays == sorted(decays)

    # A gradient of one under plain SGD moves b by -0.5 a step: b_n = 1 - n / 2, so the average is known by hand.
    experiment = make_experiment(lambda p, batch, key: (p["b"] * jnp.ones(BATCH_SIZE), {}), optimizer=optax.sgd(0.5))
    state, _ = run_steps(experiment, 2, make_mesh(1))
    after_one = 1 / 10 * 1.0 + 9 / 10 * 0.5
    after_two = 2 / 11 * after_one + 9 / 11 * 0.0
    assert float(state.ema["b"]) == pytest.approx(after_two, rel=1e-6)


def test_metrics_are_means_over_the_log_interval():
    state, losses = run_steps(make_experiment(), 4, make_mesh(1))
    values = training_loop.metric_values(state)
    assert values["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert 0 < float(state.metrics["loss_of_big"].count) < 4 * BATCH_SIZE
    assert "grad_norm" in values


def test_digest_names_weights_by_paths_and_bytes_however_they_are_sharded():
    weights = {
        "params": {
            "dense": {"kernel": np.arange(12, dtype=np.float32).reshape(4, 3), "bias": jnp.ones(3, jnp.bfloat16)},
            "scale": np.float32(2),
        },
        "words": [np.arange(3, dtype=np.int32)],
    }
    # Recorded with the function that named the samples of earlier versions: those stay valid.
    recorded = "sha256:2fa09bb9f12152612423a7955fb2691dfe2ac93d6b3e102c7e84fa5caefb370b"
    assert digest(weights) == recorded
    mesh = make_mesh(4)
    rules = [("kernel$", ("data", None))]
    placed: Any = jax.device_put(weights, state_shardings(mesh, jax.tree.map(jnp.asarray, weights), rules))
    assert len(placed["params"]["dense"]["kernel"].sharding.device_set) == 4
    assert not placed["params"]["dense"]["kernel"].is_fully_replicated
    assert digest(placed) == recorded
    assert digest({"params": weights["params"], "other": weights["words"]}) != recorded
    assert digest({**weights, "words": [np.array([0, 1, 3], np.int32)]}) != recorded


def settings(**changes):
    base = Settings(seed=0, num_steps=12, ema_decay=0.9, log_every=5, checkpoint_every=4, preview_every=100)
    return base._replace(**changes)


def do_train(workdir, experiment=None, num_devices=2, **changes):
    workdir.mkdir(exist_ok=True)
    description = {"experiment": "test", "config": {"a": 1}}
    return train(
        experiment or make_experiment(),
        settings(**changes),
        workdir=workdir,
        mesh=make_mesh(num_devices),
        description=description,
    )


def logged(workdir):
    timings = ("images_per_second",)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


class StopAfter:
    """Batches that send SIGINT to the run after some steps, as Ctrl-C would."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, start_step):
        import os
        import signal

        for count, batch in enumerate(batches_from(start_step)):
            if count == self.steps:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def test_interrupted_and_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = do_train(tmp_path / "whole")
    # Stopped twice, once in the middle of a log interval and off the checkpoint grid.
    for steps in (5, 1):
        with pytest.raises(SystemExit) as stopped:
            do_train(tmp_path / "parts", make_experiment(batches=StopAfter(steps)))
        assert stopped.value.code == 130
    parts = do_train(tmp_path / "parts")
    assert int(parts.step) == 12
    assert_same_bits(parts, whole)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "whole")] == [5, 10, 12]


def test_a_run_traces_its_weights_once_and_its_loss_twice(tmp_path):
    """The loss for the names of its metrics, then for its gradient: tracing is most of a second start."""
    traced = []
    init, loss = init_width(WIDTH), noisy_loss

    def counted_init(key):
        traced.append("init")
        return init(key)

    def counted_loss(params, batch, key):
        traced.append("loss")
        return loss(params, batch, key)

    do_train(tmp_path / "run", make_experiment(counted_loss, init=counted_init), num_steps=2)
    assert traced == ["init", "loss", "loss"]


def test_the_state_is_made_while_the_step_is_traced_and_nothing_is_for_a_finished_run(tmp_path, monkeypatch):
    begun, order = training_loop.Programs.begin, []
    make_state = training_loop.first_state
    monkeypatch.setattr(training_loop.Programs, "begin", lambda *told: order.append("step") or begun(*told))
    monkeypatch.setattr(training_loop, "first_state", lambda *told: order.append("state") or make_state(*told))
    do_train(tmp_path)
    assert order == ["state", "step"]
    do_train(tmp_path)
    assert order == ["state", "step"]


def test_a_checkpoint_of_one_layout_is_resumed_in_another(tmp_path):
    experiment = make_experiment(init=init_width(WIDE))
    whole = do_train(tmp_path / "whole", experiment)
    do_train(tmp_path / "parts", experiment, num_steps=8)
    parts = do_train(tmp_path / "parts", experiment, num_devices=8, spread=("data", "fsdp"))
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-4, atol=1e-5)
    assert len(parts.params["w"].addressable_shards) == 8


def test_nan_stops_the_run_naming_the_step_and_keeps_the_checkpoints_before_it(tmp_path):
    def batches(start_step):
        for step, batch in enumerate(batches_from(start_step), start_step):
            if step == 6:
                batch["x"][3, 2] = np.nan
            yield batch

    with pytest.raises(RunError, match=r"^step 7: loss nan"):
        do_train(tmp_path, make_experiment(batches=batches))
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [4]
    whole = do_train(tmp_path / "whole")
    assert_same_bits(do_train(tmp_path), whole)  # with good data the run resumes as if nothing had happened


def test_newest_and_every_mth_checkpoint_are_kept(tmp_path):
    do_train(tmp_path, num_steps=7, checkpoint_every=1, keep_newest=2, keep_every=3)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [3, 6, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "training.num_steps is 0: it must be at least 1"),
        ({"accumulate": 3}, "multiple of 6"),
        ({"accumulate": 0}, "training.accumulate is 0"),
        ({"ema_decay": 1.0}, "training.ema_decay is 1.0: it must be at least 0 and less than 1"),
        ({"ema_decay": float("nan")}, "training.ema_decay is nan"),
        ({"ema_profiles": (0.5,)}, "training.ema_profiles: "),
        ({"log_every": -1}, "training.log_every is -1"),
        ({"checkpoint_every": -1}, "training.checkpoint_every is -1"),
        ({"preview_every": -1}, "training.preview_every is -1"),
        ({"snapshot_every": -1}, "training.snapshot_every is -1"),
        ({"keep_newest": 0}, "training.keep_newest is 0"),
        ({"keep_every": -1}, "training.keep_every is -1"),
        ({"spike_factor": -1.0}, "training.spike_factor is -1.0"),
        ({"seed": 2**32}, "seed is 4294967296: it must be 0 to 4294967295"),
    ],
)
def test_settings_that_cannot_run_are_refused(tmp_path, changes, message):
    with pytest.raises(RunError, match=message) as refused:
        do_train(tmp_path, **changes)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_intervals_of_zero_mean_never_and_the_end_is_still_logged_and_saved(tmp_path):
    def preview(params):
        raise AssertionError("no preview is due")

    whole = do_train(tmp_path / "whole", ema_profiles=(0.05,), log_every=12)
    never = dict(log_every=0, checkpoint_every=0, preview_every=0, snapshot_every=0, keep_every=0)
    state = do_train(tmp_path / "never", make_experiment(preview=preview), ema_profiles=(0.05,), **never)
    assert_same_bits(state, whole)
    assert [line["step"] for line in logged(tmp_path / "never")] == [12]
    assert logged(tmp_path / "never") == logged(tmp_path / "whole")  # means over the whole run
    assert [path.name for path in (tmp_path / "never" / "checkpoints").iterdir()] == ["12"]
    assert not (tmp_path / "never" / "previews").exists() and not (tmp_path / "never" / "averages").exists()


def test_training_a_finished_run_reports_that_and_returns_its_state(tmp_path, capfd):
    finished = do_train(tmp_path)
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.lock"}
    assert_same_bits(do_train(tmp_path), finished)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"the run in {tmp_path} is finished: 12 of 12 steps"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.lock"} == before
    with pytest.raises(RunError, match=r"num_steps is 11, but the run in .* has made 12 steps: raise it") as refused:
        do_train(tmp_path, num_steps=11)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_finite_are_counted_and_refused(tmp_path):
    good = {"params": {"w": jnp.ones((3, 2)), "half": jnp.ones(2, jnp.bfloat16)}, "ids": np.arange(3)}
    check_finite(good, "checkpoint 12")
    bad = {**good, "x": {"b": jnp.array([1, jnp.nan, -jnp.inf]), "c": np.float32(np.inf)}}
    with pytest.raises(
        RunError, match=r"^checkpoint 12 .*: 3 of its .* in 2 of 5 arrays, the first in x/b\."
    ) as refused:
        check_finite(bad, "checkpoint 12")
    assert "\n" not in str(refused.value)
    sharded = jax.device_put(bad["x"]["b"][None].repeat(4, 0), NamedSharding(make_mesh(4), PartitionSpec("data")))
    with pytest.raises(RunError, match="8 of its weights"):
        check_finite(sharded, "it")

    state = do_train(tmp_path, num_steps=4)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        stored = checkpoints.description()
        checkpoints.save(5, state._replace(ema={**state.ema, "b": jnp.full((), jnp.nan)}), stored)
    with pytest.raises(RunError, match=r"checkpoints/5 cannot be used: 1 of its .* the first in ema/b"):
        do_train(tmp_path)


def test_previews_show_raw_and_averaged_weights(tmp_path):
    images = jnp.full((4, 8, 8, 1), 255, jnp.uint8)
    do_train(tmp_path, make_experiment(preview=lambda params: images), num_steps=4, preview_every=2)
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == [f"step_0000000{step}_{kind}.png" for step in (2, 4) for kind in ("ema", "raw")]
