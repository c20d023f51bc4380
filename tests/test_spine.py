"""Every config's initial weights, losses, gradients and samples, against those of golden/record_spine.py.

One network of each kind is made as small as it can be, in float32 and for 8x8 images.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS

from diffusion.data import scenes, text
from diffusion.data.captions import with_captions, with_text
from diffusion.data.sources import Source, array_source
from diffusion.model.config import Config, copy, plain
from diffusion.model.experiment import make_experiment, make_model
from diffusion.model.fields import change, load
from diffusion.model.model import Model, make_generate
from diffusion.model.sampling import make_sampling
from diffusion.training import make_mesh, run_key
from experiments.scenes import VOCABULARY

GOLDEN = Path(__file__).parent / "golden" / "spine.npz"
METHODS = ("", ":class_conditional", ":cosine_hybrid", ":edm", ":flow", ":v_min_snr")
IMAGES = (*(f"{data}{method}" for data in ("digits", "cifar10") for method in METHODS), "cifar10:small")
TEXTS = ("captions", "scenes", "scenes:clip", "scenes:unet")

UNET = dict(channels=8, num_blocks=1, multipliers=(1, 2), attention_resolutions=(4,), num_groups=4, dtype="float32")
MMDIT = dict(width=24, depth=2, num_heads=2, patch=2, table_size=16, base_size=16, dtype="float32")
COUNT = 8  # of training examples, and of samples
SHOWN = 32  # images of the source
PROMPTS = ("a red two", "", "a large blue four above a red one")
NEGATIVE = "a green one"


class Case(NamedTuple):
    """A tiny model of a config, its images, and what it draws."""

    config: Config
    model: Model
    source: Source
    examples: tuple[str, ...]
    requests: list[Any]
    away: list[Any]


def make_case(spec: str) -> Case:
    """Returns the case of a config."""
    config, _ = load(spec, CONFIGS)
    data = spec.partition(":")[0]
    config = copy(
        config,
        network=UNET if config.network.name == "unet" else MMDIT,
        data={"batch_size": COUNT},
        training={"num_previews": COUNT},
        sampling={"num_steps": 3},
    )
    if data == "digits":  # as when the goldens were recorded
        config = copy(config, network={"dropout": 0.1})
        if config.sampling.sampler.name == "dpm_solver_pp":
            config = change(config, {"sampling.sampler": "ddim"})
    random = np.random.RandomState(0)
    image = random.randint(0, 256, (SHOWN, 8, 8, 1 if data == "digits" else 3), np.uint8)
    label = random.randint(0, 10, SHOWN).astype(np.int32)
    source = array_source(image, label, "noise", "train", 10)
    if spec in IMAGES:
        model = make_model(config, source.image_shape, source.num_classes)
        labels = [i % 10 if model.condition.kind == "classes" else None for i in range(COUNT)]
        return Case(config, model, source, (), labels, [None] * COUNT)
    if config.condition.name == "words":
        config = copy(config, condition={"width": 24})
    if config.network.name == "unet":
        config = copy(config, network={"head_channels": 4})
    stored = {"condition": trained_clip()} if config.condition.name == "clip" else None
    model = make_model(config, source.image_shape, None, stored, VOCABULARY)
    captions = list(dict.fromkeys(scenes.scene(0, "train", i).caption for i in range(200)))
    source = with_captions(source, [[caption] for caption in captions[:SHOWN]])
    source = with_text(source, model.condition.read)
    return Case(config, model, source, PROMPTS, [PROMPTS[i % 3] for i in range(COUNT)], [NEGATIVE] * COUNT)


def trained_clip() -> dict[str, Any]:
    """Returns the description of a tiny CLIP, as a checkpoint holds it."""
    config, _ = load("clip", CONFIGS)
    config = config.copy_and_resolve_references().unlock()
    config.network.text.update(width=8, num_layers=2, num_heads=2, mlp_width=16)
    config.network.projection = 6
    vocabulary = text.train_tokenizer(["a red two", "a blue four"], 270)
    return {"config": plain(config), "vocabulary": text.to_json(vocabulary)}


def name_of(path: Any) -> str:
    """Returns the name of a parameter."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def perturbed(variables: Any) -> Any:
    """Adds noise of each parameter's own name: a network that starts answers 0, whatever it computes inside."""

    def shift(path: Any, x: jax.Array) -> jax.Array:
        noise = np.random.RandomState(zlib.crc32(name_of(path).encode())).standard_normal(x.shape)
        return x + jnp.asarray(0.05 * noise.astype(np.float32))

    return jax.tree_util.tree_map_with_path(shift, variables)


def numbers(spec: str) -> dict[str, np.ndarray]:
    """Returns the numbers of a config.

    init: the sum of |x| over each initial parameter, [P].
    losses: of 8 examples with the `perturbed` parameters, float32[8].
    norms: of the gradient of their mean by each parameter, in the order of names, [P].
    samples: uint8[8, 8, 8, C].
    """
    case, mesh = make_case(spec), make_mesh(1)
    experiment = make_experiment(case.config, case.model, case.source, mesh, case.examples)
    init = jax.jit(experiment.init)(run_key(0, "init"))
    with_text = case.model.condition.init is not None
    params: Any = {part: perturbed(tree) for part, tree in init.items()} if with_text else perturbed(init)
    batches = experiment.batches(5)
    batch = jax.tree.map(jnp.asarray, next(batches))
    batches.close()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def mean_loss(params: Any, batch: Any, key: jax.Array) -> Any:
        losses, metrics = experiment.loss(params, batch, key)
        return losses.mean(), (losses, metrics)

    (_, (losses, metrics)), gradient = mean_loss(params, batch, run_key(0, "train", 5))
    assert sum(float(mean.count.sum()) for mean in metrics.values()) == COUNT  # every example is in one part
    by_name = sorted((name_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(gradient))
    generate = make_generate(case.model, make_sampling(case.config, case.model.process), mesh)
    rows, away = (jnp.asarray(case.model.condition.read(asked)) for asked in (case.requests, case.away))
    samples, finite = generate(params, rows, away, jnp.uint32(3), jnp.arange(COUNT))
    assert finite.all()
    return {
        "init": np.asarray([np.abs(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(init)], np.float32),
        "losses": np.asarray(losses),
        "norms": np.asarray([np.linalg.norm(np.asarray(x, np.float64)) for _, x in by_name], np.float32),
        "samples": np.asarray(samples),
    }


@pytest.mark.parametrize("spec", [*IMAGES, *TEXTS])
@pytest.mark.filterwarnings("ignore:a text of:UserWarning")  # the tiny CLIP's vocabulary is of letters
def test_numbers_are_those_of_before(spec):
    golden, found = np.load(GOLDEN), numbers(spec)
    # Recorded op by op, optimized. A program of all, and another CPU, adds up in another order: float32 sums of n
    # numbers are then off by about sqrt(n) 6e-8, n is at most 288 here, and some ten layers follow each other.
    np.testing.assert_allclose(found["init"], golden[f"{spec}/init"], rtol=1e-6)
    np.testing.assert_allclose(found["losses"], golden[f"{spec}/losses"], rtol=1e-5)
    # Some gradients are zero but for rounding: the bias of keys changes no attention.
    norms = golden[f"{spec}/norms"]
    np.testing.assert_allclose(found["norms"], norms, rtol=1e-4, atol=1e-6 * norms.max())
    # A value on the edge between two of the 256 levels may fall to either side.
    samples = golden[f"{spec}/samples"]
    off = np.abs(found["samples"].astype(int) - samples)
    assert off.max() <= 1 and np.mean(off > 0) <= 0.01
