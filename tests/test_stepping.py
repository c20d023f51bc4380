"""How samplers run: one scan, compiled once, for any batch, device, type, grid and network; and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import exact_denoise
from solvers import (
    CHAIN,
    DETERMINISTIC,
    EVERY,
    GRIDS,
    STOCHASTIC,
    VP,
    jitted,
    make_gaussian,
    make_mixture,
    noisy,
    sample,
)

from diffusion import schedules
from diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun, unipc
from diffusion.schedules import Grid


@pytest.mark.parametrize("name", EVERY)
def test_one_step_of_one_image_by_a_bfloat16_network_is_its_x_0_hat(name):
    for grid_name, (process, make_grid) in GRIDS.items():
        if name == "heun_churn":  # evaluates at another noise level
            continue
        grid, data = make_grid(1), make_gaussian()
        x_T = noisy(grid, 1)
        x_0 = sample(EVERY[name], data, grid, x_T, jax.random.key(1), jnp.bfloat16)
        expected = exact_denoise(data, process)(x_T, grid.time[0]).astype(jnp.bfloat16)
        assert x_0.dtype == jnp.float32
        # The looked-up signal may differ by a rounding, which bfloat16 makes 2^-8 of the value.
        np.testing.assert_allclose(x_0, expected.astype(jnp.float32), rtol=2**-7, err_msg=grid_name)


@pytest.mark.parametrize("name", EVERY)
def test_no_nan_at_any_end(name):
    with jax.debug_nans(True):
        for num_steps in (2, 4):
            for _, make_grid in GRIDS.values():
                grid = make_grid(num_steps)
                if name == "heun_churn":
                    grid = schedules.karras_grid(num_steps)
                assert jnp.all(jnp.isfinite(sample(EVERY[name], make_gaussian(), grid, noisy(grid), jax.random.key(1))))


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp_3", "unipc_3"])
def test_float32_is_close_to_float64_over_1000_steps(name):
    def run():
        return sample(DETERMINISTIC[name], make_gaussian(), schedules.process_grid(VP, 1000), jnp.ones((1, 2)))

    with jax.enable_x64(True):
        expected = run()
    np.testing.assert_allclose(run(), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["ancestral_small", "ddim", "heun_churn", "dpm_solver_pp_2", "unipc_2"])
def test_trajectory(name):
    grid, denoise = schedules.karras_grid(5), exact_denoise(make_mixture(), schedules.edm_process)
    x_T = grid.noise[0] * jax.random.normal(jax.random.key(0), (4, 2))
    key = jax.random.key(1)
    x_0, x_0_hats = jitted(EVERY[name], denoise, grid, trajectory=True)(x_T, key)
    assert x_0_hats.shape == (5, 4, 2)
    np.testing.assert_array_equal(x_0, jitted(EVERY[name], denoise, grid)(x_T, key))
    if name != "heun_churn":  # whose first evaluation is at a raised noise level
        np.testing.assert_allclose(x_0_hats[0], denoise(x_T, grid.time[0]), rtol=1e-5)
    np.testing.assert_allclose(x_0_hats[-1], x_0, rtol=1e-5)  # the last step goes to clean data


@pytest.mark.parametrize("name", EVERY)
def test_one_scan_compiled_once(name):
    grid, data = schedules.karras_grid(6), make_gaussian()

    @jax.jit
    def sample(mean, x_T, key):
        return EVERY[name](exact_denoise(data._replace(mean=mean), schedules.edm_process), x_T, grid, key)

    key, x_T = jax.random.key(0), jnp.ones((2, 2))
    equations = sample.trace(data.mean, x_T, key).jaxpr.eqns
    assert sum(equation.primitive.name == "scan" for equation in equations) == 1
    for i in range(3):
        sample(data.mean + i, x_T + i, jax.random.key(i))
    assert sample._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_does_not_depend_on_its_batch(name):
    grid, denoise = schedules.karras_grid(6), exact_denoise(make_gaussian(), schedules.edm_process)
    keys = jax.random.split(jax.random.key(0), 5)
    x_T = grid.noise[0] * jax.random.normal(jax.random.key(1), (5, 2))
    sample = jitted(STOCHASTIC[name], denoise, grid)
    batch = sample(x_T, keys)
    np.testing.assert_allclose(sample(x_T[3:4], keys[3:4])[0], batch[3], rtol=1e-6)
    np.testing.assert_allclose(sample(x_T[::-1], keys[::-1])[::-1], batch, rtol=1e-6)
    assert len(np.unique(np.asarray(sample(jnp.ones((5, 2)), keys))[:, 0])) == 5


def test_the_same_on_8_devices():
    grid, denoise = schedules.ddpm_grid(CHAIN, 6), exact_denoise(make_gaussian(), schedules.discrete_process(CHAIN))
    x_T = jax.random.normal(jax.random.key(1), (16, 2))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x_T, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    sample = jitted(ancestral, denoise, grid)
    np.testing.assert_allclose(sample(sharded, jax.random.key(0)), sample(x_T, jax.random.key(0)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["heun", "unipc_3"])
def test_a_grid_may_be_an_argument_of_the_jitted_function_or_not(name):
    grid, data = schedules.karras_grid(6), make_gaussian()
    expected = jitted(DETERMINISTIC[name], exact_denoise(data, schedules.edm_process), grid)(noisy(grid))
    np.testing.assert_allclose(sample(DETERMINISTIC[name], data, grid, noisy(grid)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_parts_of_a_grid_make_the_whole(float64, name):
    process, make_grid = GRIDS["flow"]
    grid, denoise = make_grid(6), exact_denoise(make_mixture(), process)
    x_T = jax.random.normal(jax.random.key(1), (4, 2))
    middle = DETERMINISTIC[name](denoise, x_T, Grid(*(field[:4] for field in grid)))
    x_0 = DETERMINISTIC[name](denoise, middle, Grid(*(field[3:] for field in grid)))
    np.testing.assert_allclose(x_0, DETERMINISTIC[name](denoise, x_T, grid), atol=1e-12)


def test_heun_evaluates_2n_minus_1_times():
    calls = []
    exact = exact_denoise(make_gaussian(), schedules.edm_process)

    def denoise(x, time):
        jax.debug.callback(calls.append, time)
        return exact(x, time)

    jax.block_until_ready(jitted(heun, denoise, schedules.karras_grid(18))(80 * jnp.ones((1, 2))))
    jax.effects_barrier()
    assert len(calls) == 35
    assert np.all(np.isfinite(calls))


def test_every_sampler_takes_a_network_with_learned_variance_and_leaves_it():
    grid, exact = schedules.karras_grid(3), exact_denoise(make_gaussian(), schedules.edm_process)
    x_T, key = 80 * jnp.ones((2, 2)), jax.random.key(0)
    for name, sampler in EVERY.items():
        with_v = jitted(sampler, lambda x, time: (exact(x, time), jnp.ones_like(x)), grid)
        np.testing.assert_array_equal(with_v(x_T, key), jitted(sampler, exact, grid)(x_T, key), err_msg=name)


X_T, KEY = jnp.ones((1, 2)), jax.random.key(0)


def zeros(x, time):
    return jnp.zeros_like(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ancestral(zeros, X_T, schedules.ddpm_grid(CHAIN, 5), KEY, variance="medium"), "choose 'small'"),
        (lambda: ancestral(zeros, X_T, schedules.flow_grid(5), KEY, variance="large"), "use variance='small'"),
        (lambda: ancestral(zeros, X_T, schedules.flow_grid(5), KEY, variance="learned"), "use variance='small'"),
        (lambda: ancestral(zeros, X_T, schedules.ddpm_grid(CHAIN, 5), KEY, variance="learned"), r"\(x_0_hat, v\)"),
        (lambda: ddim(zeros, X_T, schedules.flow_grid(5), KEY, eta=1.5), r"\[0, 1\]"),
        (lambda: ddim(zeros, X_T, schedules.flow_grid(5), eta=1.0), "give it a key"),
        (lambda: heun(zeros, X_T, schedules.karras_grid(5), s_churn=1.0), "give it a key"),
        (lambda: heun(zeros, X_T, schedules.flow_grid(5), KEY, s_churn=1.0), "karras_grid"),
        (lambda: dpm_solver_pp(zeros, X_T, schedules.flow_grid(5), order=4), "1, 2 or 3"),
        (lambda: dpm_solver_pp(zeros, X_T, schedules.flow_grid(5), solver_type="bh2"), "choose from midpoint, heun"),
        (lambda: unipc(zeros, X_T, schedules.flow_grid(5), order=0), "1, 2 or 3"),
        (lambda: ddim(zeros, X_T, Grid(*(field[:1] for field in schedules.flow_grid(5)))), "at least 2 points"),
        (lambda: ddim(zeros, X_T, Grid(*(field[::-1] for field in schedules.flow_grid(5)))), "has to fall"),
        (
            lambda: ancestral(zeros, jnp.ones((3, 2)), schedules.ddpm_grid(CHAIN, 5), jax.random.split(KEY)),
            "one per image",
        ),
    ],
)
def test_error_messages_of_impossible_combinations(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
