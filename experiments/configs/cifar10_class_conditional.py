"""On CIFAR-10: DDPM with classes and classifier-free guidance (Ho & Salimans 2022).

    python -m experiments.cifar10 --config=experiments/configs/cifar10_class_conditional.py --workdir=runs/class

All else is cifar10_ddpm.py. Not yet trained to the end here, so no score is given.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, cifar10_ddpm


def get_config() -> ConfigDict:
    return _methods.class_conditional(cifar10_ddpm.get_config())
