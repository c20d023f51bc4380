"""What students are compared with: the teacher's times, guidance and words; and what they begin as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import config_of
from test_objectives import FLOW, make_drawn

from diffusion import predictions
from diffusion.model.condition import rows_away
from diffusion.model.config import plain
from diffusion.model.distilled import policy_values
from diffusion.model.experiment import make_learner, make_model
from diffusion.model.losses import LOSSES
from diffusion.model.model import init, make_denoise
from diffusion.model.teacher import check_teacher, describe_teacher, fit_network
from diffusion.model.warnings import warnings_of
from diffusion.schedules import flow_grid
from diffusion.training import Mean, run_key

WORDS = ["a", "blue", "red", "two"]
TINY = dict(network__width=16, network__depth=1, network__num_heads=2, condition__width=8, data__batch_size=4)


@pytest.mark.parametrize("window", [0.0, 3 / 128, 1.0])
def test_one_image_in_one_step_has_a_finite_loss_and_gradient(window):
    objective = LOSSES["imitation"](FLOW, num_steps=(1,), num_values=3, window=window)

    def loss(weight):
        drawn = make_drawn(
            lambda x, t, next_time: jnp.tile(weight * x, 3), batch_size=1, teacher=lambda x, time: 0.5 * x
        )
        return objective.compute(drawn)[0].sum()

    value, slope = jax.value_and_grad(loss)(0.3)
    assert np.isfinite(value) and value > 0 and np.isfinite(slope) and slope != 0


def test_errors_of_steps_are_reported_by_their_place_least_noise_first():
    teacher = lambda x, time: 0 * x  # noqa: E731
    for name, fields in (("imitation", {"num_values": 2}), ("progressive", {})):
        times = []

        def network(x, t, next_time=None, name=name, times=times):
            times.append(t)
            return jnp.tile(x / t[:, None], 2 if name == "imitation" else 1) + t[:, None]  # wrong by t

        drawn = make_drawn(network, teacher=teacher)
        error = LOSSES[name](FLOW, **{"num_steps": (4,) if name == "imitation" else 4}, **fields).compute(drawn)[1]
        for part, t in enumerate((0.25, 0.5, 0.75, 1.0), 1):
            found = error[f"error_part_{part}_of_4"]
            np.testing.assert_array_equal(found.count, times[0] == t)
            np.testing.assert_array_equal(found.total > 0, times[0] == t)


def test_a_student_of_its_own_steps_sees_no_data():
    """Each of its grids from pure noise on, and as many intervals of each image as they have."""

    def network(x, t, next_time):
        return jnp.tile(x * (1 + t - next_time)[:, None], 2)

    found = {}
    for start in ("data", "own"):
        objective = LOSSES["imitation"](FLOW, num_steps=(1, 2), num_values=2, start=start)
        drawn = make_drawn(network, teacher=lambda x, time: 0.5 * x)
        other = drawn._replace(x_0=drawn.x_0 + 1)
        found[start] = [objective.compute(one) for one in (drawn, other)]
        losses, error = found[start][0]
        np.testing.assert_allclose(error["error"].total.sum() / error["error"].count.sum(), losses.mean(), rtol=1e-6)
        assert losses.shape == (8,)
    assert not np.array_equal(*(losses for losses, _ in found["data"]))
    np.testing.assert_array_equal(*(losses for losses, _ in found["own"]))


def test_a_policy_of_noise_is_refused():
    """At t = 1 it is all there is, and no x_0 follows from it."""
    with pytest.raises(ValueError, match=r"loss\.prediction=eps holds no image at t = 1"):
        LOSSES["imitation"](FLOW, prediction="eps")


@pytest.mark.parametrize("prediction", ["v", "velocity", "x_0"])
def test_a_policy_holds_the_values_of_any_prediction(prediction):
    """As many as there are, of channels that are not mixed."""
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    signal, noise = FLOW.at(jnp.asarray([0.2, 0.7, 1.0]))
    x_t = predictions.diffuse(x_0, eps, signal, noise)
    outputs = [predictions.target(prediction, x_0 + n, eps, signal, noise) for n in range(3)]
    expected = [predictions.to_x_0(prediction, one, x_t, signal, noise) for one in outputs]
    values = policy_values(prediction, jnp.concatenate(outputs, axis=-1), x_t, signal, noise)
    np.testing.assert_allclose(values, jnp.stack(expected, axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(values[:, 0], x_0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_progressive_distillation_takes_two_steps_of_the_teacher(shift):
    """Of a teacher that depends on its time, from each second point of twice the steps."""
    times = []

    def network(x, time):
        times.append(np.asarray(time, np.float64))
        return x / time[:, None]  # x_0_hat is 0

    drawn = make_drawn(network, teacher=lambda x, time: x * time[:, None])
    losses, _ = LOSSES["progressive"](FLOW, num_steps=4, shift=shift).compute(drawn)
    (t,) = times
    points = np.asarray(flow_grid(8, shift).time, np.float64)
    np.testing.assert_allclose(np.sort(t), np.repeat(points[6::-2], 2), rtol=1e-6)
    first = np.abs(points - t[:, None]).argmin(axis=1)
    t, s, r = (points[first + i][:, None] for i in range(3))
    x_t = x = (1 - t) * np.asarray(drawn.x_0, np.float64) + t * np.asarray(drawn.eps, np.float64)
    for here, there in ((t, s), (s, r)):
        x = x + (there - here) * (x - here * x) / here  # Euler's method
    target = (x - r / t * x_t) / (1 - r - r / t * (1 - t))
    expected = np.maximum((1 - t) / t, 1)[:, 0] ** 2 * np.mean(target**2, axis=1)
    # A difference of numbers of size 1 over 1/4, or 1/10 with the shift, at least: some 10 roundings of float32.
    tolerance = {1.0: 1e-5, 3.0: 2.5e-5}[shift]
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)


def scenes_student(words=WORDS, **fields):
    """Returns the config and the model of a student of scenes, and its teacher's."""
    flow = config_of("scenes", **TINY)
    theirs = make_model(flow, (16, 16, 3), vocabulary=words)
    stored = {"config": plain(flow), "image_shape": [16, 16, 3], "num_classes": None}
    about = describe_teacher({**stored, "condition": dict(theirs.condition.description or {})})
    config = config_of("scenes:imitation", **TINY, loss__num_values=3, loss__teacher="runs/flow", **fields)
    return config, make_model(config, (16, 16, 3), None, {"teacher": about}, words), theirs


