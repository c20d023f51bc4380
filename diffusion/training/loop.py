"""The training loop: batches in, checkpoints, metrics and pictures out."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusion.averages import power_exponent
from diffusion.data.images import image_grid, save_png
from diffusion.training import snapshots
from diffusion.training.checkpoints import Checkpoints, provenance
from diffusion.training.errors import RunError
from diffusion.training.experiment import Batch, Experiment, TrainState, init_state
from diffusion.training.health import Watch
from diffusion.training.interrupt import StopSignal
from diffusion.training.lock import sole_run
from diffusion.training.loggers import Loggers
from diffusion.training.processes import meet
from diffusion.training.sharding import Rule, place_batch, replicated, state_shardings
from diffusion.training.step import Report, make_train_step
from diffusion.training.workdir import check, claim


class Settings(NamedTuple):
    """How a run is done; what is learned stands in `Experiment`."""

    seed: int
    num_steps: int
    ema_decay: float
    ema_profiles: tuple[float, ...] = ()
    accumulate: int = 1
    log_every: int = 100
    checkpoint_every: int = 1000
    preview_every: int = 1000
    snapshot_every: int = 0
    keep_newest: int = 3
    keep_every: int = 0
    skip_bad_steps: bool = False
    spike_factor: float = 0.0
    rule: Rule = replicated


def check_settings(settings: Settings, experiment: Experiment, mesh: Mesh) -> None:
    """Refuses what cannot run.

    Raises:
      RunError: num_steps < 1, an average's length that cannot be, or a batch that the devices, times the micro-batches,
        do not divide.
    """
    if settings.num_steps < 1:
        raise RunError(f"training.num_steps is {settings.num_steps}: it must be at least 1")
    for sigma_rel in settings.ema_profiles:
        try:
            power_exponent(sigma_rel)
        except ValueError as error:
            raise RunError(f"training.ema_profiles: {error}") from error
    parts = mesh.size * settings.accumulate
    if settings.accumulate < 1 or experiment.batch_size % parts:
        raise RunError(
            f"a batch of {experiment.batch_size} cannot be split into {mesh.size} devices x {settings.accumulate} "
            f"micro-batches: make data.batch_size a multiple of {parts}"
        )


def abstract_train_state(experiment: Experiment, settings: Settings, mesh: Mesh, batch: dict[str, Any]) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, nothing allocated."""
    shapes = jax.eval_shape(lambda: init_state(experiment, settings.seed, batch, settings.ema_profiles))
    shardings = state_shardings(mesh, shapes, settings.rule)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def train(
    experiment: Experiment, settings: Settings, *, workdir: Path, mesh: Mesh, description: dict[str, Any]
) -> TrainState:
    """Trains until `settings.num_steps`, from the newest sound checkpoint in `workdir` on; returns the last state.

    `description` ({"experiment": name, "config": plain JSON}) goes into every checkpoint.

    Ctrl-C or SIGTERM, to any process: the step in hand is finished and saved, then the interpreter exits (130 after
    Ctrl-C, 0 after SIGTERM).

    Raises:
      RunError: settings that cannot run, a folder that is another run's or in which another run is, no sound
        checkpoint among those there, a save that failed, or a bad step (named; nothing of it is saved).
    """
    begun = time.perf_counter()
    check_settings(settings, experiment, mesh)
    check(workdir, description["experiment"], description["config"])
    first = jax.process_index() == 0
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(StopSignal())
        if first:
            cleanup.enter_context(sole_run(workdir))
            claim(workdir, description["experiment"], description["config"])
        checkpoints = cleanup.enter_context(
            Checkpoints(workdir / "checkpoints", keep_newest=settings.keep_newest, keep_every=settings.keep_every)
        )
        step = checkpoints.newest or 0
        batches = cleanup.enter_context(contextlib.closing(experiment.batches(step)))
        batch = place_batch(mesh, next(batches))
        abstract = abstract_train_state(experiment, settings, mesh, batch)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        if checkpoints.newest is None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
            init = lambda: init_state(experiment, settings.seed, shapes, settings.ema_profiles)  # noqa: E731
            state = jax.jit(init, out_shardings=shardings)()
        else:
            state = checkpoints.restore(abstract)
        if step >= settings.num_steps:
            return state

        # Compiled before the first step: its cost is known apart, and another shape later is an error, not a recompile.
        compiling = time.perf_counter()
        ballot = Ballot(mesh)
        train_step = ballot.with_votes(make_step(experiment, settings), (shardings, None))
        train_step = train_step.lower(state, batch, ballot.vote(False)).compile()
        compile_seconds = time.perf_counter() - compiling
        meet("to train")
        description = {**description, "provenance": provenance()}

        logs = cleanup.enter_context(Loggers(workdir, start_step=step, num_steps=settings.num_steps, active=first))
        watch = Watch(workdir, skip_bad_steps=settings.skip_bad_steps, say=logs.say)
        if step:
            logs.say(f"going on from step {step} in {workdir}")
        clock = Stopwatch()
        previous: tuple[Report, jax.Array] | None = None
        # A single process that was stopped while it compiled has nothing new to save.
        stopped = ending = ballot.alone and stop.received is not None
        while not ending:
            clock.resume()
            state, report, stops = train_step(state, batch, ballot.vote(stop.received is not None))
            step += 1
            logs.advance()
            # The device works on this step while the host looks at the one before.
            if previous is not None:
                watch.look(previous[0], step - 1)
            if clock.steps == 0:
                jax.block_until_ready(report)
                logs.say(
                    f"first step {time.perf_counter() - begun:.1f} s after the start, "
                    f"of which {compile_seconds:.1f} s compiling"
                )
            clock.steps += 1

            last = step == settings.num_steps
            # Several processes go by the votes cast with the step before, which all of them see alike.
            stopped = stop.received is not None if ballot.alone else previous is not None and bool(previous[1])
            previous = report, stops
            ending = last or stopped
            log_now = step % settings.log_every == 0 or last
            save_now = step % settings.checkpoint_every == 0 or ending
            preview_now = experiment.preview is not None and (step % settings.preview_every == 0 or last)
            snapshot_now = state.profiles and settings.snapshot_every and (step % settings.snapshot_every == 0 or last)
            if log_now or save_now or preview_now or snapshot_now:
                watch.look(report, step)
                clock.pause()
            if log_now:
                values = metric_values(state)
                values["learning_rate"] = float(experiment.learning_rate(step - 1))
                values["images_per_second"] = clock.lap() * experiment.batch_size
                if settings.skip_bad_steps:
                    counted = float(state.metrics["grad_norm"].count)
                    values["skipped_steps"] = (step - 1) % settings.log_every + 1 - counted
                logs.log(step, values)
            if save_now:
                checkpoints.save(step, state, description)
            if snapshot_now:
                snapshots.save(workdir, step, state.profiles)
            if preview_now:
                draw_previews(experiment, state, workdir / "previews" / f"step_{step:08d}")
            if not ending:
                batch = place_batch(mesh, next(batches))
        checkpoints.wait()
        stopped |= ballot.alone and stop.received is not None  # while the last checkpoint was saved
        total = time.perf_counter() - begun
        logs.say(
            f"{clock.steps} steps in {total:.1f} s, {clock.seconds:.1f} s of it in steps "
            f"(goodput {clock.seconds / total:.0%})"
        )
    if stopped:
        logs.say(f"stopped and saved at step {step}; the same command goes on from there")
        raise SystemExit(130 if stop.received is signal.SIGINT else 0)
    return state


