"""The program that a run began with the last time: used before its text is made, and only while that is the same."""

import sys
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from diffusion.training import RunError, kept_program, make_mesh, programs, train
from diffusion.training import kept as kept_module
from tests.test_training import assert_same_bits, batches_from, logged, make_experiment, noisy_loss, settings

DESCRIPTION = {"experiment": "test", "config": {"a": 1}}


@pytest.fixture
def cache(tmp_path):
    """JAX's cache in a new folder, for every program."""
    options = {"jax_compilation_cache_dir": str(tmp_path / "cache"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield tmp_path / "cache" / "steps"


def kept_of(mesh, facts=None):
    """What is kept of the run, as a new process finds it."""
    kept = kept_program(mesh, DESCRIPTION["experiment"], DESCRIPTION["config"])
    if kept is not None:
        kept.compare(facts)
    return kept


def start(workdir, loss=noisy_loss, num_devices=1, facts=None, **changes):
    """Trains as a new process would, and returns the final state and how often the loss was traced before step 1."""
    workdir.mkdir(exist_ok=True)
    traced, traced_before = [], []

    def counted(params, batch, key):
        traced.append(key)
        return loss(params, batch, key)

    begin = programs.Programs.begin_to_confirm
    jax.clear_caches()
    mesh = make_mesh(num_devices)
    experiment = make_experiment(counted, **changes)
    kept = kept_of(mesh, facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            programs.Programs, "begin_to_confirm", lambda self: traced_before.append(len(traced)) or begin(self)
        )
        state = train(experiment, settings(), workdir=workdir, mesh=mesh, description=DESCRIPTION, kept=kept)
    wait_for_threads()
    return state, traced_before[-1]


def wait_for_threads():
    """Waits until what is kept is written, which a thread does."""
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=10)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_second_start_steps_before_it_traces_and_ends_with_the_same_bits(num_devices, cache, tmp_path):
    """The loss is traced for the names of its metrics alone, not for its gradient."""
    first, traced = start(tmp_path / "first", num_devices=num_devices)
    assert traced == 2 and len(list(cache.glob("*.program"))) == 1
    second, traced = start(tmp_path / "second", num_devices=num_devices)
    assert traced == 1
    assert_same_bits(second, first)
    assert logged(tmp_path / "second") == logged(tmp_path / "first")


def test_a_program_of_other_code_leaves_no_trace(cache, tmp_path, capsys):
    """As after a change that no source shows: the run begins again, and nothing of the wrong steps is logged."""
    start(tmp_path / "first")

    def twice(params, batch, key):
        losses, metrics = noisy_loss(params, batch, key)
        return 2 * losses, metrics

    changed, _ = start(tmp_path / "changed", twice)
    assert "not that of this code: beginning again" in capsys.readouterr().err
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "another"))
    plain, _ = start(tmp_path / "plain", twice)
    assert_same_bits(changed, plain)
    assert logged(tmp_path / "changed") == logged(tmp_path / "plain")
    assert "beginning again" not in capsys.readouterr().err


def test_what_a_with_around_the_run_sets_is_no_change(cache, tmp_path, capsys):
    """A thread does not know of it."""
    with jax.default_matmul_precision("highest"):
        first, _ = start(tmp_path / "first")
        second, traced = start(tmp_path / "second")
    assert traced == 1 and "beginning again" not in capsys.readouterr().err
    assert_same_bits(second, first)


def test_a_bad_step_of_a_program_of_other_code_does_not_end_the_run(cache, tmp_path, capsys):
    def endless(params, batch, key):
        losses, metrics = noisy_loss(params, batch, key)
        return losses / 0, metrics

    with pytest.raises(RunError, match="step 1: loss inf"):
        start(tmp_path / "first", endless)
    state, _ = start(tmp_path / "second")
    assert "beginning again" in capsys.readouterr().err
    assert int(state.step) == 12 and np.isfinite(state.params["w"]).all()


forget = kept_module.Kept.forget


def test_a_program_that_fails_is_replaced(cache, tmp_path, monkeypatch, capsys):
    first, _ = start(tmp_path / "first")
    call = jax.stages.Compiled.__call__

    def fail(self, *arguments):
        if len(arguments) == 3:  # the step's, not the first state's
            raise jax.errors.JaxRuntimeError("NOT_FOUND: Function wrapped_add not found")
        return call(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Compiled, "__call__", fail, raising=True)
        patch.setattr(kept_module.Kept, "forget", lambda self: patch.undo() or forget(self))
        second, _ = start(tmp_path / "second")
    assert "last start failed (NOT_FOUND: Function wrapped_add not found): beginning again" in capsys.readouterr().err
    assert_same_bits(second, first)
    start(tmp_path / "third")
    assert "beginning again" not in capsys.readouterr().err


