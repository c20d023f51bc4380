"""A model's loss of a batch: what is drawn of it, and what the objective makes of that."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion.model.model import Model, network_of, parts, steered
from diffusion.model.objectives import Drawn
from diffusion.model.space import references_of
from diffusion.samplers import Denoise
from diffusion.training import Loss, Mean


def make_loss(model: Model) -> Loss:
    """Returns loss(params, batch, key) -> (float32[B], metrics): what the model's objective makes of a batch."""

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, Mean]]:
        draw_key, eps_key, dropout_key, _ = jax.random.split(key, 4)
        own = parts(model, params)
        x_0 = model.space.of_batch(own.space, batch, key)
        eps = jax.random.normal(eps_key, x_0.shape)
        seen = references_of(model.space, own.space, batch, key)
        told = {**model.condition.of_batch(own.text, batch, key), **seen}

        def network(x: jax.Array, time: jax.Array, **more: Any) -> Any:
            return network_of(model, params, {**told, **more}, train=True, rngs={"dropout": dropout_key})(x, time)

        def unconditional(x: jax.Array, time: jax.Array, **more: Any) -> Any:
            nothing = model.condition.of_request(own.text, model.condition.read([None]))
            return network(x, time, **jax.tree.map(lambda one: jnp.repeat(one, len(x), axis=0), nothing), **more)

        hidden = model.condition.hidden(batch, key)
        teacher = make_teach(model, params, batch, key)
        drawn = Drawn(x_0, eps, draw_key, network, unconditional, teacher, hidden, batch.get("step"))
        return model.objective.compute(drawn)

    return loss


def make_teach(model: Model, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Denoise:
    """Returns the teacher's guided denoiser of a batch, told of its conditions as the student is."""

    def teach(x: jax.Array, time: jax.Array) -> Any:
        assert model.teacher is not None
        own, student = jax.lax.stop_gradient(params["teacher"]), parts(model, params)
        text = own.get("text", student.text)
        seen = references_of(model.space, student.space, batch, key)
        told = {**model.condition.of_batch(text, batch, key), **seen}
        if model.condition.away and model.condition.rows_of_batch:
            rows = model.condition.away(model.condition.rows_of_batch(batch, key))
            fro = model.condition.of_request(text, rows)
        else:
            nothing = model.condition.of_request(text, model.condition.read([None]))
            fro = jax.tree.map(lambda one: jnp.repeat(one, len(x), axis=0), nothing)
        fro |= seen
        return steered(model.teacher.model, model.teacher.sampling, own["network"], told, fro)(x, time)

    return teach