def make_step(experiment: Experiment, settings: Settings) -> Callable[[TrainState, Batch], tuple[TrainState, Report]]:
    """Returns the train step that `settings` asks for."""
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
    """Whether to stop, decided by all processes in one step: a signal reaches each at another time, or only one."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.alone = jax.process_count() == 1
        self._none = jnp.zeros(0, bool)

    def vote(self, stop: bool) -> jax.Array:
        """Returns this process's vote beside those of the others, bool[devices]; where it is alone it needs none."""
        count = len(self._mesh.local_devices)
        return self._none if self.alone else place_batch(self._mesh, {"stop": np.full(count, stop)})["stop"]

    def with_votes(self, train_step: Callable[..., Any], shardings: tuple[Any, Any]) -> Any:
        """Returns jitted (state, batch, votes) -> (state, report, whether any process voted to stop)."""

        def step(state: TrainState, batch: Batch, votes: jax.Array) -> tuple[TrainState, Report, jax.Array]:
            return (*train_step(state, batch), jnp.any(votes))

        return jax.jit(step, donate_argnums=0, out_shardings=(*shardings, None))


def metric_values(state: TrainState) -> dict[str, float]:
    """Returns the means since the last log line; a mean over nothing (no example in that time range) is left out."""
    means = jax.device_get(state.metrics)
    return {name: float(mean.total / mean.count) for name, mean in means.items() if mean.count > 0}


def draw_previews(experiment: Experiment, state: TrainState, path: Path) -> None:
    """Draws what the raw and the averaged weights make of the same fixed noise."""
    assert experiment.preview is not None
    for name, params in (("raw", state.params), ("ema", state.ema)):
        images = multihost_utils.process_allgather(experiment.preview(params), tiled=True)
        if jax.process_index() == 0:
            save_png(path.with_name(f"{path.name}_{name}.png"), image_grid(images), smallest_side=480)


class Stopwatch:
    """Seconds spent in steps, saving and drawing not counted."""

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
