"""On CIFAR-10: the cosine schedule and learned variances of Nichol & Dhariwal (2021), trained with L_hybrid.

    python -m experiments.cifar10 --config=experiments/configs/cifar10_cosine_hybrid.py --workdir=runs/cosine_hybrid

All else is cifar10_ddpm.py. Not yet trained to the end here, so no score is given.
The chain has the base config's 1,000 steps, the paper's CIFAR-10 one 4,000 (--config.process.num_steps=4000).
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, cifar10_ddpm


def get_config() -> ConfigDict:
    return _methods.cosine_hybrid(cifar10_ddpm.get_config())
