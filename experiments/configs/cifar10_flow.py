"""On CIFAR-10: rectified flow with logit-normal times (Esser et al. 2024), sampled by Euler's method.

    python -m experiments.cifar10 --config=experiments/configs/cifar10_flow.py --workdir=runs/flow

All else is cifar10_ddpm.py. Not yet trained to the end here, so no score is given.
"""

from ml_collections import ConfigDict

from experiments.configs import cifar10_ddpm


def get_config() -> ConfigDict:
    config = cifar10_ddpm.get_config()
    config.process = ConfigDict(dict(name="flow"))
    config.loss.prediction = "velocity"
    config.loss.weighting = "none"
    config.loss.times = "logit_normal"
    config.sampling.sampler = "euler"
    config.sampling.shift = 1.0
    config.sampling.num_steps = 100
    config.sampling.threshold = "none"
    return config
