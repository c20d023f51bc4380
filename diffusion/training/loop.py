"""The training loop: batches in; checkpoints, metrics and pictures out."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion.compiler import run_once
from diffusion.data.images import image_grid, save_png
from diffusion.training import snapshots
from diffusion.training.checkpoints import Checkpoints, provenance
from diffusion.training.description import Description, Migrate, unchanged
from diffusion.training.errors import one_line
from diffusion.training.experiment import Batch, Experiment, TrainState, averaged, init_state, init_weights
from diffusion.training.health import Watch
from diffusion.training.interrupt import StopSignal
from diffusion.training.kept import Kept
from diffusion.training.lock import sole_run
from diffusion.training.loggers import Loggers
from diffusion.training.processes import meet
from diffusion.training.programs import Programs, StaleProgramError
from diffusion.training.settings import Settings, check_settings, is_due, refuse_shorter
from diffusion.training.sharding import on_mesh, place_batch, state_shardings
from diffusion.training.step import Report, make_train_step, starts_interval
from diffusion.training.threads import in_thread
from diffusion.training.weights import check_finite
from diffusion.training.workdir import check, check_same_data, check_same_run, claim, recorded_config
from diffusion.training.writers import MakeWriter, tensorboard


def abstract_train_state(experiment: Experiment, settings: Settings, mesh: Mesh, batch: dict[str, Any]) -> TrainState:
    """Returns the state's shapes, dtypes and shardings; nothing is allocated."""
    make = partial(init_state, experiment, settings.seed, shapes_of(batch), settings.ema_profiles)
    return _abstract(experiment, settings, mesh, make)


def abstract_weights(experiment: Experiment, settings: Settings, mesh: Mesh) -> TrainState:
    """Returns `abstract_train_state` less the optimizer's part and the metrics, which need the loss traced."""
    return _abstract(
        experiment, settings, mesh, partial(init_weights, experiment, settings.seed, settings.ema_profiles)
    )


