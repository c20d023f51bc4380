"""The contrastive model: from a config to a CLIP, its loss and its experiment; and a trained one from its folder."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from diffusion import contrastive, training
from diffusion.data import text
from diffusion.data.pictures import height_width
from diffusion.data.sources import Source
from diffusion.evaluation.clip_features import Encoder, make_encoder
from diffusion.model.batches import check_batches, training_batches
from diffusion.model.config import Config, check_ranges, dtype_of, from_plain, make_settings
from diffusion.networks.clip import CLIP, RULES, ImageTower, TextTower
from diffusion.training import Experiment, Mean, RunError, make_mesh
from diffusion.training.checkpoints import open_existing


class Trained(NamedTuple):
    """What a run made: a CLIP, its averaged weights, the vocabulary it reads, and after how many steps."""

    clip: CLIP
    params: Any
    tokenizer: Tokenizer
    step: int
    encoder: Encoder


def make_clip(config: Config, tokenizer: Tokenizer) -> CLIP:
    """Returns both towers of `config.network`, the text tower made for this vocabulary."""
    check_ranges(config)
    for tower in ("image", "text"):
        for field, value in config.network[tower].items():
            if value < 1:
                raise ValueError(f"network.{tower}.{field} is {value}: it must be at least 1")
    if config.optimizer.decay_steps <= config.optimizer.warmup_steps:
        raise ValueError("optimizer.decay_steps must be larger than optimizer.warmup_steps, which it contains")
    shared = dict(
        projection=config.network.projection,
        activation=config.network.activation,
        dtype=dtype_of(config),
        remat=config.network.remat,
    )
    image = ImageTower(image_size=config.data.image_size, **config.network.image, **shared)
    sizes = dict(vocabulary_size=tokenizer.get_vocab_size(), end_of_text=text.end_of_text(tokenizer))
    tower = TextTower(**sizes, length=config.text.length, **config.network.text, **shared)
    match config.loss.name:
        case "softmax":
            return CLIP(image, tower)
        case "sigmoid":
            return CLIP(image, tower, scale=10.0, bias=-10.0)
        case name:
            raise ValueError(f"loss.name is {name!r}: choose softmax or sigmoid")


def contrastive_loss(config: Config, clip: CLIP) -> training.Loss:
    """Returns loss(params, batch, key) -> (float32[B], metrics): every pair against the whole global batch."""
    rows = config.loss.rows or None

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        del key
        pixels = (batch["image"] / np.float32(255) - jnp.asarray(config.data.mean)) / jnp.asarray(config.data.std)
        outputs: Any = clip.apply(params, pixels, batch["text"])
        image, caption, scale, bias = outputs
        if clip.bias is None:
            contrast = contrastive.softmax_loss(image, caption, scale, rows)
        else:
            contrast = contrastive.sigmoid_loss(image, caption, scale, bias, rows)
        ones = jnp.ones_like(contrast.loss)
        metrics = {
            "accuracy_image_to_text": Mean(contrast.x_to_y, ones),
            "accuracy_text_to_image": Mean(contrast.y_to_x, ones),
            "logit_scale": Mean(scale * ones, ones),
        }
        return contrast.loss, metrics

    return loss


def make_adamw(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns AdamW (no decay of gains and biases) with warm-up and cosine decay; the scale stays at most 100."""
    settings = config.optimizer
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup_steps, settings.decay_steps, 0.01 * settings.learning_rate
    )
    # From 1, so that the first update is not lost to a rate of zero.
    learning_rate = lambda step: rate(step + 1)  # noqa: E731
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(learning_rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.decay, mask=matrices),
        at_most("logit_scale", contrastive.LARGEST_LOG_SCALE),
    )
    return optimizer, learning_rate


def at_most(name: str, largest: float) -> optax.GradientTransformation:
    """Returns a last link of an optimizer that keeps the parameters of this name from growing past `largest`."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def limit(path: Any, update: jax.Array, parameter: jax.Array) -> jax.Array:
            return jnp.minimum(update, largest - parameter) if path[-1].key == name else update

        return jax.tree_util.tree_map_with_path(limit, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_contrast(config: Config, clip: CLIP, source: Any) -> Experiment:
    """Returns the experiment on a source that reads "image" and "text".

    Raises:
      ValueError: whatever cannot be built; nothing has been allocated or written by then.
    """
    if config.training.accumulate != 1:
        raise ValueError("the loss is over the whole batch: training.accumulate=1, and to save memory loss.rows")
    optimizer, learning_rate = make_adamw(config)
    batch_size = config.data.batch_size
    size = height_width(config.data.image_size)

    def init(key: jax.Array) -> Any:
        return clip.init(key, jnp.zeros((1, *size, 3)), jnp.zeros((1, config.text.length), jnp.int32))

    def batches(start_step: int) -> Any:
        return training_batches(config, source, start_step)

    check_batches(config, source)
    loss = contrastive_loss(config, clip)
    experiment = Experiment(init, loss, optimizer, learning_rate, batches, batch_size, rules=RULES)
    shapes = jax.eval_shape(init, jax.random.key(0))
    jax.eval_shape(experiment.loss, shapes, abstract_batch(config), jax.random.key(0))
    return experiment


def make_dataless(config: Config, clip: CLIP) -> Experiment:
    """Returns the experiment for what needs no data: its state and the shapes of its batches."""
    return make_contrast(config, clip, Source("", "", config.data.batch_size, (0, 0, 3), None, lambda indices: {}, ""))


def abstract_batch(config: Config) -> dict[str, Any]:
    """Returns the shapes of a global batch."""
    batch, size = config.data.batch_size, height_width(config.data.image_size)
    return {
        "image": jax.ShapeDtypeStruct((batch, *size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((batch,), np.int32),
        "text": jax.ShapeDtypeStruct((batch, config.text.length), np.int32),
    }


def make_trained(config: Config, clip: CLIP, tokenizer: Tokenizer, state: training.TrainState) -> Trained:
    """Returns what `state` has learned."""
    encoder = make_encoder(clip, state.ema, tokenizer, config.data.mean, config.data.std)
    return Trained(clip, state.ema, tokenizer, int(state.step), encoder)


def open_clip(workdir: Path, mesh: Mesh | None = None, step: int | None = None) -> Trained:
    """Returns the CLIP of a work folder of this experiment: averaged weights, the newest or of `step`, and vocabulary.

    Raises:
      RunError: there is no checkpoint, or it is another experiment's.
    """
    mesh = mesh or make_mesh()
    with open_existing(workdir, step) as checkpoints:
        stored = checkpoints.description()
        if stored["experiment"] != "clip":
            raise RunError(f"{workdir} holds experiment {stored['experiment']}, not clip")
        config = from_plain(stored["config"])
        tokenizer = text.from_json(stored["vocabulary"])
        clip = make_clip(config, tokenizer)
        experiment = make_dataless(config, clip)
        state = checkpoints.restore(training.abstract_weights(experiment, make_settings(config), mesh))
    return make_trained(config, clip, tokenizer, state)
