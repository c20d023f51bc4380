"""Samplers against exact solutions, against each other, and against diffusers' schedulers."""

import functools
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import Gaussian, Mixture, exact_denoise

from diffusion import gaussian, guidance, samplers, schedules
from diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun, unipc
from diffusion.schedules import Grid

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "schedulers.npz")
VP = schedules.vp_process(schedules.cosine_log_snr())
DETERMINISTIC = {
    "ddim": ddim,
    "heun": heun,
    "dpm_solver_pp_1": partial(dpm_solver_pp, order=1),
    "dpm_solver_pp_2": partial(dpm_solver_pp, order=2),
    "dpm_solver_pp_3": partial(dpm_solver_pp, order=3),
    "unipc_1": partial(unipc, order=1),
    "unipc_2": partial(unipc, order=2),
    "unipc_3": partial(unipc, order=3),
}
STOCHASTIC = {
    "ancestral_small": partial(ancestral, variance="small"),
    "ddim_eta": partial(ddim, eta=0.7),
    "heun_churn": partial(heun, s_churn=10.0),
}
# Every kind of grid, each with its process.
CHAIN = schedules.make_schedule(schedules.linear_beta(1000))


def discrete(time):
    return schedules.discrete_process(schedules.make_schedule(schedules.linear_beta(1000)))(time)


def ddpm_grid(num_steps):
    """On a chain of the float that is on, which CHAIN is not in the tests with float64."""
    return schedules.ddpm_grid(schedules.make_schedule(schedules.linear_beta(1000)), num_steps)


GRIDS = {
    "ddpm": (discrete, ddpm_grid),
    "vp": (VP, partial(schedules.process_grid, VP)),
    "edm": (schedules.edm_process, schedules.karras_grid),
    "flow": (schedules.flow_process, schedules.flow_grid),
}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def make_gaussian():
    return Gaussian(jnp.asarray([0.3, -0.5]), jnp.asarray([0.7, 0.2]))


def make_mixture():
    return Mixture(jnp.asarray([0.3, 0.7]), jnp.asarray([[0.8, 0.2], [-0.5, -0.1]]), jnp.asarray([0.3, 0.25]))


def path(name, num_steps):
    """A grid between two times of a process, with noise at both ends."""
    process, first, last = PATHS[name]
    time = jnp.linspace(first, last, num_steps + 1)
    signal, noise = process(time)
    return Grid(signal, noise, time)


def jitted(sampler, denoise, grid, **keywords):
    return jax.jit(lambda x_T, key=None: sampler(denoise, x_T, grid, key, **keywords))


@partial(jax.jit, static_argnames=("sampler", "dtype"))
def sample(sampler, data, grid, x_T, key=None, dtype=None):
    """Samples with the exact denoiser. Data and grid are arguments, so that a sampler is compiled once for all of them:

    signal and noise at a time are looked up in the grid.
    """

    def process(time):
        i = jnp.argmin(jnp.abs(grid.time - time))
        return grid.signal[i], grid.noise[i]

    exact = exact_denoise(data, process)
    return sampler(lambda x, time: exact(x, time).astype(dtype or x.dtype), x_T, grid, key)


def noisy(grid, batch_size=4):
    """An x_T of the grid's first noise level."""
    return grid.noise[0] * jax.random.normal(jax.random.key(7), (batch_size, 2))


# Interior parts of three processes. Solvers with a history start with a step of order 1, whose error is of order 2 in
# the whole; it does not show on "edm", where x_0_hat hardly changes with the time at first.
PATHS = {
    "vp": (VP, 0.9, 0.1),
    "flow": (schedules.flow_process, 0.9, 0.1),
    "edm": (schedules.edm_process, np.log(80.0) / 4, np.log(0.1) / 4),
}
# UniPC of order p corrects to order p + 1 (Zhao et al. 2023, theorem 3.1). as_released is the third-order formula with
# half of its second difference.
ORDERS = [
    ("ddim", ddim, 1, ["vp", "flow", "edm"]),
    ("heun", heun, 2, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_1", partial(dpm_solver_pp, order=1), 1, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_2", partial(dpm_solver_pp, order=2), 2, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_2_heun", partial(dpm_solver_pp, order=2, solver_type="heun"), 2, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_3", partial(dpm_solver_pp, order=3), 3, ["edm"]),
    ("dpm_solver_pp_3_released", partial(dpm_solver_pp, order=3, as_released=True), 2, ["edm"]),
    ("unipc_1", partial(unipc, order=1), 2, ["vp", "flow", "edm"]),
    ("unipc_2", partial(unipc, order=2), 3, ["edm"]),
]


