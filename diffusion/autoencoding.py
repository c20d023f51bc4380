"""How the autoencoder of latent diffusion is trained (Rombach et al. 2022, appendix G, and its released code).

An encoder gives q(z | x), a normal distribution of independent numbers; a decoder gives x_hat from a sample of it.
Losses are one number per image, and sums over its numbers: the KL's weight is small because both are.

- In every step: `reconstruction_loss` + `KL_WEIGHT` * `kl_to_unit_normal`.
- From step 50,001 on also `adaptive_weight` * `generator_loss`, while a discriminator of patches learns by
  `discriminator_loss` (Esser et al. 2021, section 3.1).

In the examples

>>> x, x_hat = jnp.zeros((1, 2, 2, 1)), jnp.full((1, 2, 2, 1), 0.5)
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.types import Images, Scalars

KL_WEIGHT = 1e-6
ADVERSARIAL_WEIGHT = 0.5
LARGEST_WEIGHT = 1e4  # of the adversarial loss, before ADVERSARIAL_WEIGHT


def reconstruction_loss(
    x: Images, x_hat: Images, log_scale: Scalars = 0.0, perceptual: Scalars = 0.0
) -> Float[Array, " B"]:
    """Returns the sum over an image of (|x - x_hat| + perceptual) / exp(log_scale) + log_scale.

    That is the negative log-likelihood of a Laplace distribution of that scale, but for log 2 per number.

    Args:
      x: images in [-1, 1].
      x_hat: what the decoder made of them.
      log_scale: one learned number, 0 at the start; the released code calls it logvar.
      perceptual: a distance for each image, as LPIPS, which the released code adds to every number of it.

    Example:
      >>> print(reconstruction_loss(x, x_hat), reconstruction_loss(x, x_hat, log_scale=np.log(0.5)))
      [2.] [1.2274113]
    """
    chex.assert_equal_shape([x, x_hat])
    dtype = jnp.promote_types(jnp.result_type(x, x_hat), jnp.float32)
    difference = jnp.abs(jnp.asarray(x, dtype) - jnp.asarray(x_hat, dtype)).reshape(x.shape[0], -1)
    distance = difference.sum(axis=1) + difference.shape[1] * jnp.asarray(perceptual)
    return distance * jnp.exp(-log_scale) + difference.shape[1] * log_scale


def kl_to_unit_normal(mean: Images, log_variance: Images) -> Float[Array, " B"]:
    """Returns KL(q(z | x) || N(0, 1)) in nats per image, from the logarithm of q's variance.

    Source: Kingma & Welling 2014, appendix B.

    Example:
      >>> print(kl_to_unit_normal(jnp.asarray([[1.0, 0.0]]), jnp.zeros((1, 2))))
      [0.5]
    """
    chex.assert_equal_shape([mean, log_variance])
    kl = 0.5 * (jnp.square(mean) + jnp.expm1(log_variance) - log_variance)
    return kl.reshape(kl.shape[0], -1).sum(axis=1)


def discriminator_loss(real: Images, fake: Images) -> Float[Array, " B"]:
    """Returns the hinge loss of a discriminator, from its logits for images and for reconstructions.

    Logits of patches are averaged. The gradient should not reach the decoder: stop it at x_hat.

    Source: Lim & Ye 2017.

    Example:
      >>> print(discriminator_loss(jnp.asarray([[0.0], [3.0]]), jnp.asarray([[0.0], [-3.0]])))
      [1. 0.]
    """
    return 0.5 * (_mean(jax.nn.relu(1 - jnp.asarray(real))) + _mean(jax.nn.relu(1 + jnp.asarray(fake))))


def generator_loss(fake: Images) -> Float[Array, " B"]:
    """Returns what a decoder minimises against a discriminator: minus the logits of its reconstructions, averaged.

    Example:
      >>> print(generator_loss(jnp.asarray([[1.0, 2.0]])))
      [-1.5]
    """
    return -_mean(jnp.asarray(fake))


def adaptive_weight(reconstruction: Any, adversarial: Any) -> Float[Array, ""]:
    """Returns the weight of the adversarial loss at which it pulls half as much at the last layer as the other one.

    Args:
      reconstruction: gradient of the reconstruction's loss by the decoder's last kernel, an array or a tree.
      adversarial: the same of the generator's loss.

    Returns:
      ADVERSARIAL_WEIGHT |reconstruction| / (|adversarial| + 1e-4), the ratio at most LARGEST_WEIGHT; no gradient flows
      through it.

    Source: Esser et al. 2021, eq. 7.

    Example:
      >>> print(adaptive_weight(jnp.asarray([3.0, 4.0]), jnp.asarray([0.0, 2.4999])))
      1.0
    """
    ratio = _norm(reconstruction) / (_norm(adversarial) + 1e-4)
    return jax.lax.stop_gradient(ADVERSARIAL_WEIGHT * jnp.clip(ratio, 0, LARGEST_WEIGHT))


def psnr(x: Images, x_hat: Images) -> Float[Array, " B"]:
    """Returns the peak signal-to-noise ratio in decibels of images in [-1, 1]; x_hat is clipped to that.

    An image without an error counts as one with an error of 1 of 255 levels in one number, so that all are finite.

    Example:
      >>> print(np.round(psnr(x, x_hat), 2))
      [12.04]
    """
    chex.assert_equal_shape([x, x_hat])
    error = jnp.asarray(x) - jnp.clip(jnp.asarray(x_hat), -1, 1)
    squares = jnp.square(error).reshape(error.shape[0], -1)
    least = (2 / 255) ** 2 / squares.shape[1]
    return 10 * jnp.log10(4 / jnp.maximum(squares.mean(axis=1), least))


def _mean(per_number: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    return per_number.reshape(per_number.shape[0], -1).mean(axis=1)


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
