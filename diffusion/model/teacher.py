"""A trained model that another learns from: how it becomes part of the student's, and how the student begins as it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.model.config import Config, copy, from_plain
from diffusion.model.model import Model, Teacher, check_guidance, init
from diffusion.model.sampling import make_sampling

SECOND_TIME = ("interval_1", "interval_2")  # modules that a network of two times has beside those of one
LAST = ("conv_out", "patch_out")  # those whose output is the network's
KEPT = ("experiment", "config", "image_shape", "num_classes", "condition", "space", "frozen", "format")


def make_teacher(student: Model, theirs: Model, about: Mapping[str, Any]) -> Teacher:
    """Returns a trained model as the teacher of a student, whose condition it is told.

    Args:
      student: the model that learns.
      theirs: the trained one.
      about: its description.
    """
    config = from_plain(about["config"])
    scale = student.objective.teacher_scale
    config = copy(config, sampling={"guidance": scale}) if scale else config
    sampling = make_sampling(config, theirs.process)._replace(asks="denoise")
    network_alone = theirs._replace(
        condition=student.condition._replace(init=None),
        space=student.space._replace(init=None),
        lora=None,
        teacher=None,
    )
    return Teacher(network_alone, sampling, about)


def describe_teacher(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a student's checkpoint stores of its teacher, of the description of the teacher's own run."""
    return {name: stored[name] for name in KEPT if name in stored}


def check_teacher(config: Config, student: Model) -> None:
    """Raises ValueError where a student cannot learn from its teacher.

    Args:
      config: of the student.
      student: with its teacher.
    """
    assert student.teacher is not None
    model, sampling, about = student.teacher
    where, theirs = f"loss.teacher={config.loss.teacher}", about["config"]
    same_round = model.objective.gives == student.objective.gives == ("denoise",)  # as progressive distillation's are
    if not model.objective.mean and not same_round:
        raise ValueError(f"{where} was trained by loss.name={theirs['loss']['name']}, which follows no ODE")
    if tuple(about["image_shape"]) != student.space.image_shape:
        raise ValueError(f"{where} draws images of shape {about['image_shape']}, not {student.space.image_shape}")
    if dict(about.get("space") or {}) != dict(student.space.description or {}):
        raise ValueError(f"{where} draws in another space: give its own config.space")
    same = dict(about.get("condition") or {}) == dict(student.condition.description or {})
    if theirs["condition"]["name"] != config.condition.name or not same:
        raise ValueError(f"{where} is told of other conditions: give its own config.condition")
    times = student.process.quantile(jnp.linspace(0.1, 0.9, 5))
    levels = [np.asarray(process.at(times)) for process in (student.process, model.process)]
    if not np.allclose(*levels, atol=1e-6):
        raise ValueError(f"{where} was trained on another process: give its own config.process")
    check_guidance(model, sampling)


def fit_network(model: Model, network: Any, key: jax.Array) -> Any:
    """Returns the parameters of a trained network in the form of `model`'s.

    Layers of a second time are drawn anew, and add nothing at first; the last layer is repeated for every value of a
    policy, which is then at first its teacher.

    Args:
      model: whose network begins so.
      network: parameters of a network of one time, or of one value; others are returned as they are.
      key: of what is drawn.
    """

    def own(key: jax.Array) -> Any:
        params = init(model, key)
        return (params["network"] if model.grouped else params)["params"]

    modules, wanted = dict(network["params"]), jax.eval_shape(own, key)
    if missing := [name for name in SECOND_TIME if name in wanted and name not in modules]:
        modules |= jax.jit(lambda key: {name: own(key)[name] for name in missing})(key)
    count, channels = model.objective.num_values, model.space.shape[-1]

    def repeated(leaf: jax.Array) -> jax.Array:
        return jnp.tile(leaf.reshape(*leaf.shape[:-1], -1, channels), count).reshape(*leaf.shape[:-1], -1)

    for name in LAST:
        if name in modules and wanted[name]["bias"].shape[0] == count * modules[name]["bias"].shape[0]:
            modules[name] = jax.tree.map(repeated, modules[name])
    return {**network, "params": modules}