def test_a_failure_before_the_program_is_used_is_not_the_programs(cache, tmp_path, monkeypatch, capsys):
    start(tmp_path / "first")

    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch, pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        patch.setattr("diffusion.training.loop.first_state", lambda *told: fail)
        start(tmp_path / "second")
    assert "beginning again" not in capsys.readouterr().err
    assert start(tmp_path / "third")[1] == 1


def test_after_a_change_of_sources_the_text_is_made_first(cache, tmp_path, monkeypatch):
    """The same text: the program is not compiled again, and the start after that is a fast one."""
    first, _ = start(tmp_path / "first")
    monkeypatch.setattr(kept_module, "digest_of_sources", lambda: "changed")
    compiled = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, *options: compiled.append(self) or compile_(self, *options)
    )
    second, traced = start(tmp_path / "second")
    assert traced == 2
    assert len(compiled) == 1  # that of the first state
    third, traced = start(tmp_path / "third")
    assert traced == 1
    assert_same_bits(second, first)
    assert_same_bits(third, first)


def test_with_other_data_the_text_is_made_first(cache, tmp_path):
    first, _ = start(tmp_path / "first", facts={"data": "one"})
    second, traced = start(tmp_path / "second", facts={"data": "another"})
    assert traced == 2
    assert start(tmp_path / "third", facts={"data": "another"})[1] == 1
    assert_same_bits(second, first)


@pytest.mark.parametrize("content", [b"", b"no program"])
def test_a_file_that_cannot_be_read_is_a_program_that_is_compiled(content, cache, tmp_path):
    first, _ = start(tmp_path / "first")
    (program,) = cache.glob("*.program")
    program.write_bytes(content)
    second, traced = start(tmp_path / "second")
    assert traced == 2
    assert_same_bits(second, first)


def test_a_batch_of_another_shape_is_compiled_for(cache, tmp_path):
    def half(start_step):
        return ({"x": batch["x"][:8]} for batch in batches_from(start_step))

    start(tmp_path / "first")
    mesh, kept = make_mesh(1), kept_of(make_mesh(1))
    (tmp_path / "half").mkdir()
    experiment = make_experiment(batches=half, batch_size=8)
    state = train(experiment, settings(), workdir=tmp_path / "half", mesh=mesh, description=DESCRIPTION, kept=kept)
    assert int(state.step) == 12


def test_a_resumed_run_begins_with_it_and_one_with_weights_of_another_without(cache, tmp_path):
    whole, _ = start(tmp_path / "whole")
    with pytest.raises(SystemExit):
        start(tmp_path / "parts", batches=stopping)
    parts, traced = start(tmp_path / "parts")
    assert traced == 1
    assert_same_bits(parts, whole)
    _, traced = start(tmp_path / "warm", begun={"w": jnp.ones((8, 64))})
    assert traced > 1


def stopping(start_step):
    import os
    import signal

    for number, batch in enumerate(batches_from(start_step)):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch


def test_a_text_differs_by_any_element_of_a_constant():
    """As do programs then: no part of a large constant is left out."""
    names = set()
    for element in (0, 700):
        constant = np.zeros(1000, np.float32)
        constant[element] = 1
        names.add(kept_module.name_of(jax.jit(partial(jnp.add, jnp.asarray(constant))).lower(0.0).as_text()))
    assert len(names) == 2


def test_the_programs_not_used_for_longest_are_removed(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_module, "MOST", 2)
    for number in range(3):
        monkeypatch.setitem(DESCRIPTION, "config", {"a": number})
        start(tmp_path / str(number), partial(scaled_loss, 1.0 + number))
    assert len(list(cache.glob("*.program"))) == 2


def scaled_loss(factor, params, batch, key):
    losses, metrics = noisy_loss(params, batch, key)
    return factor * losses, metrics


def test_nothing_is_kept_where_jax_keeps_nothing(monkeypatch):
    values = {**jax.config.values, "jax_compilation_cache_dir": None}
    monkeypatch.setattr(type(jax.config), "values", property(lambda self: values))
    assert kept_of(make_mesh(1)) is None


def test_sources_are_files_that_are_worked_on(tmp_path, monkeypatch):
    before = kept_module.digest_of_sources()
    assert before == kept_module.digest_of_sources()
    package = tmp_path / "someones_idea"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text("")
    (package / "part.py").write_text("scale = 1\n")
    (package / ".#part.py").symlink_to("nothing")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("someones_idea.model")
    with_package = kept_module.digest_of_sources()
    (package / "part.py").write_text("scale = 2\n")  # not imported yet, as what is imported when it is used
    assert len({before, with_package, kept_module.digest_of_sources()}) == 3
    del sys.modules["someones_idea"], sys.modules["someones_idea.model"]
