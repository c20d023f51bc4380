"""Losses that learn from a trained model: imitation by a policy, and progressive distillation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion import distillation, flow, policies, predictions, schedules
from diffusion.model.choices import of_name
from diffusion.model.objectives import Drawn, Found, Objective, check_flow, errors
from diffusion.model.processes import Process


def imitation(
    process: Process,
    *,
    teacher: str = "",
    guidance: float = 0.0,
    num_steps: tuple[int, ...] = (4,),
    shift: float = 1.0,
    num_values: int = 10,
    num_points: int = 2,
    window: float = 3 / 128,
    start: str = "data",
    prediction: str = "velocity",
) -> Objective:
    """Returns pi-Flow's imitation of a trained flow by a policy for whole steps (`policies.imitation_loss`).

    Args:
      process: a flow.
      teacher: work folder of the flow's run, or FOLDER:STEP.
      guidance: of the teacher, which the student has then without; 0: that which the teacher's run samples with.
      num_steps: in how many the student draws; several are learned by one student.
      shift: of the times of steps, and of values within one, towards noise.
      num_values: of x_0 in a step.
      num_points: of a step at which teacher and policy are compared.
      window: over which the policy's velocity is averaged, in time.
      start: of an interval: data, with noise added; or own, where the student's own steps led, all of an image's
        intervals in turn, which costs as much as a batch so many times as large, and is the better for guidance.
      prediction: what the network returns, so often as there are values; the teacher's, where the student begins as it.

    Source: Chen et al. 2025, "pi-Flow: Policy-Based Few-Step Generation via Imitation Distillation".
    """
    del teacher  # opened where a run starts
    check_flow(process, "imitation")
    check_distilled(guidance, num_steps)
    if num_values < 2 or num_points < 1:
        raise ValueError(f"loss.num_values is {num_values} and num_points {num_points}: at least 2 and 1 are needed")
    if not 0 <= window <= 1:
        raise ValueError(f"loss.window is {window}: it is a share of the time from 0 to 1")
    if prediction == "eps":
        raise ValueError(
            "loss.prediction=eps holds no image at t = 1, where the first step begins: predict v or velocity"
        )
    along = of_name({"data": False, "own": True}, start, "loss.start")
    grids = tuple(schedules.flow_grid(count, shift) for count in num_steps)

    def compute(drawn: Drawn) -> Found:
        def student(x_t: jax.Array, t: jax.Array, r: jax.Array) -> jax.Array:
            signal, noise = process.at(t)
            output = drawn.network(predictions.network_input(prediction, x_t, signal, noise), t, next_time=r)
            return policy_values(prediction, output, x_t, signal, noise)

        if along:
            return of_trajectories(drawn, student)
        keys = jax.random.split(drawn.key)
        r, t = policies.draw_interval(keys[0], len(drawn.x_0), *(jnp.asarray(grid.time) for grid in grids))
        points = policies.draw_points(keys[1], num_points, r, t, jnp.minimum(window, t - r))
        x_t = flow.interpolate(drawn.x_0, drawn.eps, t)
        policy = policies.make_policy(student(x_t, t, r), r, t, shift)
        losses, error = policies.imitation_loss(policy, drawn.teacher, x_t, r, t, points, window)
        return losses, errors(error, (r + t) / 2)

    def of_trajectories(drawn: Drawn, student: policies.Student) -> Found:
        found, middles = [], []
        for number, grid in enumerate(grids):
            times, key = jnp.asarray(grid.time, jnp.float32), jax.random.fold_in(drawn.key, number)
            losses, _ = policies.trajectory_loss(
                student, drawn.teacher, drawn.eps, times, key, num_points, window, shift
            )
            found.append(losses)
            middles.append((times[:-1] + times[1:]) / 2)
        losses, middle = jnp.concatenate(found), jnp.concatenate(middles)
        error = errors(losses, jnp.broadcast_to(middle[:, None], losses.shape))
        return jax.tree.map(lambda by_interval: by_interval.mean(axis=0), (losses, error))

    return Objective(
        compute,
        prediction,
        ("policy",),
        mean=False,
        two_times=True,
        num_values=num_values,
        grids=grids,
        teacher=True,
        teacher_scale=guidance,
    )


def policy_values(prediction: str, output: jax.Array, x_t: jax.Array, signal: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns the values of x_0 [B, N, ...] of N predictions at x_t, which a network returns as channels."""
    outputs = jnp.moveaxis(output.reshape(*x_t.shape[:-1], -1, x_t.shape[-1]), -2, 1)
    return jax.vmap(lambda one: predictions.to_x_0(prediction, one, x_t, signal, noise), in_axes=1, out_axes=1)(outputs)


def progressive(
    process: Process,
    *,
    teacher: str = "",
    guidance: float = 0.0,
    num_steps: int = 4,
    shift: float = 1.0,
    prediction: str = "velocity",
) -> Objective:
    """Returns progressive distillation: a student whose step is two of its teacher's (`distillation.progressive_loss`).

    A run is one round; the next has half as many steps, and this run as its teacher.

    Args:
      process: the teacher's.
      teacher: work folder of its run, or FOLDER:STEP.
      guidance: of the teacher, which the student has then without; 0: that which the teacher's run samples with.
      num_steps: the student's, half of those of the teacher.
      shift: of the times of steps, towards noise; of a flow.
      prediction: what the network returns; the teacher's, where the student begins as it.

    Source: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models".
    """
    del teacher  # opened where a run starts
    check_distilled(guidance, (num_steps,))
    grid = process.even(2 * num_steps, 1.0, shift)
    first = jnp.arange(0, 2 * num_steps, 2)

    def compute(drawn: Drawn) -> Found:
        time = jnp.asarray(grid.time, jnp.float32)
        start = jax.random.randint(drawn.key, (), 0, num_steps)
        step = first[(start + jnp.arange(len(drawn.x_0))) % num_steps]
        t, s, r = (time[step + i] for i in range(3))
        x_t = predictions.diffuse(drawn.x_0, drawn.eps, *process.at(t))
        student = predictions.denoiser(prediction, drawn.network, process.at)
        losses, error = distillation.progressive_loss(student, drawn.teacher, process.at, x_t, t, s, r)
        return losses, errors(error, 1 - (step + 1) / (2 * num_steps))

    own = schedules.Grid(*(field[::2] for field in grid))
    return Objective(compute, prediction, mean=False, grids=(own,), teacher=True, teacher_scale=guidance)


def check_distilled(guidance: float, num_steps: Sequence[int]) -> None:
    """Raises ValueError where the numbers of a distillation cannot be."""
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"loss.guidance is {guidance}: give the scale of the teacher's, or 0 for its own")
    if not num_steps or min(num_steps) < 1:
        raise ValueError(f"loss.num_steps is {num_steps}: give at least one number of steps, of at least 1")
