"""On the digits: rectified flow with logit-normal times (Esser et al. 2024), sampled by Euler's method.

    ./launch.sh digits --config=experiments/configs/digits_flow.py

All else is digits_ddpm.py.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, digits_ddpm


def get_config() -> ConfigDict:
    return _methods.flow(digits_ddpm.get_config())
