"""Prompts to pictures: encoders, the loss, guidance between prompts, and pictures with labels."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.data import scenes
from diffusion.data.captions import with_text
from diffusion.networks.unet import UNet
from diffusion.training import make_mesh
from experiments import scenes as experiment
from experiments import text_encoders, text_modes, text_to_image
from experiments.configs import scenes_clip, scenes_mmdit, scenes_unet
from experiments.text_encoders import word_ids

# A network that answers at once: what it is told of the prompt moves every pixel.
PLAIN: Any = SimpleNamespace(apply=lambda _, x_t, time, context, pooled: x_t + pooled.mean(-1)[:, None, None, None])


def small(config):
    config.text.width = 8
    config.data.batch_size = 8
    config.sampling.num_steps = 2
    if config.network.name == "mmdit":
        config.network.update(width=16, depth=1, num_heads=2)
    else:
        config.network.update(channels=8, num_groups=4, head_channels=8, multipliers=(1,), attention_resolutions=(16,))
    return config


def make_parts(config, **options):
    return text_to_image.make_parts(small(config), (16, 16, 3), experiment.VOCABULARY, **options)


def init(parts, seed=0):
    """Parameters of which none is zero, as after training: a new network answers 0 whatever it is told."""
    source = with_text(scenes.scenes("train", 16, 8), parts.encoder.tokenize)
    made = text_to_image.make_experiment(parts, source, [""], make_mesh(1))
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape) * 0.2, jnp.float32), shapes)


@pytest.fixture(scope="module")
def parts():
    return make_parts(scenes_mmdit.get_config())


@pytest.fixture(scope="module")
def params(parts):
    return init(parts)


def test_every_caption_is_read_whole(caplog):
    for split in ("train", "held_out"):
        for index in range(150):
            caption = scenes.scene(0, split, index).caption
            (ids,) = word_ids([caption], experiment.VOCABULARY, 12)
            assert " ".join(experiment.VOCABULARY[i - 2] for i in ids[ids > 0]) == caption
    assert not caplog.records


def test_words_that_cannot_be_read_are_named(caplog):
    ids = word_ids(["A Red dog", "", "a red two " * 5, "A Red dog"], experiment.VOCABULARY, 12)
    assert [record.getMessage() for record in caplog.records] == [
        "unknown to the text encoder in 'A Red dog': dog",
        f"{'a red two ' * 5!r} is longer than 12 words: what follows 'two' is left out",
    ]
    assert ids[0, 2] == 1 and ids[0, 1] == ids[2, 1] > 1 and not ids[1].any() and ids[2].all()
    np.testing.assert_array_equal(ids[0], ids[3])
    caplog.clear()
    word_ids([f"a dog{i}" for i in range(99)], experiment.VOCABULARY, 12)
    assert len(caplog.records) == 6
    assert caplog.records[-1].getMessage() == "and 94 more like these, in 99 different prompts"


@pytest.mark.parametrize("config", [scenes_mmdit, scenes_unet])
def test_the_network_is_told_the_prompt_and_every_part_learns(config):
    parts = make_parts(config.get_config())
    params = init(parts)
    source = with_text(scenes.scenes("train", 16, 8), parts.encoder.tokenize)
    batch = source.read(np.arange(8))
    loss = text_to_image.make_loss(parts.config, parts.network, parts.encoder, parts.diffusion)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, batch, jax.random.key(0))[0].mean()))(params, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        # The last block's text asks nothing; a bias of keys moves all scores alike, up to rounding.
        assert np.abs(leaf).max() > 0 or "text_norm_query" in name, name


def test_the_prompts_of_a_share_are_dropped(parts, params):
    config: Any = small(scenes_mmdit.get_config())
    read = with_text(scenes.scenes("train", 16, 400), parts.encoder.tokenize).read(np.arange(400))

    def losses(share, ids):
        config.loss.caption_dropout = share
        loss = text_to_image.make_loss(config, PLAIN, parts.encoder, parts.diffusion)
        return loss(params, {**read, "text": ids}, jax.random.key(1))[0]

    empty, whole = losses(1.0, np.zeros_like(read["text"])), losses(0.0, read["text"])
    np.testing.assert_array_equal(losses(1.0, read["text"]), empty)
    assert np.mean(whole == empty) < 0.01
    dropped = losses(0.3, read["text"]) == empty
    assert abs(np.mean(dropped) - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5


def test_guidance_leads_to_the_prompt_and_away_from_the_negative_one(parts, params):
    x_t = jnp.asarray(np.random.RandomState(0).randn(2, 16, 16, 3), jnp.float32)
    texts = [
        text_encoders.encode(parts.encoder, params, parts.encoder.tokenize([p] * 2)) for p in ("a red two", "a one")
    ]

    def x_0_hat(scale, text, negative, interval=()):
        parts.config.sampling.guidance, parts.config.sampling.guidance_interval = scale, interval
        denoise = text_to_image.make_denoise(parts.config, PLAIN, parts.diffusion, params, text, negative)
        return denoise(x_t, jnp.float32(0.5))

    text, negative = texts
    yes, no = x_0_hat(1.0, text, negative), x_0_hat(1.0, negative, text)
    assert np.abs(yes - no).max() > 1e-2
    np.testing.assert_allclose(x_0_hat(4.0, text, negative), no + 4 * (yes - no), atol=1e-4)
    np.testing.assert_allclose(x_0_hat(4.0, text, negative, (0.6, 0.9)), yes, atol=1e-5)
    parts.config.sampling.guidance, parts.config.sampling.guidance_interval = 3.0, ()


def test_a_picture_does_not_depend_on_its_batch(parts, params):
    trained = text_modes.Trained(params, 0)
    run: Any = SimpleNamespace(mesh=make_mesh(1), flags=SimpleNamespace(seed=5), config=parts.config)
    prompts = ["a red two", "a blue four", "two green fives"]
    together = text_modes.generate(run, parts, trained, prompts, np.array([0, 7, 2]))
    parts.config.sampling.batch_size = 2
    apart = text_modes.generate(run, parts, trained, prompts[1:2], np.array([7]))
    parts.config.sampling.batch_size = 256
    # Another batch size compiles other sums: a level may round the other way.
    assert np.abs(together[1].astype(int) - apart[0]).max() <= 1
    other = text_modes.generate(run, parts, trained, ["a red one"], np.array([7]))
    assert np.abs(other[0].astype(int) - apart[0]).max() > 1


@pytest.fixture(scope="module")
def clip_parts():
    from diffusion.data import text
    from experiments.command_line import plain
    from experiments.configs import clip_scenes

    clip: Any = clip_scenes.get_config()
    clip.network.text.update(width=8, num_layers=2, num_heads=2, mlp_width=16)
    clip.network.projection = 6
    tokenizer = text.train_tokenizer(["a red two", "a blue four"], 270)
    stored = {"config": plain(clip), "vocabulary": text.to_json(tokenizer)}
    return make_parts(scenes_clip.get_config(), stored=stored)


def test_a_frozen_encoder_stays_as_it_is(clip_parts):
    params = init(clip_parts)
    text = text_encoders.encode(clip_parts.encoder, params, clip_parts.encoder.tokenize(["a red two", ""]))
    assert text.context.shape == (2, 16, 8) and text.pooled.shape == (2, 6)
    assert np.abs(text.pooled[0] - text.pooled[1]).max() > 1e-3
    loss = text_to_image.make_loss(clip_parts.config, clip_parts.network, clip_parts.encoder, clip_parts.diffusion)
    source = with_text(scenes.scenes("train", 16, 8), clip_parts.encoder.tokenize)
    optimizer, _ = text_to_image.make_text_optimizer(clip_parts.config, clip_parts.encoder)

    @jax.jit
    def update(params, batch):
        gradient = jax.grad(lambda params: loss(params, batch, jax.random.key(0))[0].mean())(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    new: Any = update(params, source.read(np.arange(8)))
    jax.tree.map(np.testing.assert_array_equal, new["text"], params["text"])
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new["network"], params["network"])), strict=True)]
    assert np.mean(moved) > 0.9
    moments = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    assert sum(leaf.size for leaf in moments) < 2.01 * sum(leaf.size for leaf in jax.tree.leaves(params["network"]))


def test_bad_configs_are_named():
    def change(config, **network):
        config.network.update(network)
        return config

    with pytest.raises(ValueError, match=r"name its work folder by --config\.text\.clip"):
        config: Any = scenes_clip.get_config()
        config.text.clip = ""
        make_parts(config)
    config: Any = scenes_mmdit.get_config()
    config.text.encoder = "t5"
    with pytest.raises(ValueError, match=r"text\.encoder is 't5': choose words or clip"):
        make_parts(config)
    with pytest.raises(ValueError, match="image size 16x16 is not whole patches of 3x3"):
        init(make_parts(change(scenes_mmdit.get_config(), patch=3)))


def test_the_network_refuses_another_encoder(parts, clip_parts, params):
    text = text_encoders.encode(clip_parts.encoder, init(clip_parts), clip_parts.encoder.tokenize(["a red two"]))
    with pytest.raises(ValueError, match="the text encoder gives width 6 where the network's pooled_width is 8"):
        parts.network.apply(params["network"], jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), *text)


def test_prompts_are_read_from_flags_and_file(tmp_path, caplog):
    def read(prompts, prompt=(), examples=()):
        flags = SimpleNamespace(prompt=list(prompt), prompts=str(prompts) if prompts else None)
        run: Any = SimpleNamespace(flags=flags)
        return text_modes.read_prompts(run, examples)

    file = tmp_path / "prompts.txt"
    file.write_text("a red two\n\n a blue four \n")
    assert read(file, ["a one"]) == ["a one", "a red two", "a blue four"] and not caplog.records
    assert read(None, [" "]) == [" "]
    assert caplog.records[0].getMessage() == "an empty prompt is no condition: the picture may show anything"
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt: write one a line"):
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
