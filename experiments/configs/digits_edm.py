"""On the digits: the process, preconditioning, loss and sampler of EDM (Karras et al. 2022).

    ./launch.sh digits --config=experiments/configs/digits_edm.py

All else is digits_ddpm.py.
Not the paper's network (its DDPM++), augmentation, or training budget: those of the base config.
"""

from ml_collections import ConfigDict

from experiments.configs import digits_ddpm


def get_config() -> ConfigDict:
    config = digits_ddpm.get_config()
    config.process = ConfigDict(dict(name="edm"))
    config.loss.prediction = "F"
    config.loss.weighting = "edm"
    config.sampling.sampler = "heun"
    config.sampling.grid = "karras"
    config.sampling.num_steps = 18  # 35 network evaluations
    config.sampling.threshold = "none"
    return config
