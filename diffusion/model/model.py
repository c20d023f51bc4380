"""A diffusion model: a process, an objective, a network, a condition and a space; its loss, its denoiser, its images.

The parameters are the network's, or {"network", "text", "space", "lora"} where the condition or the space has some of
its own, or the network has adapters. What is frozen, as a text encoder, an autoencoder or the network beside adapters,
is among them without gradients: the loss is a function of its arguments alone, a checkpoint the whole experiment.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion import predictions
from diffusion.model import lora
from diffusion.model.condition import Condition, Told
from diffusion.model.distilled import policy_values
from diffusion.model.lora import LoRA
from diffusion.model.objectives import Objective
from diffusion.model.processes import Process
from diffusion.model.sampling import Sampling
from diffusion.model.space import Space
from diffusion.samplers import Denoise
from diffusion.training import batch_sharding, on_mesh, run_key
from diffusion.types import denoised

SPACE_KEY, LORA_KEY, TEACHER_KEY = 2, 3, 4  # folded into init's key; its splits 0 and 1 are taken


class Model(NamedTuple):
    """All that loss and sampling depend on, but the parameters.

    Attributes:
      process: x_t, the distribution of training times, the grids.
      objective: what the network returns, and is trained on.
      network: a Flax module applied to (x_t, time, **told).
      condition: what it is told.
      space: of x_0.
      frozen: names of the groups of parameters that training leaves as they are and does not average.
      lora: adapters of the network's kernels; None where it has none.
      teacher: the trained model that it learns from; None where it learns from images alone.
    """

    process: Process
    objective: Objective
    network: Any
    condition: Condition
    space: Space
    frozen: tuple[str, ...] = ()
    lora: LoRA | None = None
    teacher: "Teacher | None" = None

    @property
    def grouped(self) -> bool:
        """Whether the parameters are groups, of which the network's is one."""
        return any(part is not None for part in (self.condition.init, self.space.init, self.lora, self.teacher))


class Teacher(NamedTuple):
    """A trained model that another learns from, told what that is told.

    Its parameters are the student's group "teacher", frozen: {"network"}, and "text" where the student's is learned.

    Attributes:
      model: of its network alone.
      sampling: how it is guided.
      description: what makes it again, plain JSON.
    """

    model: Model
    sampling: Sampling
    description: Mapping[str, Any]


def init(model: Model, key: jax.Array) -> Any:
    """Returns the parameters that `key` draws."""
    x_0, time = jnp.zeros((1, *model.space.shape)), jnp.zeros((1,))
    empty = jnp.asarray(model.condition.read([None]))
    others: dict[str, Any] = {}
    network_key = key
    if model.condition.init is not None:
        text_key, network_key = jax.random.split(key)
        others["text"] = model.condition.init(text_key)
    if model.space.init is not None:
        others["space"] = model.space.init(jax.random.fold_in(key, SPACE_KEY))
    told = model.condition.of_request(others.get("text"), empty)
    network = _init_network(model.network, network_key, x_0, time, told)
    if model.lora is not None:
        others["lora"] = lora.init(model.lora, network, jax.random.fold_in(key, LORA_KEY))
    if model.teacher is not None:
        teacher_key = jax.random.fold_in(key, TEACHER_KEY)
        others["teacher"] = {"network": _init_network(model.teacher.model.network, teacher_key, x_0, time, told)}
        if model.condition.init is not None and not model.condition.frozen:
            others["teacher"]["text"] = model.condition.init(teacher_key)
    return {"network": network, **others} if model.grouped else network


def _init_network(network: Any, *inputs: Any) -> Any:
    """Returns the variables that a key draws; equal networks are traced once, and a student's start has a dozen."""
    try:
        hash(network)
    except TypeError:  # a field is a list, or an array
        return _init(network, *inputs)
    return _init_once(network, *inputs)


def _init(network: Any, key: jax.Array, x_0: jax.Array, time: jax.Array, told: Told) -> Any:
    return network.init(key, x_0, time, **told)


_init_once = jax.jit(_init, static_argnums=0, inline=True)


class Parts(NamedTuple):
    """The parameters of a model's parts; None where a part has none."""

    network: Any
    text: Any
    space: Any


