"""img2img, interpolation and inpainting against exact answers on Gaussian data, for every process."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import Gaussian, exact_denoise

from diffusion import schedules
from diffusion.editing import img2img, inpaint, interpolate, last_steps
from diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun, unipc
from diffusion.schedules import Grid

CHAIN = schedules.make_schedule(schedules.linear_beta(1000))
VP = schedules.vp_process(schedules.cosine_log_snr())
GRIDS = {
    "ddpm": (schedules.discrete_process(CHAIN), partial(schedules.respace, schedules.ddpm_grid(CHAIN, 1000))),
    "vp": (VP, partial(schedules.process_grid, VP)),
    "edm": (schedules.edm_process, schedules.karras_grid),
    "flow": (schedules.flow_process, schedules.flow_grid),
}
SAMPLERS = {
    "ancestral": partial(ancestral, variance="small"),
    "ddim": ddim,
    "heun": heun,
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
}
every_process = pytest.mark.parametrize("name", GRIDS)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
KEY = jax.random.key(0)


def make_gaussian():
    return Gaussian(jnp.asarray([0.3, -0.5]), jnp.asarray([0.7, 0.4]))


def make(name, num_steps):
    """A process' grid and the perfect network for the Gaussian."""
    process, make_grid = GRIDS[name]
    return make_grid(num_steps), exact_denoise(make_gaussian(), process)


def remember(denoise, x, grid, key):
    """A sampler that returns its arguments."""
    return x, grid, key


def assert_moments(samples, mean, std, rtol=0.0):
    """Compares with a mean and std to four standard errors, and `rtol` of the std."""
    samples, std = np.asarray(samples, np.float64), np.asarray(std)
    count = len(samples)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - mean), std * (4 / np.sqrt(count) + rtol))
    np.testing.assert_array_less(np.abs(samples.std(axis=0) / std - 1), 4 / np.sqrt(2 * count) + rtol)


# The part of a grid.


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.5, 5), (0.44, 4), (0.45, 5), (0.06, 1), (1e-9, 1)])
def test_strength_is_the_share_of_the_steps_that_are_left(strength, steps):
    grid = schedules.flow_grid(10)
    part = last_steps(grid, strength)
    for field, whole in zip(part, grid, strict=True):
        np.testing.assert_array_equal(field, whole[10 - steps :])


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_a_strength_outside_0_to_1_is_an_error(strength):
    grid, denoise = make("flow", 4)
    x_0 = jnp.zeros((2, 2))
    for use in (
        lambda: last_steps(grid, strength),
        lambda: img2img(ddim, denoise, x_0, grid, KEY, strength),
        lambda: interpolate(ddim, denoise, x_0, x_0, grid, KEY, strength, jnp.zeros(1)),
    ):
        with pytest.raises(ValueError, match=r"lie in \(0, 1\]"):
            use()


# img2img.


@every_process
def test_img2img_begins_with_the_image_and_the_noise_of_the_grid(name):
    grid, denoise = make(name, 20)
    x_0 = jnp.asarray([0.9, -0.4])
    x, part, key = img2img(remember, denoise, jnp.broadcast_to(x_0, (5000, 2)), grid, KEY, 0.4)
    assert part.signal.shape == (9,)
    assert_moments(x, grid.signal[12] * x_0, grid.noise[12])
    assert np.any(jax.random.key_data(key) != jax.random.key_data(KEY))


@every_process
def test_img2img_follows_the_exact_flow(float64, name):
    """Heun's error falls as 1 / N^2, down to that of DDPM's last step from noise 0.01: 3e-4 = 0.01^2 / 2 / 0.4^2."""
    grid, denoise = make(name, 200)
    x_0 = make_gaussian().sample(jax.random.key(1), 16, (2,))
    x, part, _ = img2img(remember, denoise, x_0, grid, KEY, 0.5)
    found = jax.jit(lambda x_0: img2img(heun, denoise, x_0, grid, KEY, 0.5))(x_0)
    exact = make_gaussian().flow(x, (part.signal[0], part.noise[0]), (1.0, 0.0))
    np.testing.assert_allclose((found - exact) / make_gaussian().std, 0, atol=2e-3)


