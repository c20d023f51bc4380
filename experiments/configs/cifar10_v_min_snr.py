"""On CIFAR-10: v-prediction (Salimans & Ho 2022) weighted by min-SNR-5 (Hang et al. 2023).

    python -m experiments.cifar10 --config=experiments/configs/cifar10_v_min_snr.py --workdir=runs/v_min_snr

All else is cifar10_ddpm.py. Not yet trained to the end here, so no score is given.
"""

from ml_collections import ConfigDict

from experiments.configs import _methods, cifar10_ddpm


def get_config() -> ConfigDict:
    return _methods.v_min_snr(cifar10_ddpm.get_config())
