"""On the digits: DDPM with classes and classifier-free guidance (Ho & Salimans 2022).

    ./launch.sh digits --config=experiments/configs/digits_class_conditional.py

All else is digits_ddpm.py.
"""

from ml_collections import ConfigDict

from experiments.configs import digits_ddpm


def get_config() -> ConfigDict:
    config = digits_ddpm.get_config()
    config.network.class_conditional = True
    config.sampling.guidance = 1.5
    return config