@functools.cache
def exact_end(make_data, path_name):
    """Noise at the first point of a path, and where the exact solution of the ODE takes it; in float64."""
    grid = path(path_name, 1)
    start, end = [(grid.signal[i], grid.noise[i]) for i in (0, -1)]
    x_T = start[1] * jax.random.normal(jax.random.key(0), (8, 2))
    return x_T, make_data().flow(x_T, start, end)


@pytest.mark.parametrize(("name", "sampler", "order", "paths"), ORDERS, ids=[case[0] for case in ORDERS])
def test_order_of_convergence(float64, name, sampler, order, paths):
    for make_data, path_name in [(make_gaussian, name) for name in paths] + [(make_mixture, "edm")]:
        x_T, exact = exact_end(make_data, path_name)
        num_steps = [256, 384, 512]  # the asymptotic range; errors stay above 1e-9, round-off is at 1e-14
        errors = []
        for n in num_steps:
            x_0 = sample(sampler, make_data(), path(path_name, n), x_T)
            errors.append(np.sqrt(np.mean((x_0 - exact) ** 2)))
        slope = -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]
        assert abs(slope - order) < 0.1, f"{path_name}: {slope:.3f}, errors {errors}"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_full_grids_reach_the_exact_solution(float64, name):
    for _, make_grid in GRIDS.values():
        data, grid = make_gaussian(), make_grid(200)
        exact = data.flow(noisy(grid), (grid.signal[0], grid.noise[0]), (1.0, 0.0))
        # A method of order 1 leaves some 2% of the std at 200 steps, the others less.
        tolerance = 3e-2 if name in ("ddim", "dpm_solver_pp_1") else 1e-2
        np.testing.assert_allclose(sample(DETERMINISTIC[name], data, grid, noisy(grid)), exact, atol=tolerance)


@pytest.mark.parametrize(
    ("sampler", "grid_name"),
    [
        (partial(ancestral, variance="large"), "ddpm"),
        (partial(ancestral, variance="small"), "ddpm"),
        (partial(ancestral, variance="learned"), "ddpm"),
        (partial(ancestral, variance="small"), "flow"),
        (partial(ddim, eta=0.5), "vp"),
        (partial(heun, s_churn=100.0), "edm"),
    ],
)
def test_moments_of_stochastic_samplers(sampler, grid_name):
    # 1% is 3 standard errors of the mean, and 4.5 of the std, of 100,000 values.
    process, make_grid = GRIDS[grid_name]
    data, grid = Gaussian(jnp.asarray(0.3), jnp.asarray(0.6)), make_grid(1000)

    def denoise(x, time):
        x_0_hat = data.posterior_mean(x, *process(time))
        return (x_0_hat, 0.3 * jnp.ones_like(x)) if sampler.keywords.get("variance") == "learned" else x_0_hat

    x_T = grid.noise[0] * jax.random.normal(jax.random.key(0), (100_000,))
    x_0 = jitted(sampler, denoise, grid)(x_T, jax.random.key(1))
    assert abs(jnp.mean(x_0) - data.mean) < 0.01 * data.std
    assert abs(jnp.std(x_0) / data.std - 1) < 0.01


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ancestral_on_every_step_is_ddpm(float64, variance):
    # Against Algorithm 2 as gaussian.py has it: the mean from eps_hat and the beta table, not from signal and noise.
    chain = schedules.make_schedule(schedules.linear_beta(8, 1e-3, 0.4))
    grid, process = schedules.ddpm_grid(chain, 8), schedules.discrete_process(chain)
    exact = exact_denoise(make_mixture(), process)

    def denoise(x, time):
        return (exact(x, time), jnp.sin(x)) if variance == "learned" else exact(x, time)

    key = jax.random.key(0)
    x_t = x_T = jax.random.normal(jax.random.key(1), (3, 2))
    for index, t in enumerate(range(8, 0, -1)):
        t = jnp.full(3, t)
        signal, noise = process(t[0] - 1.0)
        eps_hat = (x_t - signal * exact(x_t, t[0] - 1.0)) / noise
        sigma_2 = gaussian.learned_variance(chain, jnp.sin(x_t), t) if variance == "learned" else variance
        x_t = gaussian.p_sample(jax.random.fold_in(key, index), chain, eps_hat, x_t, t, sigma_2)
    np.testing.assert_allclose(ancestral(denoise, x_T, grid, key, variance), x_t, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "same"),
    [(partial(ddim, eta=1.0), partial(ancestral, variance="small")), (partial(dpm_solver_pp, order=1), ddim)],
    ids=["ddim with eta 1 is ancestral", "dpm_solver_pp of order 1 is ddim"],
)
def test_equal_samplers(float64, sampler, same):
    for _, make_grid in GRIDS.values():
        grid, data, key = make_grid(10), make_mixture(), jax.random.key(1)
        expected = sample(same, data, grid, noisy(grid), key)
        np.testing.assert_allclose(sample(sampler, data, grid, noisy(grid), key), expected, atol=1e-12)


