"""What is likely not meant in a config: reported where it is used, and nothing is refused."""

import jax.numpy as jnp

from diffusion.model.config import Config, dtype_of
from diffusion.model.model import Model
from diffusion.model.sampling import is_trained_on, make_sampling

LARGEST_TERMINAL_SIGNAL = 1e-3  # alpha_bar_T; DDPM's own is 4e-5


def warnings_of(config: Config, model: Model) -> list[str]:
    """Returns what is likely not meant in a config, a line each."""
    found = []
    schedule = model.process.schedule
    if schedule is not None and (left := float(schedule.alpha_bar[-1])) > LARGEST_TERMINAL_SIGNAL:
        found.append(
            f"process.num_steps={config.process.num_steps} ends at alpha_bar_T = {left:.2g}: sampling starts from pure "
            "noise, which training never shows. Raise process.last, or choose process.beta=linear_for_steps"
        )
    if model.objective.by_time and (dtype := dtype_of(config)) != jnp.float32:
        found.append(
            f"network.dtype={dtype.name}: loss.name={config.loss.name} differentiates the network by time, which is "
            "noisy in so few digits: use float32"
        )
    if model.objective.by_time and (scale := model.process.time_scale) > 1:
        found.append(
            f"process.time_scale={scale:g} is a factor on the derivative by time that loss.name={config.loss.name} "
            "takes of the network: set it to 1"
        )
    if config.sampling.guidance != 1.0 and (model.objective.teacher or model.objective.guided):
        found.append(
            f"sampling.guidance={config.sampling.guidance:g} comes on top of what loss.name={config.loss.name} trains "
            "the network to have: set it to 1"
        )
    if model.objective.grids and not is_trained_on(model.objective, make_sampling(config, model.process).grid):
        found.append(
            f"sampling.num_steps={config.sampling.num_steps} on this grid: loss.name={config.loss.name} trained for "
            f"{config.loss.num_steps} steps of sampling.grid.name=uniform with shift {config.loss.shift:g}"
        )
    if config.sampling.guidance != 1.0 and config.condition.get("dropout") == 0:
        found.append(
            f"sampling.guidance={config.sampling.guidance:g} leads away from no condition, which condition.dropout=0 "
            "never shows in training"
        )
    if config.sampling.guidance == 1.0 and len(config.sampling.guidance_interval) == 2:
        found.append("sampling.guidance_interval changes nothing at sampling.guidance=1")
    if config.sampling.guidance == 1.0 and config.sampling.get("skip_layers"):
        found.append("sampling.skip_layers change nothing at sampling.guidance=1")
    return found


def warnings_of_training(config: Config, model: Model) -> list[str]:
    """Returns what is likely not meant in a config that is trained, a line each."""
    settings, num_steps = config.optimizer, config.training.num_steps
    warmup, cooldown = settings.get("warmup_steps", 0), settings.get("cooldown_steps", 0)
    found = []
    if cooldown and warmup + cooldown > num_steps:
        found.append(
            f"optimizer.cooldown_steps={cooldown} begins before the warm-up ends, at training.num_steps={num_steps}: "
            f"the learning rate reaches {num_steps / (warmup + cooldown):.0%} of optimizer.learning_rate"
        )
    return found + warnings_of(config, model)
