"""On the digits: the process, preconditioning, loss and sampler of EDM (Karras et al. 2022).

    ./launch.sh digits --config=experiments/configs/digits_edm.py

All else is digits_ddpm.py.
Not the paper's network (its DDPM++), augmentation, or training budget: those of the base config.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, digits_ddpm


def get_config() -> ConfigDict:
    return _methods.edm(digits_ddpm.get_config())