def _abstract(experiment: Experiment, settings: Settings, mesh: Mesh, make: Callable[[], TrainState]) -> TrainState:
    state = jax.eval_shape(make)
    shardings = state_shardings(mesh, state, experiment.rules, settings.spread)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def shapes_of(batch: Batch) -> Batch:
    """Returns a batch's shapes and dtypes alone."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def train(
    experiment: Experiment,
    settings: Settings,
    *,
    workdir: Path,
    mesh: Mesh,
    description: Description,
    migrate: Migrate = unchanged,
    writers: Sequence[MakeWriter] = (tensorboard,),
    started: float | None = None,
    kept: Kept | None = None,
) -> TrainState:
    """Trains until `settings.num_steps`, resuming from the newest intact checkpoint in `workdir`.

    Ctrl-C or SIGTERM, to any process: the current step is finished and saved, then the interpreter exits (130 after
    Ctrl-C, 0 after SIGTERM). A run that is finished already is reported and returned.

    Args:
      experiment: what is learned.
      settings: how.
      workdir: the folder of the run; made where it is missing.
      mesh: the devices.
      description: {"experiment": name, "config": plain JSON}, and what else every checkpoint is to hold. What a resumed
        run records of its config is in `workdir`'s first lines.
      migrate: brings an older stored description to the present format, for comparison.
      writers: of what is reported, beside metrics.jsonl.
      started: the `time.perf_counter()` since which its seconds are counted, see `process_start`; None: now.
      kept: where the program of the step is kept between starts, see `kept_program`.

    Returns:
      The state after the last step.

    Raises:
      RunError:
        - settings that cannot run, or `num_steps` before the newest checkpoint
        - a folder that belongs to another run, or in which another run is active
        - no intact checkpoint among those in the folder, or one with weights that are not finite
        - a save that failed, or a bad step (reported; nothing of it is saved)
    """
    if experiment.begun:  # these arrays become the state's: it could not be made again
        kept = None
    work = partial(_train, experiment, settings, workdir, mesh, description, migrate, writers, started, kept)
    try:
        return work()
    except (StaleProgramError, jax.errors.JaxRuntimeError) as error:
        if kept is None or not kept.unconfirmed:
            raise
        kept.forget()
        fault = "is not that of this code" if isinstance(error, StaleProgramError) else f"failed ({one_line(error)})"
        print(f"the program of the last start {fault}: beginning again without it", file=sys.stderr)
        return work()


def _train(
    experiment: Experiment,
    settings: Settings,
    workdir: Path,
    mesh: Mesh,
    description: Description,
    migrate: Migrate,
    writers: Sequence[MakeWriter],
    started: float | None,
    kept: Kept | None,
) -> TrainState:
    """Trains, see `train`; raises StaleProgramError before anything but the first lines is written."""
    begun = time.perf_counter() if started is None else started
    check_settings(settings, experiment, mesh)
    name, config = description["experiment"], description["config"]
    check(workdir, name, config, migrate)
    first = jax.process_index() == 0
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(StopSignal())
        if first:
            cleanup.enter_context(sole_run(workdir))
        checkpoints = cleanup.enter_context(
            Checkpoints(workdir / "checkpoints", keep_newest=settings.keep_newest, keep_every=settings.keep_every)
        )
        step = checkpoints.newest or 0
        stored: Description = {}
        if checkpoints.newest is None:
            if first:
                claim(workdir, name, config, migrate)
        else:
            stored = migrate(checkpoints.description())
            check_same_run(stored, workdir, name, config)
            if data := description.get("data"):
                check_same_data(stored, data)
            config = recorded_config(stored["config"], config)
        refuse_shorter(workdir, step, settings.num_steps)
        batches = cleanup.enter_context(contextlib.closing(experiment.batches(step)))
        batch = place_batch(mesh, next(batches))
        abstract = abstract_train_state(experiment, settings, mesh, batch)
        ballot = Ballot(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        train_step = ballot.with_votes(make_step(experiment, settings), (shardings, None))
        steps = Programs(train_step, lambda batch: (abstract, batch, ballot.vote(False)), kept)
        # The state is made, or read, and the step compiled, before the first step, whose cost is then known apart.
        making = None
        if checkpoints.newest is None:
            making = in_thread(first_state(experiment, settings, abstract, batch))
        compiling = time.perf_counter()
        if step < settings.num_steps:
            steps.begin(batch)
        compile_seconds = time.perf_counter() - compiling
        if making is not None:
            state = making.result()
        else:
            state = checkpoints.restore(abstract)
            weights = {"params": state.params, "ema": state.ema, "profiles": state.profiles}
            check_finite(weights, f"checkpoint {workdir / 'checkpoints' / str(step)}")
        if step == settings.num_steps:
            if first:
                print(f"the run in {workdir} is finished: {step} of {settings.num_steps} steps", file=sys.stderr)
            return state

        compiling = time.perf_counter()
        steps.of(batch, most=1)
        compile_seconds += time.perf_counter() - compiling
        meet("to train")
        if first and stored:
            claim(workdir, name, config, migrate)
        description = {**stored, **description, "config": config, "provenance": provenance()}

        logs = cleanup.enter_context(
            Loggers(
                workdir, start_step=step, num_steps=settings.num_steps, writers=writers, config=config, active=first
            )
        )
        watch = Watch(workdir, skip_bad_steps=settings.skip_bad_steps, report_line=logs.print_line)
        if step:
            logs.print_line(f"resuming from step {step} in {workdir}")
        clock = Stopwatch()
        previous: tuple[Report, jax.Array] | None = None
        # The step since which the metrics in the state are summed. It is stored, because it does not follow from `step`
        # after a resume with another log_every. None: not known, as in checkpoints of format 1.
        summed_since: int | None = stored.get("metrics_since")
        # A single process that was stopped while it compiled has nothing new to save.
        stopped = ending = ballot.alone and stop.received is not None
        while not ending:
            if starts_interval(step, settings.log_every):
                summed_since = step
            step_of_shape = steps.of(batch, most=experiment.num_shapes)
            clock.resume()
            state, report, stops = step_of_shape(state, batch, ballot.vote(stop.received is not None))
            step += 1
            logs.advance()
            # The device computes this step while the host checks the one before.
            if previous is not None:
                if previous[0].bad:
                    steps.confirm()
                watch.check(previous[0], step - 1)
            if clock.steps == 0:
                jax.block_until_ready(report)
                logs.print_line(
                    f"first step {time.perf_counter() - begun:.1f} s after the "
                    f"{'start' if started is None else 'start of the process'}, "
                    f"of which {compile_seconds:.1f} s compiling"
                )
                steps.begin_to_confirm()
            clock.steps += 1

            last = step == settings.num_steps
            # Several processes stop by the votes cast with the step before, which all of them receive alike.
            stopped = stop.received is not None if ballot.alone else previous is not None and bool(previous[1])
            previous = report, stops
            ending = last or stopped
            log_now = last or is_due(step, settings.log_every)
            save_now = ending or is_due(step, settings.checkpoint_every)
            preview_now = experiment.preview and is_due(step, settings.preview_every, last)
            snapshot_now = state.profiles and is_due(step, settings.snapshot_every, last)
            if log_now or save_now or preview_now or snapshot_now:
                steps.confirm()
                watch.check(report, step)
                clock.pause()
            if log_now:
                values = metric_values(state)
                if experiment.learning_rate is not None:
                    values["learning_rate"] = float(experiment.learning_rate(step - 1))
                values["images_per_second"] = clock.lap() * experiment.batch_size
                if settings.skip_bad_steps and summed_since is not None:
                    values["skipped_steps"] = step - summed_since - float(state.metrics["grad_norm"].count)
                logs.log(step, values)
            if save_now:
                checkpoints.save(step, state, {**description, "metrics_since": summed_since})
            if snapshot_now:
                snapshots.save(workdir, step, state.profiles)
            if preview_now:
                drawn = draw_previews(experiment, state, workdir / "previews" / f"step_{step:08d}")
                for name, image in drawn.items():
                    logs.picture(step, f"preview/{name}", image)
            if not ending:
                batch = place_batch(mesh, next(batches))
        checkpoints.wait()
        stopped |= ballot.alone and stop.received is not None  # while the last checkpoint was saved
        total = time.perf_counter() - begun
        logs.print_line(
            f"{clock.steps} steps in {total:.1f} s, {clock.seconds:.1f} s of it in steps "
            f"(goodput {clock.seconds / total:.0%})"
        )
    if stopped:
        logs.print_line(f"stopped and saved at step {step}; the same command resumes from there")
        raise SystemExit(130 if stop.received is signal.SIGINT else 0)
    return state


def first_state(
    experiment: Experiment, settings: Settings, abstract: TrainState, batch: Batch
) -> Callable[[], TrainState]:
    """Returns what compiles and runs the program for the state before the first step.

    That state has the arrays of `experiment.begun`, of which none is copied. All tracing is done here, so that a thread
    may do the rest.

    Args:
      experiment: what is learned.
      settings: how.
      abstract: of `abstract_train_state`.
      batch: only its shapes are used.
    """
    groups = experiment.begun or {}
    # An array at a time is placed, and converted where the state holds another dtype.
    placed = {
        name: jax.tree.map(lambda like, x: place_as(x, like), abstract.params[name], group)
        for name, group in groups.items()
    }
    init = partial(init_state, experiment, settings.seed, shapes_of(batch), settings.ema_profiles)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    lowered = jax.jit(init, out_shardings=shardings, donate_argnums=0).lower(placed)
    return lambda: lowered.compile(run_once(jax.default_backend()))(placed)


def place_as(x: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array with the dtype and the sharding of `like`."""
    return jax.device_put(x if x.dtype == like.dtype else x.astype(like.dtype), like.sharding)


