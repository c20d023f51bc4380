"""Power-function averages against their definition as a sum, and reconstructed ones against tracked ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.averages import combine, power_exponent, power_rate, profile_product
from diffusion.training import RunError, snapshots


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94), (18**-0.5, 1.0)])
def test_exponents(sigma_rel, gamma):
    # The paper's pairs (section 3.1: 16.97 and 6.94), and gamma = 1, the triangle, of variance 1 / 18.
    assert power_exponent(sigma_rel) == pytest.approx(gamma, rel=1e-3)


def test_the_longest_average_is_the_mean_of_all():
    assert power_exponent(12**-0.5) == pytest.approx(0.0, abs=1e-6)
    average = 0.0
    for step, value in enumerate([3.0, 5.0, 10.0], 1):
        average += float(power_rate(step, 0.0)) * (value - average)
    assert average == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_lengths_that_no_average_has(sigma_rel):
    with pytest.raises(ValueError, match="length of an average"):
        power_exponent(sigma_rel)


def test_rate_late_in_a_run_keeps_its_digits():
    exact = -np.expm1(17.97 * np.log1p(-1 / 800_000))
    assert float(power_rate(800_000, 16.97)) == pytest.approx(exact, rel=1e-6)


def test_profile_products_are_the_integrals():
    tau = (np.arange(200_000) + 0.5) / 200_000 * 10

    def profile(t, gamma):
        return np.where(tau < t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)

    for t_1, g_1, t_2, g_2 in [(4.0, 7.0, 10.0, 17.0), (10.0, 7.0, 4.0, 17.0), (10.0, 3.0, 10.0, 5.0)]:
        numeric = (profile(t_1, g_1) * profile(t_2, g_2)).sum() * (tau[1] - tau[0])
        assert profile_product(t_1, g_1, t_2, g_2) == pytest.approx(numeric, rel=1e-3)


def walk(num_steps, size=64):
    """Weights that drift and jitter, as trained ones do."""
    rng = np.random.RandomState(0)
    return np.cumsum(rng.normal(size=(num_steps, size)) * 0.1, axis=0) + rng.normal(size=(num_steps, size))


def track(weights, gamma):
    average, history = np.zeros(weights.shape[1]), []
    for step, theta in enumerate(weights, 1):
        average = average + float(power_rate(step, gamma)) * (theta - average)
        history.append(average)
    return np.array(history)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.07, 0.10, 0.15, 0.20])
def test_an_average_after_the_fact_is_the_tracked_one_within_a_percent(sigma_rel):
    weights, stored = walk(2000), range(50, 2001, 50)
    histories = {s: track(weights, power_exponent(s)) for s in (0.05, 0.10)}
    pairs = [(step, s) for step in stored for s in histories]
    combination = combine([t for t, _ in pairs], [power_exponent(s) for _, s in pairs], 2000, power_exponent(sigma_rel))
    made = sum(w * histories[s][step - 1] for w, (step, s) in zip(combination.weight, pairs, strict=True))
    tracked = track(weights, power_exponent(sigma_rel))[-1]
    assert np.linalg.norm(made - tracked) < 0.01 * np.linalg.norm(tracked)
    assert combination.error < 0.05
    if sigma_rel in histories:  # a stored one is itself
        np.testing.assert_allclose(made, tracked, rtol=1e-5, atol=1e-6)


def test_a_length_out_of_reach_says_how_far():
    combination = combine([100, 100], [power_exponent(0.05), power_exponent(0.1)], 100, power_exponent(0.01))
    assert combination.error > 0.3


def test_stored_and_reconstructed(tmp_path):
    weights = walk(400, size=6).astype(np.float32)
    tracked = {name: track(weights, power_exponent(float(name))) for name in ("0.05", "0.1", "0.07")}

    def tree(vector):
        dense = {"kernel": jnp.asarray(vector[:4].reshape(2, 2)), "bias": jnp.asarray(vector[4:5])}
        return {"params": {"dense": dense, "scale": jnp.asarray(vector[5])}}

    for step in range(20, 401, 20):
        snapshots.save(tmp_path, step, {name: tree(tracked[name][step - 1]) for name in ("0.05", "0.1")})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree(weights[0]))
    made = snapshots.reconstruct(tmp_path, 0.07, like)
    for ours, theirs in zip(jax.tree.leaves(made.params), jax.tree.leaves(tree(tracked["0.07"][-1])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.01)
    earlier = snapshots.reconstruct(tmp_path, 0.1, like, step=200)
    np.testing.assert_allclose(
        earlier.params["params"]["dense"]["bias"], tracked["0.1"][199][4:5], rtol=1e-4, atol=1e-5
    )

    with pytest.raises(RunError, match="no averages of step 30"):
        snapshots.reconstruct(tmp_path, 0.07, like, step=30)
    other = {"params": {"dense": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}}
    with pytest.raises(RunError, match=r"another network: 0\.\d+/params/dense/kernel is not \[3, 2\]"):
        snapshots.reconstruct(tmp_path, 0.07, other)
    last = snapshots.stored_steps(tmp_path)[400]
    last.write_bytes(last.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"step_000000400\.safetensors is not a whole file"):
        snapshots.reconstruct(tmp_path, 0.07, like)


def test_nothing_stored(tmp_path):
    with pytest.raises(RunError, match="holds no averages: train with"):
        snapshots.reconstruct(tmp_path, 0.07, {})
