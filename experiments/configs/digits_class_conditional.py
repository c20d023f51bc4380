"""On the digits: DDPM with classes and classifier-free guidance (Ho & Salimans 2022).

    ./launch.sh digits --config=experiments/configs/digits_class_conditional.py

All else is digits_ddpm.py.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, digits_ddpm


def get_config() -> ConfigDict:
    return _methods.class_conditional(digits_ddpm.get_config())