def test_ddim_on_a_flow_grid_is_euler_for_the_velocity(float64):
    grid = schedules.flow_grid(10, shift=3.0)
    denoise = exact_denoise(make_mixture(), schedules.flow_process)
    x_t = x_T = jax.random.normal(jax.random.key(0), (4, 2))
    for t, t_next in zip(grid.time[:-1], grid.time[1:], strict=True):
        velocity = (x_t - denoise(x_t, t)) / t
        x_t = x_t + (t_next - t) * velocity
    np.testing.assert_allclose(ddim(denoise, x_T, grid), x_t, atol=1e-12)


def toy_network(x, time):
    """The "network" of golden/record_schedulers.py."""
    return 0.5 * x + 0.5 * jnp.tanh(x + jnp.sin(0.01 * time))


def golden_denoise(grid, name):
    """x_0_hat of the toy network, whose signal and noise at a time are the recorded ones."""

    def denoise(x, time):
        i = jnp.argmin(jnp.abs(grid.time - time))
        signal, noise = grid.signal[i], grid.noise[i]
        x_in = x / jnp.sqrt(signal**2 + noise**2) if name in ("euler", "heun") else x
        output = toy_network(x_in, time)
        if name == "flow_euler":
            return x - noise * output
        if name == "ddim_zero_snr":  # the one that predicts v
            return signal * x - noise * output
        x_0_hat = (x - noise * output) / signal
        return (x_0_hat, jnp.cos(3 * x_in + 0.01 * time)) if name == "ddpm_learned" else x_0_hat

    if name in ("ddim_clip", "ddim_clip_half"):
        return guidance.clip(denoise, keep_eps=True)
    return guidance.clip(denoise) if name in ("ddpm_small_clip", "ddim_clip_anew") else denoise


STABLE_DIFFUSION = schedules.sqrt_linear_beta(1000)
# Case -> the grid that diffusers' timesteps and final sigma are, on our interface.
RELEASED_GRIDS = {
    "ddpm_small_trailing": lambda: schedules.spaced_grid(CHAIN, 7, "trailing"),
    "ddpm_small_linspace": lambda: schedules.spaced_grid(CHAIN, 7, "linspace"),
    "ddim_clip": lambda: schedules.spaced_grid(CHAIN, 10, "leading"),
    "ddim_stable_diffusion": lambda: schedules.spaced_grid(
        schedules.make_schedule(STABLE_DIFFUSION), 10, "leading", steps_offset=1, final="sigma_min"
    ),
    "ddim_zero_snr": lambda: schedules.spaced_grid(
        schedules.make_schedule(schedules.rescale_zero_terminal_snr(schedules.linear_beta(1000))), 10, "trailing"
    ),
    "dpm_solver_pp_2": lambda: schedules.spaced_grid(CHAIN, 10, "linspace", skip_last=True),
    "dpm_solver_pp_leading": lambda: schedules.spaced_grid(CHAIN, 10, "leading", steps_offset=1, skip_last=True),
    "dpm_solver_pp_3_sigma_min_of_16": lambda: schedules.spaced_grid(
        CHAIN, 16, "linspace", final="sigma_min", skip_last=True
    ),
    "flow_euler": lambda: schedules.released_flow_grid(10, shift=3.0),
}