@every_process
def test_img2img_by_ancestral_sampling_draws_from_the_posterior(name):
    """x_0' given x_0: x ~ N(s x_0, n^2), then x_0' ~ N(m + g (x - s m), s_0^2 n^2 / (s^2 s_0^2 + n^2)), all Gaussian.

    Ancestral sampling's std has an error of order 1 / N: 3% at 200 steps.
    """
    data, x_0 = make_gaussian(), jnp.asarray([1.2, -0.1])
    grid, denoise = make(name, 200)
    signal, noise = (field[100] for field in (grid.signal, grid.noise))
    variance = signal**2 * data.std**2 + noise**2
    gain = signal * data.std**2 / variance
    mean = data.mean + gain * signal * (x_0 - data.mean)
    std = jnp.sqrt(data.std**2 * noise**2 / variance + (gain * noise) ** 2)
    sampler = SAMPLERS["ancestral"]
    use = jax.jit(lambda x_0: img2img(sampler, denoise, x_0, grid, KEY, 0.5))
    assert_moments(use(jnp.broadcast_to(x_0, (5000, 2))), mean, std, rtol=0.03)


def test_the_ends_of_strength():
    """At 1 nothing of x_0 is left where signal is 0; near 0 x_0 comes back, to a few times the last noise."""
    grid, denoise = make("flow", 1000)
    x_0 = make_gaussian().sample(jax.random.key(1), 8, (2,))
    use = jax.jit(lambda x_0, strength: img2img(ddim, denoise, x_0, grid, KEY, strength), static_argnums=1)
    np.testing.assert_array_equal(use(x_0, 1.0), use(-x_0, 1.0))
    np.testing.assert_allclose(use(x_0, 1e-3), x_0, atol=5e-3)


# Interpolation.


@every_sampler
def test_interpolation_goes_from_one_reconstruction_to_the_other(sampler):
    """On Gaussian data every sampler is affine in x and its draws: the mixture's image is the mixture of the ends'."""
    grid, denoise = make("ddpm", 20)
    x_0, other = (make_gaussian().sample(jax.random.key(seed), 5, (2,)) for seed in (1, 2))
    shares = jnp.asarray([0, 0.25, 0.5, 1])

    @jax.jit
    def use(x_0, other):
        ends = [img2img(sampler, denoise, x, grid, KEY, 0.5) for x in (x_0, other)]
        return *ends, interpolate(sampler, denoise, x_0, other, grid, KEY, 0.5, shares)

    first, last, found = use(x_0, other)
    np.testing.assert_allclose(found[0], first, atol=1e-6)
    np.testing.assert_allclose(found[-1], last, atol=1e-6)
    for share, mixture in zip(shares, found, strict=True):
        np.testing.assert_allclose(mixture, (1 - share) * first + share * last, atol=2e-6)
    assert np.abs(first - last).max() > 0.1


# Inpainting.

CORRELATION, STD, MEAN = 0.8, np.array([0.7, 0.5]), np.array([0.2, -0.3])
COVARIANCE = np.outer(STD, STD) * np.array([[1, CORRELATION], [CORRELATION, 1]])


def correlated_denoise(process):
    """The perfect network for N(MEAN, COVARIANCE)."""

    def denoise(x_t, time):
        signal, noise = process(time)
        gain = signal * COVARIANCE @ jnp.linalg.inv(signal**2 * COVARIANCE + noise**2 * jnp.eye(2))
        return MEAN + (x_t - signal * MEAN) @ gain.T

    return denoise


