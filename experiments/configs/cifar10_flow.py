"""On CIFAR-10: rectified flow with logit-normal times (Esser et al. 2024), sampled by Euler's method.

    python -m experiments.cifar10 --config=experiments/configs/cifar10_flow.py --workdir=runs/flow

All else is cifar10_ddpm.py. Not yet trained to the end here, so no score is given.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, cifar10_ddpm


def get_config() -> ConfigDict:
    config = _methods.flow(cifar10_ddpm.get_config())
    config.sampling.num_steps = 100
    return config
