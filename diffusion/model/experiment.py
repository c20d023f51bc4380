"""From a config to a model, and with a source of images to what the trainer is given."""

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion.data.sources import Source
from diffusion.model import flux2_text, lora, prompts, sd3_text
from diffusion.model.batches import check_batches, training_batches
from diffusion.model.choices import pick
from diffusion.model.condition import Condition, Facts, classes, nothing, rows_away
from diffusion.model.config import Config, check_ranges, dtype_of, from_plain, round_up
from diffusion.model.lora import LoRA, make_lora
from diffusion.model.loss import make_loss
from diffusion.model.losses import make_objective
from diffusion.model.model import Model, init, make_generate
from diffusion.model.objectives import Objective
from diffusion.model.optimizers import make_optimizer
from diffusion.model.processes import make_process, of_size
from diffusion.model.sampling import make_sampling
from diffusion.model.space import SPACES, Space
from diffusion.model.teacher import make_teacher
from diffusion.networks import flux2, mmdit, unet
from diffusion.networks.flux2 import Flux2
from diffusion.networks.mmdit import MMDiT
from diffusion.networks.unet import UNet
from diffusion.training import Experiment, Rules, run_key, state_shardings

NETWORKS = {"unet": UNet, "mmdit": MMDiT, "flux2": Flux2}
RULES = {"unet": unet.RULES, "mmdit": mmdit.RULES, "flux2": flux2.RULES}  # how a mesh cuts their parameters
TWO_TIMES = ("unet", "mmdit")  # can be told where a step ends
READ_REFERENCES = ("flux2",)  # are told of pictures to edit
Batches = Generator[dict[str, Any], None, None]
CONDITIONS = {
    "nothing": nothing,
    "classes": classes,
    "words": prompts.words,
    "clip": prompts.clip_text,
    "sd3": sd3_text.sd3_text,
    "flux2": flux2_text.flux2_text,
}


def make_model(
    config: Config,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    stored: Mapping[str, Any] | None = None,
    vocabulary: Sequence[str] = (),
) -> Model:
    """Returns the model that `config` describes; no data is needed, and nothing is allocated.

    Args:
      config: of the run.
      image_shape: (height, width, channels).
      num_classes: of the data; None where it has none.
      stored: `stored_of` a model, as the run's checkpoint has it; None where a run starts.
      vocabulary: words that condition.name=words learns, where a run starts.

    Raises:
      ValueError: whatever cannot be built, naming the field.
    """
    check_ranges(config)
    process = make_process(config)
    objective = make_objective(config, process)
    of_condition, of_space = ((stored or {}).get(name) or None for name in ("condition", "space"))
    facts = Facts(num_classes, of_condition or {}, vocabulary, config.network.get("null_class", True))
    condition = pick(CONDITIONS, config.condition, "condition")(facts)
    space = pick(SPACES, config.space, "space")(image_shape, of_space)
    process = of_size(process, math.prod(space.shape[:-1]))
    network = make_network(config, space.shape[-1], condition, process.time_scale, objective)
    adapters = make_lora(config.network.name, **config.lora)
    known = (stored or {}).get("frozen")
    frozen = frozen_groups(condition, space, adapters) if known is None else tuple(known)
    model = Model(process, objective, network, condition, space, frozen, adapters)
    about = (stored or {}).get("teacher")
    if not objective.teacher or about is None:
        return model
    theirs = make_model(from_plain(about["config"]), image_shape, about["num_classes"], about)
    frozen = (*frozen, *(("teacher",) if "teacher" not in frozen else ()))
    return model._replace(frozen=frozen, teacher=make_teacher(model, theirs, about))


def frozen_groups(condition: Condition, space: Space, adapters: LoRA | None = None) -> tuple[str, ...]:
    """Returns the names of the groups of parameters that training leaves as they are, of a run that starts."""
    adapted = adapters is not None
    groups = {
        "network": adapted,
        "text": condition.init is not None and (condition.frozen or adapted),
        "space": space.init is not None,
    }
    return tuple(name for name, frozen in groups.items() if frozen)


def make_network(
    config: Config, channels: int, condition: Condition, time_scale: float, objective: Objective
) -> UNet | MMDiT | Flux2:
    """Returns the network of `config.network`, applied to (x_t, time, **told).

    Args:
      config: of the run.
      channels: of x_0.
      condition: what it is told.
      time_scale: the process's.
      objective: what it is trained on.

    Raises:
      ValueError: an unknown name or field, or a network that cannot read the condition.
    """
    block = {**config.network, "dtype": dtype_of(config)}
    make = pick(NETWORKS, block, "network")
    outputs = channels * (1 + objective.learned_variance) * objective.num_values
    if objective.two_times and config.network.name not in TWO_TIMES:
        raise ValueError(
            f"loss.name={config.loss.name} tells the network a second time: network.name={config.network.name} takes "
            f"one, choose from {', '.join(TWO_TIMES)}"
        )
    if objective.guided and not (condition.optional and condition.kind != "nothing"):
        raise ValueError(
            f"loss.name={config.loss.name} is guided, and condition.name={config.condition.name} has nothing to be "
            "guided to: leave loss.omega at 1 and loss.kappa at 0"
        )
    second = {"two_times": True} if objective.two_times else {}
    if config.network.name == "unet":
        classes = {name: size for name, size in condition.widths.items() if name == "num_classes"}
        return make(**classes, **second, out_channels=outputs, time_scale=time_scale)
    if condition.kind != "prompts":
        name = config.network.name
        raise ValueError(f"network.name={name} reads prompts, and condition.name is {config.condition.name}: use unet")
    if objective.learned_variance:
        raise ValueError("loss.learned_variance needs network.name=unet: an MM-DiT has no variance in its output")
    widths = dict(condition.widths)
    if config.network.name == "flux2":
        widths.pop("pooled_width")  # it reads no pooled text
    network = make(**widths, **second, out_channels=outputs, time_scale=time_scale)
    if getattr(network, "guidance_embedding", False):
        raise ValueError("network.guidance_embedding is FLUX.2 [dev]'s, which is not drawn with here: use [klein]")
    return network


