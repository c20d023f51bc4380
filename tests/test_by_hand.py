"""The lecture: its algorithms against exact Gaussians, and that it stays one page on the papers' modules."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion.networks.unet import UNet
from experiments import by_hand


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        by_hand, "network", UNet(channels=8, multipliers=(1,), num_blocks=1, num_groups=4, attention_resolutions=())
    )


def test_it_is_one_page_of_papers_networks_and_data():
    source = Path(by_hand.__file__).read_text()
    assert len(source.splitlines()) <= 100
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    own = {module for module in modules if module and module.startswith(("diffusion", "experiments"))}
    papers = {f"diffusion.{path.stem}" for path in (Path(__file__).parent.parent / "diffusion").glob("*.py")}
    assert own <= papers | {"diffusion.data", "diffusion.networks.unet"} and own & papers


def test_the_loss_draws_every_time_and_is_the_mean_of_the_noise_squared(monkeypatch):
    seen = []
    monkeypatch.setattr(by_hand, "predict_eps", lambda params, x_t, t: seen.append((x_t, t)) or jnp.zeros_like(x_t))
    count = 20_000  # a time that is never drawn has probability e^-20
    value = by_hand.loss(None, jnp.zeros((count, 1, 1, 1)), jax.random.key(0))
    (x_t, t) = seen[0]
    assert sorted(set(t.tolist())) == list(range(1, by_hand.T + 1))
    assert abs(value - 1) < 4 * (2 / count) ** 0.5  # four standard errors of a mean of squares
    # What is left of x_0 = 0 is noise of variance 1 - alpha_bar_t.
    late = np.asarray(x_t).ravel()[np.asarray(t) > 900]
    assert abs(late.var() - 1) < 4 * (2 / len(late)) ** 0.5 + 1e-3


def test_sampling_with_the_exact_noise_of_a_gaussian_draws_that_gaussian(monkeypatch):
    mean, std = 0.5, 0.3

    def exact(params, x_t, t):  # E[eps | x_t] for x_0 ~ N(mean, std^2)
        alpha_bar, rest = by_hand.schedule.alpha_bar[t], by_hand.schedule.one_minus_alpha_bar[t]
        return jnp.sqrt(rest) * (x_t - jnp.sqrt(alpha_bar) * mean) / (alpha_bar * std**2 + rest)

    monkeypatch.setattr(by_hand, "predict_eps", exact)
    x_0 = np.asarray(by_hand.sample(None, 256, jax.random.key(1)))
    assert x_0.shape == (256, 8, 8, 1)
    # Four standard errors; 1000 steps are within 1% of the continuous limit.
    assert abs(x_0.mean() - mean) < 4 * std / x_0.size**0.5 + 0.01 * std
    assert abs(x_0.std() / std - 1) < 4 / (2 * x_0.size) ** 0.5 + 0.01


def test_training_lowers_the_loss(small, capsys):
    x_0 = jnp.full((4, 8, 8, 1), 0.5)
    key = jax.random.key(0)
    before = by_hand.network.init(key, x_0[:1], jnp.ones(1))
    after = by_hand.train(x_0, 60, 16, key)
    many = jnp.full((256, 8, 8, 1), 0.5)
    assert by_hand.loss(after, many, key) < 0.8 * by_hand.loss(before, many, key)
    assert "step    0   loss 1." in capsys.readouterr().out


def test_it_runs_from_end_to_end(small, tmp_path, capsys):
    path = tmp_path / "by_hand" / "samples.png"
    by_hand.main(num_steps=2, batch_size=4, num_images=4, path=path)
    assert np.asarray(Image.open(path)).std() > 10
    assert capsys.readouterr().out.endswith(f"{path}\n")
