"""What a network is told beside x_t and the time: nothing, a class, or a prompt (`prompts.py` makes those)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import guidance
from diffusion.training import Rules

Told = dict[str, Any]  # keyword arguments of the network


class Condition(NamedTuple):
    """A condition, in training and in sampling.

    Attributes:
      kind: "nothing", "classes" or "prompts": what `read` takes.
      read: requests (class numbers or prompts; None for no condition) -> an array with a row per request.
      of_request: (params, rows of `read`) -> what the network is told of them.
      of_batch: (params, batch, key of the loss) -> what it is told of training examples, some of them hidden.
      widths: arguments of the network that fit it to the condition.
      init: key -> params, where it has parameters of its own; None where it has none.
      frozen: whether the parameters keep the values that `init` gave them.
      description: what makes it again beside the config and the parameters, plain JSON; None: nothing more.
      num_classes: of "classes".
      hidden: (batch, key of the loss) -> bool[B], of which training examples `of_batch` hides the condition.
      optional: whether "no condition" can be asked for.
      rules: how a mesh cuts its parameters, see `training.sharding`.
      away: rows -> rows that guidance to them leads away from; None: "no condition".
      rows_of_batch: (batch, key of the loss) -> the rows that `of_batch` reads; of one with `away`.
    """

    kind: str
    read: Callable[[Sequence[Any]], np.ndarray]
    of_request: Callable[[Any, Any], Told]
    of_batch: Callable[[Any, dict[str, jax.Array], jax.Array], Told]
    widths: dict[str, Any]
    init: Callable[[jax.Array], Any] | None = None
    frozen: bool = False
    description: Mapping[str, Any] | None = None
    num_classes: int | None = None
    hidden: Callable[[dict[str, jax.Array], jax.Array], jax.Array] = lambda batch, key: jnp.zeros(
        len(batch["label"]), bool
    )
    optional: bool = True
    rules: Rules = ()
    away: Callable[[Any], jax.Array] | None = None
    rows_of_batch: Callable[[dict[str, jax.Array], jax.Array], jax.Array] | None = None


def rows_of(condition: Condition, requests: Sequence[Any]) -> np.ndarray:
    """Returns `condition.read(requests)`. Raises ValueError where one is None and the model knows no "no condition"."""
    if not condition.optional and any(request is None for request in requests):
        raise ValueError("this model was trained with a class for every image: give one each, as --label=0,1")
    return condition.read(requests)


def rows_away(condition: Condition, rows: np.ndarray, negative: str | Sequence[str | None] | None = None) -> np.ndarray:
    """Returns the rows that guidance leads away from, one for each of `rows`.

    Args:
      condition: of the model.
      rows: of `read`.
      negative: prompt to lead away from, or one per row; where it is None, what the condition says.
    """
    prompts = [negative] if negative is None or isinstance(negative, str) else negative
    away = condition.read(prompts)
    away = np.broadcast_to(away, (len(rows), *away.shape[1:]))
    if condition.away is None or None not in prompts:
        return away
    given = np.broadcast_to([prompt is not None for prompt in prompts], len(rows))
    return np.where(given[:, None], away, condition.away(rows))


class Facts(NamedTuple):
    """What a condition is made of beside its config.

    Attributes:
      num_classes: of the data; None where it has none.
      stored: `Condition.description` in the run's checkpoint; empty where a run starts.
      vocabulary: words to learn, where a run starts.
      null_class: whether the network has an embedding of "no class".
    """

    num_classes: int | None
    stored: Mapping[str, Any]
    vocabulary: Sequence[str]
    null_class: bool = True


def nothing(facts: Facts) -> Condition:
    """Returns the condition of an unconditional model."""
    del facts
    return Condition(
        kind="nothing",
        read=lambda requests: np.zeros((len(requests), 0), np.int32),
        of_request=lambda params, rows: {},
        of_batch=lambda params, batch, key: {},
        widths={},
    )


def classes(facts: Facts, *, dropout: float = 0.1) -> Condition:
    """Returns the condition of class labels; label `num_classes` is "no class".

    Args:
      facts: with the number of classes.
      dropout: share of the training examples whose label is hidden (Ho & Salimans 2022, Algorithm 1).

    Raises:
      ValueError: the data has no classes, or `dropout` is outside [0, 1].
    """
    num_classes = facts.num_classes
    if num_classes is None:
        raise ValueError("condition.name=classes needs labels, and the data has none")
    if not 0 <= dropout <= 1:
        raise ValueError(f"condition.dropout is {dropout}: it has to lie in [0, 1]")

    if dropout and not facts.null_class:
        raise ValueError("condition.dropout hides classes, and network.null_class=False has none to hide: set it to 0")
    hidden = num_classes if facts.null_class else 0  # the latter stands where nothing is read; see `rows_of`

    def read(requests: Sequence[int | None]) -> np.ndarray:
        if outside := [label for label in requests if label is not None and not 0 <= label < num_classes]:
            raise ValueError(f"class {outside[0]} does not exist: choose from 0..{num_classes - 1}")
        return np.array([hidden if label is None else label for label in requests], np.int32)

    def of_batch(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Told:
        if not facts.null_class:
            return {"label": batch["label"]}
        label_key = jax.random.split(key, 4)[3]  # the other three are the loss's own
        return {"label": guidance.drop_labels(label_key, batch["label"], num_classes, dropout)}

    def is_hidden(batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        return of_batch(None, batch, key)["label"] == num_classes

    return Condition(
        kind="classes",
        read=read,
        of_request=lambda params, rows: {"label": jnp.asarray(rows)},
        of_batch=of_batch,
        widths={"num_classes": num_classes},
        num_classes=num_classes,
        hidden=is_hidden,
        optional=facts.null_class,
    )