@pytest.mark.parametrize("name", RELEASED_GRIDS)
def test_grids_of_published_pipelines(name):
    grid, expected = RELEASED_GRIDS[name](), GOLDEN[f"{name}/grid"]
    if name == "flow_euler":
        # Its shift is applied in float32 twice: 4 roundings of 6e-8 each.
        np.testing.assert_allclose(jnp.stack(grid[:2]), expected[:2], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(1000 * grid.time[:-1], expected[2, :-1], rtol=1e-6)  # the last is not used
        return
    # Their alpha_bar is a product of 1000 float32 numbers, off by 1000 roundings of 6e-8 at most, and 1 - alpha_bar
    # cancels at t = 1. rescale_zero_snr subtracts and divides such products: at its smallest signal, 0.01, by 1e-5.
    rtol = 1e-3 if name == "ddim_zero_snr" else 1e-4
    np.testing.assert_allclose(jnp.stack(grid[:2]), expected[:2], rtol=rtol)
    np.testing.assert_array_equal(grid.time, expected[2])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("family", ["ddim", "dpm"])
def test_spaced_times_are_diffusers(family, spacing):
    num_steps = [int(name.split("/")[-1]) for name in GOLDEN if name.startswith(f"times/{family}/{spacing}/")]
    assert len(num_steps) == 12
    for n in num_steps:
        grid = schedules.spaced_grid(CHAIN, n, spacing, skip_last=family == "dpm")
        np.testing.assert_array_equal(grid.time[:-1], GOLDEN[f"times/{family}/{spacing}/{n}"], err_msg=str(n))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("ddpm_small", partial(ancestral, variance="small")),
        ("ddpm_large", partial(ancestral, variance="large")),
        ("ddpm_learned", partial(ancestral, variance="learned")),
        ("ddpm_large_1000", partial(ancestral, variance="large")),
        ("ddpm_small_clip", partial(ancestral, variance="small")),
        ("ddim_0", ddim),
        ("ddim_half", partial(ddim, eta=0.5)),
        ("ddim_1", partial(ddim, eta=1.0)),
        ("euler", ddim),
        ("heun", heun),
        ("dpm_solver_pp_2", partial(dpm_solver_pp, order=2)),
        ("dpm_solver_pp_3", partial(dpm_solver_pp, order=3, as_released=True)),
        ("unipc_2", partial(unipc, order=2)),
        ("unipc_3", partial(unipc, order=3)),
        ("flow_euler", ddim),
        ("ddpm_small_trailing", partial(ancestral, variance="small")),
        ("ddpm_small_linspace", partial(ancestral, variance="small")),
        ("ddim_clip", ddim),
        ("ddim_clip_half", partial(ddim, eta=0.5)),
        ("ddim_clip_anew", ddim),
        ("ddim_stable_diffusion", ddim),
        ("ddim_zero_snr", ddim),
        ("dpm_solver_pp_heun", partial(dpm_solver_pp, order=2, solver_type="heun")),
        ("dpm_solver_pp_3_of_20", partial(dpm_solver_pp, order=3, as_released=True)),
        ("dpm_solver_pp_leading", dpm_solver_pp),
        ("dpm_solver_pp_sigma_min", partial(dpm_solver_pp, as_released=True)),
        ("dpm_solver_pp_3_sigma_min_of_16", partial(dpm_solver_pp, order=3, as_released=True)),
    ],
)
def test_parity_with_diffusers(monkeypatch, name, sampler):
    # Both sides are float32: 1e-5 of the largest value is some 80 roundings, 1e-4 what 1000 random steps may add up to.
    tolerance = 1e-4 if name == "ddpm_large_1000" else 1e-5
    grid = Grid(*map(jnp.asarray, GOLDEN[f"{name}/grid"]))
    noise = jnp.asarray(GOLDEN["noise"])
    monkeypatch.setattr(samplers, "fold_in", lambda key, index: index)
    monkeypatch.setattr(samplers, "normal_like", lambda index, x: noise[index])
    run = jitted(sampler, golden_denoise(grid, name), grid, trajectory=True)
    x_0, x_0_hats = run(grid.noise[0] * GOLDEN["x_T"], jax.random.key(0))
    expected = GOLDEN[f"{name}/x_0"]
    np.testing.assert_allclose(x_0, expected, atol=tolerance * np.abs(expected).max())
    if name == "ddpm_large_1000":  # not recorded
        return
    expected = GOLDEN[f"{name}/x_0_hats"]
    if "clip" in name:  # recorded before it is clipped
        expected = np.clip(expected, -1, 1)
    if name == "heun":  # recorded for both evaluations of a step
        expected = expected[::2]
    for hat, expected_hat in zip(x_0_hats, expected, strict=True):
        np.testing.assert_allclose(hat, expected_hat, atol=tolerance * np.abs(expected_hat).max())


def test_ddpm_grid_is_the_trailing_spacing_of_diffusers():
    grid = schedules.ddpm_grid(CHAIN, 10)
    np.testing.assert_allclose(jnp.stack(grid), GOLDEN["ddim_0/grid"], rtol=1e-4)
    full = schedules.ddpm_grid(CHAIN, 1000)
    np.testing.assert_allclose(jnp.stack(full), GOLDEN["ddpm_large_1000/grid"], rtol=1e-3)  # its 1 - alpha_bar cancels


EVERY = {**DETERMINISTIC, **STOCHASTIC}


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


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_learned_variance_spans_small_to_large(v, variance):
    grid, exact = schedules.ddpm_grid(CHAIN, 10), exact_denoise(make_gaussian(), schedules.discrete_process(CHAIN))

    def learned(x, time):
        return exact(x, time), v * jnp.ones_like(x)

    x_T, key = jax.random.normal(jax.random.key(1), (4, 2)), jax.random.key(0)
    expected = ancestral(exact, x_T, grid, key, variance=variance)
    np.testing.assert_allclose(ancestral(learned, x_T, grid, key, variance="learned"), expected, rtol=1e-5)


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