@pytest.mark.parametrize(
    ("name", "grid", "sampler"),
    [
        ("ddpm", schedules.ddpm_grid(CHAIN, 100), ancestral),
        ("flow", schedules.respace(schedules.flow_grid(1000), 100), ddim),
        ("edm", schedules.karras_grid(100, rho=float("inf")), ddim),
    ],
)
def test_inpainting_draws_from_the_conditional_distribution(name, grid, sampler):
    """One number is given and the other, correlated one is filled in.

    With r takes of a step the chain forgets where it came from at noise levels at which the known number still has a
    share of 1 / r of noise: an error of order 1 / r, here 2% of the std. Its steps make the std wrong by order 1 / N,
    here 3%.
    """
    given = 1.0
    mean = MEAN[1] + CORRELATION * STD[1] / STD[0] * (given - MEAN[0])
    std = STD[1] * np.sqrt(1 - CORRELATION**2)
    denoise = correlated_denoise(GRIDS[name][0])
    x_0 = jnp.broadcast_to(jnp.asarray([given, 0.0]), (3000, 2))
    known = jnp.asarray([True, False])
    use = jax.jit(lambda resample: inpaint(sampler, denoise, x_0, known, grid, KEY, resample), static_argnums=0)
    once, often = use(1), use(20)
    assert_moments(often[:, 1:], mean, std, rtol=0.05)
    assert np.abs(once[:, 1].mean() - mean) > 0.3 * std
    np.testing.assert_array_equal(often[:, 0], given)


@pytest.mark.parametrize(("name", "sampler"), [*((name, "ancestral") for name in GRIDS), ("flow", "ddim")])
def test_every_take_of_a_step_keeps_the_amount_of_noise(name, sampler):
    """If the network always returns x_0, x ~ N(signal x_0, noise^2) at every point, stepped to or returned to."""
    grid = GRIDS[name][1](10)
    part = Grid(*(field[:5] for field in grid))
    x_0 = jnp.asarray([0.6, -0.4, 0.1])
    seen = []

    def denoise(x_t, time):
        jax.debug.callback(lambda x, time: seen.append((x, time)), x_t, time)
        return jnp.broadcast_to(x_0, x_t.shape)

    images, known = jnp.broadcast_to(x_0, (3000, 3)), jnp.asarray([True, False, False])
    seen.append(
        (jax.jit(lambda x_0: inpaint(SAMPLERS[sampler], denoise, x_0, known, part, KEY, 3))(images), grid.time[4])
    )
    jax.effects_barrier()
    seen = [one for one in seen if one[1] != grid.time[0]]  # x_T holds nothing of unknown images
    assert len(seen) == 2 * 3 + 1 + 1
    for x, time in seen:
        point = int(np.argmin(np.abs(grid.time - time)))
        assert_moments(x, grid.signal[point] * x_0, jnp.broadcast_to(grid.noise[point], (3,)))
        np.testing.assert_allclose(np.corrcoef(np.asarray(x).T), np.eye(3), atol=4 / np.sqrt(3000))


@every_process
def test_hidden_pixels_are_never_read_and_known_ones_come_back(name):
    grid, denoise = make(name, 6)
    x_0 = make_gaussian().sample(jax.random.key(1), 4, (2,))
    known = jax.random.bernoulli(jax.random.key(2), 0.5, x_0.shape)
    use = jax.jit(lambda x_0: inpaint(SAMPLERS["ancestral"], denoise, x_0, known, grid, KEY, 3))
    found = use(x_0)
    np.testing.assert_array_equal(found[known], x_0[known])
    np.testing.assert_array_equal(use(jnp.where(known, x_0, jnp.nan)), found)
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize(("name", "sampler"), [*((name, ddim) for name in GRIDS), ("edm", heun)])
def test_with_nothing_known_inpainting_is_sampling(name, sampler):
    grid, denoise = make(name, 6)
    x_0, known = jnp.zeros((4, 2)), jnp.zeros((1, 2), bool)
    found, sampled = jax.jit(
        lambda x_0: (
            inpaint(sampler, denoise, x_0, known, grid, KEY, 1),
            img2img(sampler, denoise, x_0, grid, KEY, 1.0),
        )
    )(x_0)
    np.testing.assert_allclose(found, sampled, atol=2e-6)


def test_every_step_but_the_last_is_taken_again():
    grid, denoise = make("flow", 5)
    calls = []

    def counted(x_t, time):
        jax.debug.callback(lambda time: calls.append(float(time)), time)
        return denoise(x_t, time)

    inpaint(ddim, counted, jnp.zeros((1, 2)), jnp.asarray(True), grid, KEY, 3)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), sorted([*np.repeat(grid.time[:4], 3), grid.time[4]]))


# All three.


