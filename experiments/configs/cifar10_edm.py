"""On CIFAR-10: the process, preconditioning, loss and sampler of EDM (Karras et al. 2022).

    python -m experiments.cifar10 --config=experiments/configs/cifar10_edm.py --workdir=runs/edm

All else is cifar10_ddpm.py. Not yet trained to the end here, so no score is given.
Not the paper's network (its DDPM++), augmentation, or training budget: those of the base config.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, cifar10_ddpm


def get_config() -> ConfigDict:
    return _methods.edm(cifar10_ddpm.get_config())
