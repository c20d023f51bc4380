"""Progressive distillation against two steps of the teacher."""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import exact_denoise
from few_step import make_gaussian, points

from diffusion import distillation, schedules
from diffusion.samplers import ddim
from diffusion.schedules import Grid

pytestmark = pytest.mark.usefixtures("float64")
PROCESSES = {
    "flow": (schedules.flow_process, [1.0, 0.6, 0.0]),
    "edm": (schedules.edm_process, [1.0, 0.2, -0.5]),
    "vp": (schedules.vp_process(schedules.cosine_log_snr()), [0.9, 0.5, 0.1]),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_one_step_to_the_progressive_target_is_two_of_the_teachers(name):
    process, times = PROCESSES[name]
    x = points()[0]
    teacher = exact_denoise(make_gaussian(), process)
    time = jnp.asarray(times)
    signal, noise = process(time)
    grid = Grid(jnp.broadcast_to(signal, time.shape), noise, time)
    two = ddim(teacher, x, grid)
    target = distillation.progressive_target(teacher, process, x, *times)
    one = ddim(lambda x, time: target, x, Grid(*(field[jnp.asarray([0, 2])] for field in grid)))
    np.testing.assert_allclose(one, two, atol=1e-13)
    per_image = [jnp.full(len(x), time) for time in times]
    columns = lambda x, time: teacher(x, time[0])  # noqa: E731
    np.testing.assert_allclose(distillation.progressive_target(columns, process, x, *per_image), target, atol=1e-14)


def test_a_progressive_student_that_is_right_costs_nothing_and_others_by_the_truncated_snr():
    process, x = schedules.flow_process, points()[0]
    t = jnp.asarray([1.0, 0.9, 0.7, 0.5, 0.4, 0.25])
    teacher = lambda x, time: jnp.full_like(x, 0.3)  # noqa: E731
    loss, error = distillation.progressive_loss(teacher, teacher, process, x, t, 0.8 * t, 0.6 * t)
    assert (loss < 1e-28).all()
    student = lambda x, time: teacher(x, time) + 2  # noqa: E731
    loss, error = distillation.progressive_loss(student, teacher, process, x, t, 0.8 * t, 0.6 * t)
    np.testing.assert_allclose(error, 4, rtol=1e-12)
    np.testing.assert_allclose(loss, 4 * np.asarray([1, 1, 1, 1, 1.5**2, 9]), rtol=1e-12)