def moved(params):
    """Returns parameters away from those that are drawn, of which the last layer's are 0."""
    keys = iter(jax.random.split(jax.random.key(7), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)


@pytest.mark.parametrize(("asked", "scale"), [(0.0, 3.0), (2.0, 2.0), (1.0, 1.0)])
def test_a_teacher_is_guided_as_its_run_draws_or_as_the_loss_has_it(asked, scale):
    _, student, _ = scenes_student(loss__guidance=asked)
    assert student.teacher is not None and student.teacher.sampling.scale == scale


def test_a_policy_of_pictures_in_colour_begins_as_its_teacher():
    """Whose patches hold several pixels of three channels."""
    _, student, theirs = scenes_student()
    key = jax.random.key(0)
    network = moved(jax.jit(lambda: init(theirs, key)["network"])())
    x_t, t = jax.random.normal(key, (2, 16, 16, 3)), jnp.asarray([0.9, 0.3])
    told = {"context": jnp.ones((2, 12, 8)), "pooled": jnp.ones((2, 8))}

    @jax.jit
    def both():
        fitted = fit_network(student, network, key)
        velocities = student.network.apply(fitted, x_t, t, **told, next_time=t / 2)
        velocity = theirs.network.apply(network, x_t, t, **told)
        return policy_values("velocity", velocities, x_t, 1 - t, t), x_t - t[:, None, None, None] * velocity

    values, expected = both()
    assert values.shape == (2, 3, 16, 16, 3) and np.abs(x_t - expected).max() > 0.1
    for number in range(3):
        np.testing.assert_allclose(values[:, number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("phrases", [0.0, 0.5], ids=["words", "phrases"])
def test_a_teacher_reads_its_own_words_guided_and_nothing_where_they_are_hidden(phrases):
    """It is led away from no words, or from the same ones without their phrases."""
    words = (*WORDS, "red two") if phrases else WORDS
    config, student, theirs = scenes_student(words, condition__dropout=0.5, condition__phrase_dropout=phrases)
    x, time = jax.random.normal(jax.random.key(1), (8, 16, 16, 3)), jnp.linspace(0.2, 1, 8)

    def compute(drawn):
        found = {"teacher": drawn.teacher(x, time), "student": drawn.network(x, time)}
        found |= {"nothing": drawn.unconditional(x, time), "hidden": drawn.hidden}
        return jnp.zeros(8), {name: Mean(value, value) for name, value in found.items()}

    seen = student._replace(objective=student.objective._replace(compute=compute))
    params = moved(jax.jit(lambda: init(seen, jax.random.key(2)))())
    text = student.condition.read(["a red two", "a blue two"] * 4)
    batch = {"image": np.zeros((8, 16, 16, 3), np.uint8), "label": np.arange(8, dtype=np.int32), "text": text}
    key = run_key(0, "train")
    found = jax.jit(make_learner(config, seen).loss)(params, batch, key)[1]
    found = {name: mean.total for name, mean in found.items()}
    hidden = np.asarray(found["hidden"])
    assert hidden.any() and not hidden.all()
    none = student.condition.read([None] * 8)
    read = np.where(hidden[:, None], none, text)
    if phrases:
        assert student.condition.rows_of_batch
        known, read = read, np.asarray(student.condition.rows_of_batch(jax.tree.map(jnp.asarray, batch), key))
        assert (read != known).any() and (read[hidden] == none[hidden]).all()
    away = rows_away(student.condition, read)

    @jax.jit
    def expected():
        def hats(rows):
            told = student.condition.of_request(params["teacher"]["text"], rows)
            return make_denoise(theirs, {"network": params["teacher"]["network"]}, told)(x, time)

        def velocities(rows):
            told = student.condition.of_request(params["text"], rows)
            return student.network.apply(params["network"], x, time, **told)

        return {
            "teacher": hats(away) + 3 * (hats(read) - hats(away)),
            "student": velocities(read),
            "nothing": velocities(none),
        }

    for name, value in expected().items():
        # Guided, the roundings of two evaluations count five times.
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
    assert np.abs(found["student"] - found["nothing"])[~hidden].max() > 1e-2


def test_a_policy_is_no_teacher():
    config, student, _ = scenes_student()
    about = {"config": plain(config), "image_shape": [16, 16, 3], "num_classes": None}
    about |= {"condition": dict(student.condition.description or {})}
    of_policy = make_model(config, (16, 16, 3), None, {"teacher": about}, WORDS)
    with pytest.raises(ValueError, match=r"^loss.teacher=runs/flow was trained by loss.name=imitation,"):
        check_teacher(config, of_policy)


def test_guidance_on_top_of_what_is_trained_in_is_reported():

    def warned(spec, guidance):
        config = config_of(spec, sampling__guidance=guidance)
        return warnings_of(config, make_model(config, (16, 16, 3), vocabulary=WORDS))

    line = "sampling.guidance=3 comes on top of what loss.name={} trains the network to have: set it to 1"
    for name in ("progressive", "mean_flow"):
        assert warned(f"scenes:{name}", 3.0) == [line.format(name)]
        assert warned(f"scenes:{name}", 1.0) == []
    assert warned("scenes", 3.0) == []