def parts(model: Model, params: Any) -> Parts:
    """Returns the parameters of each part, the network's with its adapters at work; no gradient reaches frozen ones."""
    if not model.grouped:
        return Parts(params, None, None)
    network, text, space = params["network"], params.get("text"), params.get("space")
    if model.lora is not None:
        network = lora.merge(jax.lax.stop_gradient(network), params["lora"], model.lora.scale)
    text = jax.lax.stop_gradient(text) if model.condition.frozen else text
    return Parts(network, text, jax.lax.stop_gradient(space))


def network_of(model: Model, params: Any, told: Told, **options: Any) -> Callable[..., Any]:
    """Returns (scaled x_t, time, **more) -> output, or (output, v): the one call of training and sampling."""
    own = parts(model, params).network

    def network(x: jax.Array, time: jax.Array, **more: Any) -> Any:
        output: Any = model.network.apply(own, x, time, **told, **options, **more)
        return tuple(jnp.split(output, 2, axis=-1)) if model.objective.learned_variance else output

    return network


def make_denoise(model: Model, params: Any, told: Told, **options: Any) -> Denoise:
    """Returns denoise(x_t, time) -> x_0_hat of the network with `params`, or `Denoised` with a learned variance."""
    return predictions.denoiser(
        model.objective.prediction, network_of(model, params, told, **options), model.process.at
    )


def guided(model: Model, sampling: Sampling, params: Any, rows: Any, away: Any) -> Denoise:
    """Returns the denoiser that samples are drawn with: guided to `rows` and away from `away`, then thresholded.

    Args:
      model: its denoiser.
      sampling: scale, interval, threshold.
      params: of network and condition.
      rows: of `condition.read`, [B, ...].
      away: the same, for "no condition" or a negative prompt.

    Raises:
      ValueError: guidance of a model that has no condition.
    """
    check_guidance(model, sampling)
    if "denoise" not in model.objective.gives:
        raise ValueError("a policy is of whole steps, and has no x_0_hat at one time: draw with its sampler")
    text = parts(model, params).text
    told, fro = (model.condition.of_request(text, x) for x in (rows, away))
    return steered(model, sampling._replace(asks="denoise"), params, told, fro)


def check_guidance(model: Model, sampling: Sampling) -> None:
    """Raises ValueError where a model that has no condition, or cannot do without, is to be guided."""
    if sampling.scale != 1.0 and model.condition.kind == "nothing":
        raise ValueError(
            f"sampling.guidance={sampling.scale:g} needs a condition to be guided to: train with "
            "config.condition.name=classes, or leave guidance at 1"
        )
    if sampling.scale != 1.0 and not model.condition.optional:
        raise ValueError(
            f"sampling.guidance={sampling.scale:g} needs an embedding of no class, and this model has none: use 1"
        )


def steered(model: Model, sampling: Sampling, params: Any, told: Told, fro: Told) -> Any:
    """Returns what the sampler asks for, guided: of what the network is told, and of what it is led away from.

    It is a denoiser (x_t, time) -> x_0_hat, where `sampling.asks` for a "jump" (x_t, time, next_time) -> x_0_hat of a
    network that is told the next time, for the "end" of a trajectory the jump to time 0, and for a "policy"
    (x_t, time, next_time) -> values of x_0, which are as guided as the teacher was.
    """

    def jump(x_t: jax.Array, time: jax.Array, next_time: jax.Array | float) -> Any:
        more = {"next_time": jnp.broadcast_to(jnp.asarray(next_time, jnp.float32), x_t.shape[:1])}
        return led(model, sampling, params, {**told, **more}, {**fro, **more})(x_t, time)

    if sampling.asks == "policy":
        network = network_of(model, params, told)

        def values(x_t: jax.Array, time: jax.Array, next_time: jax.Array) -> jax.Array:
            kind, (signal, noise) = model.objective.prediction, model.process.at(time)
            output = network(predictions.network_input(kind, x_t, signal, noise), time, next_time=next_time)
            return policy_values(kind, output, x_t, signal, noise)

        return values
    if sampling.asks == "jump":
        return jump
    if sampling.asks == "end" and model.objective.two_times:
        return lambda x_t, time: jump(x_t, time, 0.0)
    return led(model, sampling, params, told, fro)


