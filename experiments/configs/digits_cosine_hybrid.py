"""On the digits: the cosine schedule and learned variances of Nichol & Dhariwal (2021), trained with L_hybrid.

    ./launch.sh digits --config=experiments/configs/digits_cosine_hybrid.py

All else is digits_ddpm.py.
The chain has the base config's 1,000 steps, the paper's CIFAR-10 one 4,000 (--config.process.num_steps=4000).
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, digits_ddpm


def get_config() -> ConfigDict:
    return _methods.cosine_hybrid(digits_ddpm.get_config())