def make_step(experiment: Experiment, settings: Settings) -> Callable[[TrainState, Batch], tuple[TrainState, Report]]:
    """Returns the train step of `settings`."""
    return make_train_step(
        experiment,
        seed=settings.seed,
        ema_decay=settings.ema_decay,
        accumulate=settings.accumulate,
        log_every=settings.log_every,
        skip_bad_steps=settings.skip_bad_steps,
        spike_factor=settings.spike_factor,
    )


class Ballot:
    """Decides in all processes at the same step whether to stop: a signal may reach only one, or each at its time."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.alone = jax.process_count() == 1
        self._none = jnp.zeros(0, bool)

    def vote(self, stop: bool) -> jax.Array:
        """Returns this process's vote beside those of the others, bool[parts of a batch]; bool[0] where it is alone."""
        count = len(self._mesh.local_devices) // self._mesh.shape["tensor"]
        return self._none if self.alone else place_batch(self._mesh, {"stop": np.full(count, stop)})["stop"]

    def with_votes(self, train_step: Callable[..., Any], shardings: tuple[Any, Any]) -> Any:
        """Returns jitted (state, batch, votes) -> (state, report, bool[]: any process voted to stop)."""

        def step(state: TrainState, batch: Batch, votes: jax.Array) -> tuple[TrainState, Report, jax.Array]:
            return (*train_step(state, batch), jnp.any(votes))

        return jax.jit(on_mesh(self._mesh, step), donate_argnums=0, out_shardings=(*shardings, None))


def metric_values(state: TrainState) -> dict[str, float]:
    """Returns the means since the last log line; one over no examples is left out."""
    means = jax.device_get(state.metrics)
    return {name: float(mean.total / mean.count) for name, mean in means.items() if mean.count > 0}


def draw_previews(experiment: Experiment, state: TrainState, path: Path) -> dict[str, np.ndarray]:
    """Draws previews of the raw and of the averaged weights, `path`_raw.png and `path`_ema.png, and returns both."""
    assert experiment.preview is not None
    whole = averaged(state.params, state.ema, experiment.frozen)
    drawn = {}
    for name, params in (("raw", state.params), ("ema", whole)):
        drawn[name] = image_grid(multihost_utils.process_allgather(experiment.preview(params), tiled=True))
        if jax.process_index() == 0:
            save_png(path.with_name(f"{path.name}_{name}.png"), drawn[name], smallest_side=480)
    return drawn


class Stopwatch:
    """Counts seconds spent in steps, without saving and drawing."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._since: float | None = None
        self._lap = (0, 0.0)

    def resume(self) -> None:
        """Starts counting; does nothing while it counts."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops counting."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def lap(self) -> float:
        """Returns the steps per second since the last lap."""
        steps, seconds = self.steps - self._lap[0], self.seconds - self._lap[1]
        self._lap = (self.steps, self.seconds)
        return steps / seconds