def uses(sampler, denoise, grid):
    """The three functions with one signature; half of the numbers are known."""
    known = jnp.asarray([True, False])
    return {
        "img2img": lambda x_0, key: img2img(sampler, denoise, x_0, grid, key, 0.5),
        "interpolate": lambda x_0, key: interpolate(sampler, denoise, x_0, -x_0, grid, key, 0.5, jnp.ones(2) / 3)[1],
        "inpaint": lambda x_0, key: inpaint(sampler, denoise, x_0, known, grid, key, 2),
    }


@pytest.mark.parametrize("use", ["img2img", "interpolate", "inpaint"])
def test_an_image_with_its_own_key_does_not_depend_on_its_batch(use):
    grid, denoise = make("ddpm", 8)
    use = jax.jit(uses(SAMPLERS["ancestral"], denoise, grid)[use])
    x_0 = make_gaussian().sample(jax.random.key(1), 6, (2,))
    keys = jax.random.split(KEY, 6)
    together = use(x_0, keys)
    np.testing.assert_allclose(use(x_0[4:5], keys[4:5])[0], together[4], atol=1e-6)
    np.testing.assert_allclose(use(x_0[::-1], keys[::-1])[::-1], together, atol=1e-6)
    assert np.abs(use(x_0, keys[::-1]) - together).max() > 1e-2


@pytest.mark.parametrize("use", ["img2img", "interpolate", "inpaint"])
def test_the_network_is_compiled_once(use):
    grid, denoise = make("flow", 8)
    traced = []

    def counted(x_t, time):
        traced.append(x_t.shape)
        return denoise(x_t, time)

    use = jax.jit(uses(ddim, counted, grid)[use])
    for seed in range(2):
        use(make_gaussian().sample(jax.random.key(seed), 3, (2,)), jax.random.key(seed))
    assert len(set(traced)) == 1 and len(traced) <= 2  # a scan may be traced again to settle its types


@pytest.mark.parametrize(
    ("name", "sampler"), [*((name, "ddim") for name in GRIDS), *(("flow", sampler) for sampler in SAMPLERS)]
)
def test_one_step_one_image_and_bfloat16_stay_finite(name, sampler):
    grid, denoise = make(name, 1)
    x_0 = jnp.asarray([[0.5, -0.5]])

    def low(x_t, time):
        return denoise(x_t, time).astype(jnp.bfloat16)

    @jax.jit
    def use(x_0):
        return [use(x_0, KEY) for use in uses(SAMPLERS[sampler], low, grid).values()]

    for found in use(x_0):
        assert found.shape == x_0.shape and found.dtype == jnp.float32 and np.all(np.isfinite(found))


def test_a_learned_variance_passes_through():
    grid, denoise = make("ddpm", 4)
    x_0 = make_gaussian().sample(jax.random.key(1), 3, (2,))
    learned = uses(partial(ancestral, variance="learned"), lambda x, t: (denoise(x, t), jnp.ones_like(x)), grid)
    large = uses(ancestral, denoise, grid)
    np.testing.assert_allclose(*(jax.jit(use["inpaint"])(x_0, KEY) for use in (learned, large)), atol=1e-6)


@pytest.mark.parametrize(
    ("known", "resample", "message"),
    [
        (np.zeros(3, bool), 1, r"known is bool\[3\]: give bool that broadcasts to \[4, 2\]"),
        (np.zeros((4, 4, 2), bool), 1, r"known is bool\[4, 4, 2\]"),
        (np.zeros((3, 2), bool), 1, r"known is bool\[3, 2\]"),
        (np.zeros(2), 1, "known is float"),
        (np.zeros(2, bool), 0, "resample is 0: it has to be at least 1"),
    ],
)
def test_error_messages_of_inpainting_are_one_line(known, resample, message):
    grid, denoise = make("flow", 4)
    with pytest.raises(ValueError, match=message) as error:
        inpaint(ddim, denoise, jnp.zeros((4, 2)), jnp.asarray(known), grid, KEY, resample)
    assert "\n" not in str(error.value)


def test_inpainting_raises_what_the_sampler_raises():
    grid, denoise = make("flow", 4)
    with pytest.raises(ValueError, match="use variance='small'"):
        inpaint(ancestral, denoise, jnp.zeros((4, 2)), jnp.asarray([True, False]), grid, KEY)
