"""DDPM by hand, on one page: from 1,297 digits to new ones in two minutes on 2 CPU cores (Ho, Jain & Abbeel 2020).

    ./launch.sh by_hand

Read it from top to bottom; every part names its section, equation or algorithm in the paper. There is mathematics, a
network and data, and nothing else: the other experiments have configs, checkpoints and evaluation.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion.data import digits, image_grid, save_png, to_float, to_uint8
from diffusion.gaussian import p_sample, q_sample
from diffusion.losses import simple_loss
from diffusion.networks.unet import UNet
from diffusion.schedules import linear_beta, make_schedule

# Section 4: beta rises from 1e-4 to 0.02 in T = 1000 steps; after the last one x_T is noise.
T = 1000
schedule = make_schedule(linear_beta(T))

# Appendix B: a U-Net with an embedding of the time. For images of 8x8 pixels two levels and 32 channels are enough.
network = UNet(channels=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), num_groups=8, dropout=0.0)


def predict_eps(params, x_t, t) -> Any:
    """eps_theta(x_t, t): the network's estimate of the noise in x_t."""
    return network.apply(params, x_t, jnp.full(len(x_t), t, jnp.float32))


def loss(params, x_0, key):
    """L_simple (eq. 14): the error of the estimated noise, each image at a random time of its own."""
    t_key, eps_key = jax.random.split(key)
    t = jax.random.randint(t_key, (len(x_0),), 1, T + 1)
    eps = jax.random.normal(eps_key, x_0.shape)
    x_t = q_sample(schedule, x_0, t, eps)  # eq. 4: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    return simple_loss(eps, predict_eps(params, x_t, t)).mean()


def train(x_0, num_steps, batch_size, key):
    """Algorithm 1: gradient steps on random images; returns the moving average of the weights."""
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, num_steps // 10, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    init_key, key = jax.random.split(key)
    params = network.init(init_key, x_0[:1], jnp.ones(1))

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(params, average, moments, step):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(key, step))
        batch = x_0[jax.random.randint(batch_key, (batch_size,), 0, len(x_0))]
        value, gradient = jax.value_and_grad(loss)(params, batch, loss_key)
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(params, updates)
        # Section 4: samples are drawn with an exponential moving average of the weights.
        average = optax.incremental_update(params, average, step_size=0.01)
        return params, average, moments, value

    average, moments = jax.tree.map(jnp.copy, params), optimizer.init(params)
    for step in range(num_steps):
        params, average, moments, value = train_step(params, average, moments, step)
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step:4}   loss {value:.4f}", flush=True)
    return average


@partial(jax.jit, static_argnums=1)
def sample(params, num_images, key):
    """Algorithm 2: from noise x_T in T steps to images x_0."""
    noise_key, key = jax.random.split(key)

    def step_back(x_t, t):
        eps_hat = predict_eps(params, x_t, t)
        # x_{t-1}: the mean of eq. 11 plus noise of variance beta_t, none at t = 1.
        return p_sample(jax.random.fold_in(key, t), schedule, eps_hat, x_t, t), None

    x_T = jax.random.normal(noise_key, (num_images, 8, 8, 1))
    x_0, _ = jax.lax.scan(step_back, x_T, jnp.arange(T, 0, -1))
    return x_0


def main(num_steps=800, batch_size=128, num_images=36, path="runs/by_hand/samples.png"):
    """Trains, samples, and writes the samples as a picture."""
    data = digits("train")
    x_0 = to_float(data.read(np.arange(data.num_examples))["image"])  # 0..255 become -1..1 (section 3.3)
    train_key, sample_key = jax.random.split(jax.random.key(0))
    params = train(x_0, num_steps, batch_size, train_key)
    images = to_uint8(sample(params, num_images, sample_key))
    save_png(path, image_grid(np.asarray(images)))
    print(path)


if __name__ == "__main__":
    main()
