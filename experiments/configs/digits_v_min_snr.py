"""On the digits: v-prediction (Salimans & Ho 2022) weighted by min-SNR-5 (Hang et al. 2023).

    ./launch.sh digits --config=experiments/configs/digits_v_min_snr.py

All else is digits_ddpm.py.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, digits_ddpm


def get_config() -> ConfigDict:
    return _methods.v_min_snr(digits_ddpm.get_config())
