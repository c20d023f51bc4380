"""The lightest text encoder: learned embeddings of words and their places, trained with the network that reads it."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PADDING = 0  # the id of "no word here"


class Words(nn.Module):
    """Word ids -> features of each word and of the whole prompt. An empty prompt is padding alone."""

    vocabulary_size: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"]) -> tuple[Float[Array, "B L width"], Float[Array, "B width"]]:
        """(features, pooled): a word's embedding plus its place's, and the sum of the words' embeddings."""
        normal = nn.initializers.normal(1.0)
        word = nn.Embed(self.vocabulary_size, self.width, embedding_init=normal, name="word")(ids)
        place = self.param("place", normal, (ids.shape[1], self.width), jnp.float32)
        pooled = jnp.sum(word * (ids != PADDING)[..., None], axis=1) / ids.shape[1] ** 0.5
        return word + place, pooled
