"""The paper's CIFAR-10 experiment with a network so small that an hour on 2 CPU cores shows something.

    python -m experiments.cifar10 --config=experiments/configs/cifar10_small.py --workdir=runs/small

1.6 million parameters in place of 35.7. The process, the loss and the protocol are the paper's, so every tool can be
tried on it; the figures it gave are in the README's reproduction card.
"""

from ml_collections import ConfigDict

from experiments.configs import cifar10_ddpm


def get_config() -> ConfigDict:
    config = cifar10_ddpm.get_config()
    config.data.batch_size = 32
    config.network.update(dict(channels=32, num_blocks=1, dropout=0.0, num_groups=8, dtype="float32"))
    config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=200))
    config.training.update(
        dict(
            num_steps=3_000,
            ema_decay=0.999,
            snapshot_every=250,
            log_every=50,
            checkpoint_every=250,
            keep_every=0,
            preview_every=1_000,
        )
    )
    config.sampling.update(dict(sampler="dpm_solver_pp", grid="karras", num_steps=20, batch_size=250))
    config.evaluation.update(dict(num_samples=5_000, likelihood_images=500, bound_terms=32, ode_steps=100))
    return config