def check_references(config: Config, given: str = "--images") -> None:
    """Raises ValueError where pictures to edit are given to a network that is not told of any."""
    if config.network.name not in READ_REFERENCES:
        raise ValueError(
            f"{given}: network.name={config.network.name} is not told of pictures to edit, as "
            f"{READ_REFERENCES[0]} is: use --mode=img2img, or leave them out"
        )


def stored_of(model: Model) -> dict[str, Any]:
    """Returns what a checkpoint stores of a model beside its config and parameters, plain JSON."""
    return {
        "condition": dict(model.condition.description or {}),
        "space": dict(model.space.description or {}),
        "frozen": list(model.frozen),
        **({"teacher": dict(model.teacher.description)} if model.teacher else {}),
    }


def make_run_optimizer(config: Config, model: Model) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns the optimizer of `config`, which leaves a frozen condition's parameters alone, and its learning rate."""
    optimizer, learning_rate = make_optimizer(config)
    if model.condition.frozen and "text" not in model.frozen:  # as runs of format 2 have it
        parts: dict[Any, Any] = {"network": optimizer, "text": optax.set_to_zero()}
        optimizer = optax.multi_transform(parts, {name: name for name in parts})
    return optimizer, learning_rate


def preview_requests(condition: Condition, count: int, examples: Sequence[str]) -> list[Any]:
    """Returns what the first `count` pictures show: each class or each example in turn, or nothing."""
    match condition.kind:
        case "classes":
            assert condition.num_classes is not None
            return [i % condition.num_classes for i in range(count)]
        case "prompts" if examples:
            return [examples[i % len(examples)] for i in range(count)]
    return [None] * count


def abstract_batch(config: Config, model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch."""
    size = config.data.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *model.space.image_shape), np.uint8),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
    if model.condition.kind == "prompts":
        row = model.condition.read([None])[0]
        batch["text"] = jax.ShapeDtypeStruct((size, *row.shape), row.dtype)
    if model.objective.by_step:
        batch["step"] = jax.ShapeDtypeStruct((size,), np.int32)
    return batch


def with_steps(
    batches: Generator[dict[str, Any], None, None], start_step: int
) -> Generator[dict[str, Any], None, None]:
    """Yields the batches with "step", how many updates were made before, int32[B]; closes them."""
    with contextlib.closing(batches):
        for step, batch in enumerate(batches, start_step):
            yield {**batch, "step": np.full(len(batch["label"]), step, np.int32)}


def rules_of(config: Config, model: Model) -> Rules:
    """Returns how a mesh cuts the parameters of a model."""
    return (*RULES[config.network.name], *lora.RULES, *model.condition.rules)


def make_learner(config: Config, model: Model) -> Experiment:
    """Returns the experiment of `config` without data: all that the state of a training depends on."""
    optimizer, learning_rate = make_run_optimizer(config, model)

    def batches(start_step: int) -> Any:
        raise ValueError("this experiment was made without data")

    rules = rules_of(config, model)
    size = config.data.batch_size
    return Experiment(
        lambda key: init(model, key),
        make_loss(model),
        optimizer,
        learning_rate,
        batches,
        size,
        frozen=model.frozen,
        rules=rules,
    )


def make_experiment(
    config: Config,
    model: Model,
    source: Source,
    mesh: Mesh,
    examples: Sequence[str] = (),
    references: Sequence[np.ndarray] = (),
    known: bool = False,
) -> Experiment:
    """Returns the experiment of `config` on the images of `source`.

    Args:
      config: of the run.
      model: made of it.
      source: of images, and of what the condition reads beside them.
      mesh: the devices.
      examples: prompts that the previews show in turn.
      references: pictures that these edit, uint8 [len(examples), h, w, C] each.
      known: whether all of these are known to fit together, as where the same was begun before: the sampler is not
        traced to see that it does.

    Raises:
      ValueError: whatever does not fit together; nothing has been allocated or written by then.
    """
    learner = make_learner(config, model)
    num_previews = round_up(config.training.num_previews, mesh.size)

    def batches(start_step: int) -> Any:
        found = training_batches(config, source, start_step)
        return with_steps(found, start_step) if model.objective.by_step else found

    def preview(params: Any) -> jax.Array:
        return generate(params, rows, away, seeds, np.arange(num_previews), references=seen)[0]

    # What does not fit together is found here, before anything is written: the data, the network, the sampler.
    check_batches(config, source)
    shown = model._replace(space=model.space._replace(decode=model.space.preview))
    generate = make_generate(shown, make_sampling(config, model.process), mesh)
    rows = model.condition.read(preview_requests(model.condition, max(num_previews, mesh.size), examples))
    away = rows_away(model.condition, rows)
    seen = [picture[np.arange(len(rows)) % len(picture)] for picture in references]
    seeds = np.full(len(rows), config.seed, np.uint32)  # one each as `draw` has: a batch as large is the same program
    if not known:
        shapes = jax.eval_shape(learner.init, run_key(config.seed, "init"))
        state_shardings(mesh, shapes, learner.rules)
        jax.eval_shape(partial(generate, references=seen), shapes, rows, away, seeds, np.arange(len(rows)))
    num_shapes = max(1, len(source.parts))
    return learner._replace(batches=batches, preview=preview if num_previews else None, num_shapes=num_shapes)
