"""What each method changes of a DDPM config, whatever the data; the configs of that name apply it."""

from ml_collections import ConfigDict


def cosine_hybrid(config: ConfigDict) -> ConfigDict:
    """Nichol & Dhariwal (2021): the cosine schedule, learned variances and L_hybrid."""
    config.process.beta = "cosine"
    config.loss.learned_variance = True
    config.sampling.variance = "learned"
    return config


def v_min_snr(config: ConfigDict) -> ConfigDict:
    """Salimans & Ho (2022) and Hang et al. (2023): v-prediction weighted by min-SNR-5."""
    config.loss.prediction = "v"
    config.loss.weighting = "min_snr"
    return config


def edm(config: ConfigDict) -> ConfigDict:
    """Karras et al. (2022): the variance-exploding process, preconditioning, loss, sampler and grid."""
    config.process = ConfigDict(dict(name="edm"))
    config.loss.prediction = "F"
    config.loss.weighting = "edm"
    config.sampling.sampler = "heun"
    config.sampling.grid = "karras"
    config.sampling.num_steps = 18  # 35 network evaluations
    config.sampling.threshold = "none"
    return config


def flow(config: ConfigDict) -> ConfigDict:
    """Esser et al. (2024): rectified flow with logit-normal times, sampled by Euler's method."""
    config.process = ConfigDict(dict(name="flow"))
    config.loss.prediction = "velocity"
    config.loss.weighting = "none"
    config.loss.times = "logit_normal"
    config.sampling.sampler = "euler"
    config.sampling.shift = 1.0
    config.sampling.num_steps = 50
    config.sampling.threshold = "none"
    return config


def class_conditional(config: ConfigDict) -> ConfigDict:
    """Ho & Salimans (2022): classes, dropped in a tenth of the examples, and guidance towards them."""
    config.network.class_conditional = True
    config.sampling.guidance = 1.5
    return config
