"""On the digits: rectified flow with logit-normal times (Esser et al. 2024), sampled by Euler's method.

    ./launch.sh digits --config=experiments/configs/digits_flow.py

All else is digits_ddpm.py.
"""

from ml_collections import ConfigDict

from experiments.configs import digits_ddpm


def get_config() -> ConfigDict:
    config = digits_ddpm.get_config()
    config.process = ConfigDict(dict(name="flow"))
    config.loss.prediction = "velocity"
    config.loss.weighting = "none"
    config.loss.times = "logit_normal"
    config.sampling.sampler = "euler"
    config.sampling.shift = 1.0
    config.sampling.num_steps = 50
    config.sampling.threshold = "none"
    return config
