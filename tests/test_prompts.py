"""Prompts as a condition: encoders, what is dropped in training, guidance between prompts, features made once."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.flags import FlagValues
from helpers import CONFIGS

from diffusion import predictions
from diffusion.data import scenes, text
from diffusion.data.captions import with_text
from diffusion.model import prompts
from diffusion.model.config import Config, plain
from diffusion.model.experiment import make_experiment, make_learner, make_model, make_run_optimizer
from diffusion.model.fields import change, load
from diffusion.model.model import Model, guided, init, make_denoise
from diffusion.model.sampling import make_sampling
from diffusion.networks.unet import UNet
from diffusion.runs.call import Call
from diffusion.runs.draw import Painter, draw
from diffusion.runs.modes import define_flags
from diffusion.runs.sample import read_prompts
from diffusion.training import RunError, make_mesh
from diffusion.training.experiment import averaged, trained
from experiments.scenes import TASK, VOCABULARY

SHAPE = (16, 16, 3)
SMALL = {"data.batch_size": 8, "sampling.num_steps": 2}
NETWORKS = {
    "mmdit": {"network.width": 16, "network.depth": 1, "network.num_heads": 2},
    "unet": {
        "network.channels": 8,
        "network.num_groups": 4,
        "network.head_channels": 8,
        "network.multipliers": (1,),
        "network.attention_resolutions": (16,),
    },
}


class Parts(NamedTuple):
    """A small model of a config."""

    config: Config
    model: Model


def make_parts(spec="scenes", changes=None, stored=None):
    config, _ = load(spec, CONFIGS)
    small = SMALL | NETWORKS[config.network.name]
    small |= {"condition.width": 8} if config.condition.name == "words" else {}
    config = change(config, small | (changes or {}))
    return Parts(config, make_model(config, SHAPE, None, stored, VOCABULARY))


def random_params(model, seed=0):
    """Parameters of which none is zero, as after training: a new network returns 0 whatever the prompt."""
    shapes = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape) * 0.2, jnp.float32), shapes)


def loss_of(parts, network=None):
    """The loss that training takes, of another network if one is given."""
    model = parts.model if network is None else parts.model._replace(network=SimpleNamespace(apply=network))
    return jax.jit(make_learner(parts.config, model).loss)


def batch_of(model, count=8):
    """A training batch of scenes: pictures and the tokens of their captions."""
    return with_text(scenes.scenes("train", 16, count), model.condition.read).read(np.arange(count))


def told_of(model, params, requests):
    """What the network is told of requests."""
    return jax.jit(model.condition.of_request)(params["text"], model.condition.read(requests))


def answer_at_once(_, x_t, time, context, pooled, **options):
    """A network without parameters: the prompt moves every pixel."""
    return x_t + pooled.mean(-1)[:, None, None, None]


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def params(parts):
    return random_params(parts.model)


# --- training


@pytest.mark.parametrize("spec", ["scenes", "scenes:unet"])
def test_the_prompt_reaches_the_network_and_every_part_learns(spec):
    parts = make_parts(spec)
    loss = loss_of(parts)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, batch, jax.random.key(0))[0].mean()))(
        random_params(parts.model), batch_of(parts.model)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        # The last block's text asks nothing; a bias of keys moves all scores alike, up to rounding.
        assert np.abs(leaf).max() > 0 or "text_norm_query" in name, name


def test_the_prompts_of_a_share_are_dropped(parts, params):
    batch = batch_of(parts.model, 400)

    def losses(share, ids):
        loss = loss_of(make_parts(changes={"condition.dropout": share}), answer_at_once)
        return loss(params, {**batch, "text": ids}, jax.random.key(1))[0]

    empty, whole = losses(1.0, np.zeros_like(batch["text"])), losses(0.0, batch["text"])
    np.testing.assert_array_equal(losses(1.0, batch["text"]), empty)
    assert np.mean(whole == empty) < 0.01
    dropped = losses(0.3, batch["text"]) == empty
    assert abs(np.mean(dropped) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5
    with pytest.raises(ValueError, match=r"condition\.dropout is 1\.5: it has to lie in \[0, 1\]"):
        make_parts(changes={"condition.dropout": 1.5})


def test_prediction_f_scales_x_t_alike_in_training_and_sampling():
    """Where all data is one image, a perfect network knows eps from its input: its loss is 0, its sample the image."""
    level = 200
    x_0 = level / 127.5 - 1

    def perfect(_, x, time, context, pooled, **options):
        signal, noise = (x[:, None, None, None] for x in (1 - time, time))
        x_t = x * jnp.sqrt(noise**2 + (0.5 * signal) ** 2)  # inputs have unit variance, of data of deviation 0.5
        return predictions.from_x_0("F", jnp.full_like(x_t, x_0), x_t, 1 - time, time)

    parts = make_parts(changes={"loss.prediction": "F", "loss.weighting": "none", "sampling.num_steps": 4})
    model = parts.model._replace(network=SimpleNamespace(apply=perfect))
    params = random_params(parts.model)
    batch = batch_of(parts.model, 64) | {"image": np.full((64, *SHAPE), level, np.uint8)}
    loss, _ = loss_of(parts, perfect)(params, batch, jax.random.key(0))
    # F has the variance 1 of the data it is scaled for; float32 and the least noise level leave 1e-7 / noise of it.
    assert loss.max() < 1e-6
    painter = Painter(model, params, parts.config, make_mesh(1), {})
    drawn = draw(painter, ["a red two"] * 2, np.arange(2), seed=0)
    assert drawn.shape == (2, *SHAPE) and np.abs(drawn.astype(int) - level).max() <= 1


def test_dropout_of_the_u_net_acts_in_training_alone():
    found = {}
    for share in (0.0, 0.5):
        parts = make_parts("scenes:unet", {"network.dropout": share})
        params, batch = random_params(parts.model), batch_of(parts.model)
        loss = loss_of(parts)
        told = told_of(parts.model, params, ["a red two"] * 8)
        denoise = jax.jit(lambda params, told, x_t, model=parts.model: make_denoise(model, params, told)(x_t, 0.5))
        found[share] = loss(params, batch, jax.random.key(0))[0], denoise(params, told, jnp.ones((8, *SHAPE)))
    assert not np.isclose(found[0.0][0], found[0.5][0], rtol=1e-5).any()
    np.testing.assert_array_equal(found[0.0][1], found[0.5][1])
    with pytest.raises(RunError, match=r"dropout is not a field of network\.name=mmdit: it has .*depth"):
        make_parts("scenes", {"network.dropout": 0.5})


# --- sampling


def test_guidance_leads_to_the_prompt_and_away_from_the_negative_one(parts, params):
    x_t = jnp.asarray(np.random.RandomState(0).randn(2, *SHAPE), jnp.float32)
    model = parts.model._replace(network=SimpleNamespace(apply=answer_at_once))
    there, away = (model.condition.read([prompt] * 2) for prompt in ("a red two", "a one"))

    def x_0_hat(scale, rows, negative, interval=()):
        changes = {"guidance": scale, "guidance_interval": interval, "num_steps": 40}
        config = change(parts.config, {f"sampling.{field}": value for field, value in changes.items()})
        sampling = make_sampling(config, model.process)
        return guided(model, sampling, params, rows, negative)(x_t, jnp.float32(0.5))

    yes, no = x_0_hat(1.0, there, away), x_0_hat(1.0, away, there)
    assert np.abs(yes - no).max() > 1e-2
    led = no + 4 * (yes - no)
    np.testing.assert_allclose(x_0_hat(4.0, there, away), led, atol=1e-4)
    # At time 0.5 of a flow noise / signal is 1.
    np.testing.assert_allclose(x_0_hat(4.0, there, away, (0.9, 5.0)), led, atol=1e-4)
    np.testing.assert_allclose(x_0_hat(4.0, there, away, (1.5, 9.0)), yes, atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch(parts, params):
    def draw_in(batch_size, requests, index):
        config = change(parts.config, {"sampling.batch_size": batch_size})
        return draw(Painter(parts.model, params, config, make_mesh(1), {}), requests, np.array(index), seed=5)

    requests = ["a red two", "a blue four", "two green fives"]
    together, apart = draw_in(256, requests, [0, 7, 2]), draw_in(2, requests[1:2], [7])
    # Another batch size compiles other sums: a level may round the other way.
    assert np.abs(together[1].astype(int) - apart[0]).max() <= 1
    other = draw_in(2, ["a red one"], [7])
    assert np.abs(other[0].astype(int) - apart[0]).max() > 1
    again = draw_in(2, requests, [0, 7, 2])
    assert np.abs(together.astype(int) - again).max() <= 1


# --- a frozen encoder


@pytest.fixture(scope="module")
def clip_parts():
    """Prompts read by the text tower of a CLIP, as from a checkpoint."""
    config, _ = load("clip", CONFIGS)
    sizes = {"width": 8, "num_layers": 2, "num_heads": 2, "mlp_width": 16}
    changes = {f"network.text.{field}": value for field, value in sizes.items()} | {"network.projection": 6}
    tokenizer = text.train_tokenizer(["a red two", "a blue four"], 270)
    stored = {"config": plain(change(config, changes)), "vocabulary": text.to_json(tokenizer)}
    return make_parts("scenes:clip", stored={"condition": stored})


@pytest.mark.filterwarnings("ignore:a text of .* tokens is truncated")
@pytest.mark.parametrize("frozen", [("text",), ()], ids=["now", "in runs of format 2"])
def test_a_frozen_encoder_stays_as_it_is(clip_parts, frozen):
    assert clip_parts.model.frozen == ("text",)
    model = clip_parts.model._replace(frozen=frozen)
    params = random_params(model)
    told = told_of(model, params, ["a red two", None])
    assert told["context"].shape == (2, 16, 8) and told["pooled"].shape == (2, 6)
    assert np.abs(told["pooled"][0] - told["pooled"][1]).max() > 1e-3
    loss = loss_of(clip_parts)
    # Muon's steps take a while to compile, Adam's do not: which it is does not matter here.
    adam, _ = make_run_optimizer(change(clip_parts.config, {"optimizer": "adam"}), model)

    @jax.jit
    def update(params, batch):
        gradient = jax.grad(lambda params: loss(params, batch, jax.random.key(0))[0].mean())(params)
        learned, gradient = trained(params, frozen), trained(gradient, frozen)
        updates, _ = adam.update(gradient, adam.init(learned), learned)
        return averaged(params, optax.apply_updates(learned, updates), frozen)

    new: Any = update(params, batch_of(model))
    jax.tree.map(np.testing.assert_array_equal, new["text"], params["text"])
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new["network"], params["network"])), strict=True)]
    assert np.mean(moved) > 0.9
    size = sum(leaf.size for leaf in jax.tree.leaves(params["network"]))
    for optimizer in (adam, make_run_optimizer(clip_parts.config, model)[0]):
        moments = jax.tree.leaves(jax.eval_shape(optimizer.init, trained(params, frozen)))
        assert size < sum(leaf.size for leaf in moments) < 2.01 * size


@pytest.mark.filterwarnings("ignore:a text of .* tokens is truncated")
def test_features_made_once_give_the_loss_of_features_made_at_every_step(clip_parts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    condition = clip_parts.model.condition
    params = random_params(clip_parts.model)
    captioned = scenes.scenes("train", 16, 40)
    made_once = prompts.with_features(captioned, condition, params["text"], batch_size=16)
    blind: Any = condition._replace(of_request=None)
    again = prompts.with_features(captioned, blind, params["text"])
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    other = jax.tree.map(lambda x: x + 1, params["text"])
    prompts.with_features(captioned, condition, other)
    assert len(list(tmp_path.rglob("*.npy"))) == 4  # other weights, other features

    loss = loss_of(clip_parts)
    rows, key = np.arange(32), jax.random.key(3)
    expected, _ = loss(params, with_text(captioned, condition.read).read(rows), key)
    for source in (made_once, again):
        batch = source.read(rows)
        assert "text" not in batch
        found, _ = loss(params, batch, key)
        # Of sums in float32 of another order; a dropped caption that was not would differ by far more.
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_features_of_a_learned_encoder_are_not_made_once(parts, params):
    with pytest.raises(ValueError, match=r"condition\.precomputed=True is for a frozen encoder"):
        prompts.with_features(scenes.scenes("train", 16, 8), parts.model.condition, params["text"])


# --- what does not fit


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match=r"name its work folder, --config\.condition\.folder=DIR"):
        make_parts("scenes:clip", {"condition.folder": ""})
    with pytest.raises(RunError, match=r"condition\.name is 't5': choose from nothing, classes, words, clip"):
        make_parts(changes={"condition.name": "t5"})
    with pytest.raises(RunError, match=r"folder is not a field of condition\.name=words: it has"):
        make_parts(changes={"condition.folder": "runs/clip"})
    with pytest.raises(ValueError, match=r"network\.name=mmdit reads prompts, and condition\.name is nothing"):
        make_model(change(load("scenes", CONFIGS)[0], {"condition": "nothing"}), SHAPE)
    parts = make_parts(changes={"network.patch": 3})
    source = with_text(scenes.scenes("train", 16, 8), parts.model.condition.read)
    with pytest.raises(ValueError, match="image size 16x16 is not whole patches of 3x3"):
        make_experiment(parts.config, parts.model, source, make_mesh(1))


def test_the_network_refuses_another_encoder(parts, clip_parts, params):
    told = told_of(clip_parts.model, random_params(clip_parts.model), ["a red two"])
    with pytest.raises(ValueError, match="the text encoder gives width 6 where the network's pooled_width is 8"):
        parts.model.network.apply(params["network"], jnp.zeros((1, *SHAPE)), jnp.zeros(1), **told)


def test_prompts_are_read_from_flags_and_file(tmp_path, caplog):
    def read(path, prompt=(), examples=()):
        flags = [f"--prompt={one}" for one in prompt] + ([f"--prompts={path}"] if path else [])
        values = FlagValues()
        define_flags(values)
        values(["", *flags])
        config = load("scenes", CONFIGS)[0]
        return read_prompts(Call(TASK, config, tmp_path, make_mesh(), values, None), examples)

    file = tmp_path / "prompts.txt"
    file.write_text("a red two\n\n a blue four \n")
    assert read(file, ["a one"]) == ["a one", "a red two", "a blue four"] and not caplog.records
    assert read(None, [" "]) == [" "]
    assert caplog.records[0].getMessage() == "an empty prompt is no condition: the picture may show anything"
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt: write one per line"):
        read(file)
    assert read(None, examples=["a two"]) == ["a two"]
    with pytest.raises(ValueError, match="nothing to draw: give --prompt"):
        read(None)


def test_a_network_built_without_text_is_as_before():
    network = UNet(channels=8, num_groups=4, multipliers=(1,), num_blocks=1, attention_resolutions=(8,))
    x_t, time = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    plain = jax.eval_shape(network.init, jax.random.key(0), x_t, time)["params"]
    told: Any = jax.eval_shape(
        lambda: network.init(jax.random.key(0), x_t, time, context=jnp.zeros((1, 3, 5)), pooled=jnp.zeros((1, 5)))
    )["params"]
    assert set(told) - set(plain) == {
        "pooled",
        "down_0_attention_0_text",
        "middle_attention_text",
        "up_0_attention_0_text",
        "up_0_attention_1_text",
    }