def led(model: Model, sampling: Sampling, params: Any, told: Told, fro: Told) -> Denoise:
    """Returns the guided denoiser of what the network is told, and of what it is led away from.

    Both evaluations are one call of the network on twice the images, each beside its own: on a mesh they are on the
    same device.
    """
    conditional = make_denoise(model, params, told)
    if sampling.scale == 1.0:
        return sampling.threshold(conditional)
    without = make_denoise(model, params, told, skip=sampling.skip.layers) if sampling.skip else None
    both = make_denoise(model, params, jax.tree.map(beside, told, fro))

    def pair(x_t: jax.Array, time: jax.Array) -> tuple[Any, Any]:
        times = jnp.repeat(time, 2) if jnp.ndim(time) else time
        output = denoised(both(beside(x_t, x_t), times))
        halves = (jax.tree.map(lambda x, i=i: x[i::2], output) for i in range(2))
        return tuple(half.plain() for half in halves)

    return sampling.guide(conditional, pair, without)


def beside(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x_1, y_1, x_2, y_2, ... along the first axis."""
    return jnp.stack([x, y], axis=1).reshape(2 * len(x), *x.shape[1:])  # not -1: a width may be 0


def draw_noise(model: Model, seed: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (keys [B], eps [B, ...]) of images number `index`: pure functions of (their) seed and number."""
    seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), jnp.shape(index))
    keys = jax.vmap(lambda seed, i: jax.random.split(run_key(seed, "sample", i)))(seeds, index)
    return keys[:, 1], jax.vmap(lambda key: jax.random.normal(key, model.space.shape))(keys[:, 0])


# A way to use a model: (sampler, denoise, grid, keys [B], eps [B, ...], *x_0) -> x_0 [B, ...].
Use = Callable[..., Any]


def from_noise(sampler: Any, denoise: Denoise, grid: Any, keys: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns samples: the plainest `Use`, from noise to images."""
    return sampler(denoise, grid.noise[0] * eps, grid, keys)


def make_generate(
    model: Model, sampling: Sampling, mesh: Mesh, use: Use = from_noise
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns generate(params, rows, away, seed, index int32[B], *images, references=()) -> (uint8 [B, ...], finite).

    It is jitted and spread over the mesh, which has to divide B. Image number i is a pure function of (params, its row,
    seed, i), whatever batch it is made in. `finite` is False where x_0 held NaN or infinity. In a space with parameters
    of its own, text encoder, sampler and decoder are programs of their own: their temporary memory is not added up.

    Args:
      model: with `sampling`, what draws.
      sampling: sampler, grid, guidance, threshold.
      mesh: the devices.
      use: what is made of the noise and of `images`, uint8; those that are bool are masks of x_0, given as they are.

    `references` are pictures to edit, uint8 [B, h, w, C] each, of any size that the space can encode; the network is
    told of their x_0.
    """
    check_guidance(model, sampling)
    apart = model.space.init is not None

    def stage(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(on_mesh(mesh, function), out_shardings=batch_sharding(mesh)) if apart else function

    tell = stage(model.condition.of_request)
    encode = stage(lambda params, image, key: model.space.encode(params, image, key))
    noise = stage(partial(draw_noise, model))

    @stage
    def run(network: Any, told: Told, fro: Told, keys: jax.Array, eps: jax.Array, *begun: jax.Array) -> jax.Array:
        denoise = steered(model, sampling, network, told, fro)
        return use(sampling.sampler, denoise, sampling.grid, keys, eps, *begun)

    @stage
    def show(params: Any, x_0: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model.space.decode(params, x_0), jnp.isfinite(x_0).all(axis=range(1, x_0.ndim))

    def generate(
        params: Any, rows: Any, away: Any, seed: Any, index: Any, *images: Any, references: Sequence[Any] = ()
    ) -> tuple[jax.Array, jax.Array]:
        of_text, of_space = params.get("text"), params.get("space")
        told, fro = tell(of_text, rows), tell(of_text, away)
        keys, eps = noise(seed, index)
        begun = (image if image.dtype == bool else encode(of_space, image, keys) for image in images)
        if references:
            seen = {"references": tuple(encode(of_space, picture, keys) for picture in references)}
            told, fro = {**told, **seen}, {**fro, **seen}
        x_0 = run(network_alone(model, params), told, fro, keys, eps, *begun)
        return show(of_space, x_0)

    return generate if apart else jax.jit(on_mesh(mesh, generate), out_shardings=batch_sharding(mesh))


def network_alone(model: Model, params: Any) -> Any:
    """Returns the parameters without those of condition and space: all that `steered` reads."""
    return {name: params[name] for name in ("network", "lora") if name in params} if model.grouped else params
