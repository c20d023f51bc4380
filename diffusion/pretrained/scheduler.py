"""DDPM chains <-> the scheduler_config.json of diffusers.

A published file says how the network was trained and how its authors sampled it. Files of other schedulers (DDIM, PNDM,
DPM-Solver, ...) describe the same training chain; those of their own settings that our samplers do not honour are in
`Chain.left_out`, for the caller to report. Whatever else cannot be honoured is refused by name.
"""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion.pretrained.strict import few


class Chain(NamedTuple):
    """A DDPM chain, what its network predicts and how it is sampled, in the words of our configs.

    Attributes:
      num_steps: T.
      beta: "linear", "sqrt_linear" (linear in the square root), "cosine", "sigmoid", or "table".
      first, last: beta_1 and beta_T; not of "cosine" and "table".
      prediction: "eps", "x_0" or "v".
      variance: "small", "large" or "learned".
      clip: whether x_0_hat is clipped to [-clip_range, clip_range] at every step.
      table: beta_1..beta_T of "table".
      zero_terminal_snr: whether the betas are rescaled so that alpha_bar_T is 0 (Lin et al. 2023, Algorithm 1).
      clip_range: see `clip`.
      dynamic: whether x_0_hat is thresholded dynamically instead: clipped to [-s, s] and divided by s, the quantile of
        |x_0_hat| within [1, dynamic_max] (Saharia et al. 2022).
      dynamic_quantile, dynamic_max: see `dynamic`.
      spacing: which of the T steps fewer steps visit: "leading", "trailing" or "linspace" (Lin et al. 2023, table 2).
      steps_offset: added to the times of "leading".
      final: what the last step ends in: "zero", clean data, or "sigma_min", the noise of t = 1.
      sampler: of ours, "ancestral", "ddim", "dpm_solver_pp" or "unipc"; None where none of ours is the published one.
      settings: arguments of `sampler`, but for the variance.
      left_out: the published sampler's own settings that `sampler` does not honour, by diffusers' names.
    """

    num_steps: int = 1000
    beta: str = "linear"
    first: float = 1e-4
    last: float = 0.02
    prediction: str = "eps"
    variance: str = "large"
    clip: bool = True
    table: tuple[float, ...] = ()
    zero_terminal_snr: bool = False
    clip_range: float = 1.0
    dynamic: bool = False
    dynamic_quantile: float = 0.995
    dynamic_max: float = 1.0
    spacing: str = "leading"
    steps_offset: int = 0
    final: str = "zero"
    sampler: str | None = "ancestral"
    settings: Mapping[str, Any] = {}
    left_out: Mapping[str, Any] = {}


class _Scheduler(NamedTuple):
    """What a scheduler's class does where its file is silent, and its own settings: how it samples.

    Attributes:
      sampler: ours that computes the same.
      clips: whether x_0_hat is clipped; None for a class that never clips.
      spacing: see `Chain`.
      own: settings by name with the values that our sampler honours.
    """

    sampler: str | None
    clips: bool | None = None
    spacing: str = "linspace"
    own: Mapping[str, tuple[Any, ...]] = {}


_SIGMAS: dict[str, tuple[Any, ...]] = dict(
    use_karras_sigmas=(False, None),
    use_exponential_sigmas=(False, None),
    use_beta_sigmas=(False, None),
    sigma_min=(None,),
    sigma_max=(None,),
)
_MULTISTEP: dict[str, tuple[Any, ...]] = _SIGMAS | dict(
    algorithm_type=("dpmsolver++",),
    solver_type=("midpoint", "heun"),
    lower_order_final=(True,),
    euler_at_final=(False,),
    use_lu_lambdas=(False,),
    lambda_min_clipped=(float("-inf"),),
    predict_x0=(True,),
    disable_corrector=([],),
    solver_p=(None,),
    shift_terminal=(None,),
)
_EULER = _SIGMAS | dict(interpolation_type=("linear",), timestep_type=("discrete",))
_SCHEDULERS = {
    "DDPMScheduler": _Scheduler("ancestral", True, "leading"),
    "DDIMScheduler": _Scheduler("ddim", True, "leading"),
    "PNDMScheduler": _Scheduler(None, None, "leading", dict(skip_prk_steps=())),
    "DPMSolverMultistepScheduler": _Scheduler("dpm_solver_pp", own=_MULTISTEP),
    "UniPCMultistepScheduler": _Scheduler("unipc", own=_MULTISTEP | dict(solver_type=("bh2",))),
    "DPMSolverSinglestepScheduler": _Scheduler(None, own=dict.fromkeys(_MULTISTEP, ())),
    "DEISMultistepScheduler": _Scheduler(None, own=dict.fromkeys(_MULTISTEP, ())),
    "EulerDiscreteScheduler": _Scheduler(None, own=dict.fromkeys(_EULER, ())),
    "EulerAncestralDiscreteScheduler": _Scheduler(None, own=dict.fromkeys(_EULER, ())),
    "HeunDiscreteScheduler": _Scheduler(None, False, own=dict.fromkeys(_EULER, ())),
}
_FIRST_NAME = "GaussianDDPMScheduler"  # of the first revisions of published folders
_EVERY_OWN = {name for scheduler in _SCHEDULERS.values() for name in scheduler.own}
_ALPHA_TO_ONE = ("DDIMScheduler", "PNDMScheduler")  # call set_alpha_to_one what others call final_sigmas_type
# Our words -> diffusers'.
_BETA = {"linear": "linear", "sqrt_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
_PREDICTION = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_VARIANCE = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
_SPACING = {name: name for name in ("leading", "trailing", "linspace")}
_FINAL = {name: name for name in ("zero", "sigma_min")}
# Names of 2022 for fields of today.
_OLD_FIELDS = {"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"}
# Fields that mean another process or chain unless they have these values; of some schedulers, or of 2022.
_ONLY: dict[str, tuple[Any, ...]] = dict(
    timestep_values=(None,),
    use_flow_sigmas=(False, None),
    use_dynamic_shifting=(False, None),
    flow_shift=(1.0, None),
    time_shift_type=("exponential",),
    tensor_format=("np", "pt", None),
)


def chain_of(config: Mapping[str, Any]) -> Chain:
    """Returns the chain that a scheduler's config describes.

    Raises:
      ValueError: naming the setting that is not a DDPM chain's as ours are.
    """
    name = config.get("_class_name", "DDPMScheduler")
    name = "DDPMScheduler" if name == _FIRST_NAME else name
    if name not in _SCHEDULERS:
        raise ValueError(
            f"it is of a {few([str(name)])}, which does not describe a DDPM chain: choose from {', '.join(_SCHEDULERS)}"
        )
    scheduler = _SCHEDULERS[name]
    fields = {_OLD_FIELDS.get(field, field): value for field, value in config.items() if not field.startswith("_")}
    if "predict_epsilon" in fields:
        fields.setdefault("prediction_type", "epsilon" if fields.pop("predict_epsilon") is True else "sample")

    def take(field: str, default: Any) -> Any:
        value = fields.pop(field, default)
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(f"{field} is {reprlib.repr(value)}: it must be like {default!r}")
        return value

    def word(field: str, default: str, ours: Mapping[str, str]) -> str:
        value = fields.pop(field, default)
        for word, theirs in ours.items():
            if theirs == value:
                return word
        raise ValueError(f"{field} is {reprlib.repr(value)}, and ours is only {', '.join(ours.values())}")

    variance = fields.pop("variance_type", None) or "fixed_small"
    # Two ways to compute one number.
    fields["variance_type"] = "fixed_small" if variance == "fixed_small_log" else variance
    clips = take("clip_sample", bool(scheduler.clips))
    table = fields.pop("trained_betas", None)
    order = take("solver_order", 2)
    # Diffusers keeps the settings of one scheduler in the file of another that is made from it, and ignores them.
    own = {field: fields.pop(field) for field in list(fields) if field in _EVERY_OWN}
    left_out = {
        field: value
        for field, value in sorted(own.items())
        if field in scheduler.own and value not in scheduler.own[field]
    }
    solver_type = "midpoint" if "solver_type" in left_out else own.get("solver_type", "midpoint")
    settings = {
        "dpm_solver_pp": {"order": order, "solver_type": solver_type, "as_released": True},
        "unipc": {"order": order},
    }
    ends_clean = take("set_alpha_to_one", name != "PNDMScheduler")
    final = word("final_sigmas_type", "zero", _FINAL)
    chain = Chain(
        num_steps=take("num_train_timesteps", 1000),
        beta=word("beta_schedule", "linear", _BETA),
        first=take("beta_start", 0.00085 if name == "HeunDiscreteScheduler" else 1e-4),
        last=take("beta_end", 0.012 if name == "HeunDiscreteScheduler" else 0.02),
        prediction=word("prediction_type", "epsilon", _PREDICTION),
        variance=word("variance_type", "fixed_small", _VARIANCE),
        clip=clips and scheduler.clips is not None,
        zero_terminal_snr=take("rescale_betas_zero_snr", False),
        clip_range=take("clip_sample_range", 1.0),
        dynamic=take("thresholding", False),
        dynamic_quantile=take("dynamic_thresholding_ratio", 0.995),
        dynamic_max=take("sample_max_value", 1.0),
        spacing=word("timestep_spacing", scheduler.spacing, _SPACING),
        steps_offset=take("steps_offset", 0),
        final=("zero" if ends_clean else "sigma_min") if name in _ALPHA_TO_ONE else final,
        sampler=scheduler.sampler,
        settings=settings.get(scheduler.sampler or "", {}),
        left_out=left_out,
    )
    for field, value in fields.items():
        if field not in _ONLY or value not in _ONLY[field]:
            raise ValueError(f"{few([field])}={reprlib.repr(value)} cannot be honoured")
    chain = chain if table is None else chain._replace(beta="table", table=_table(table, chain.num_steps))
    _check(chain)
    return chain


def _table(betas: Any, num_steps: int) -> tuple[float, ...]:
    if not isinstance(betas, list) or any(type(beta) not in (int, float) for beta in betas):
        raise ValueError(f"trained_betas is {reprlib.repr(betas)}: it must be a list of numbers")
    if len(betas) != num_steps:
        raise ValueError(f"trained_betas has {len(betas)} numbers for num_train_timesteps={num_steps}")
    return tuple(map(float, betas))


def _check(chain: Chain) -> None:
    """Raises ValueError, in diffusers' words, for numbers that no chain has."""
    betas = chain.table if chain.beta == "table" else (chain.first, chain.last)
    name = "trained_betas" if chain.beta == "table" else "beta_start and beta_end"
    for fine, what in [
        (chain.num_steps >= 1, f"num_train_timesteps is {chain.num_steps}: it must be at least 1"),
        (all(0 < beta < 1 for beta in betas), f"{name} must lie in (0, 1)"),
        (chain.clip_range > 0, f"clip_sample_range is {chain.clip_range}: it must be positive"),
        (0 < chain.dynamic_quantile <= 1, f"dynamic_thresholding_ratio is {chain.dynamic_quantile}: not in (0, 1]"),
        (chain.dynamic_max >= 1, f"sample_max_value is {chain.dynamic_max}: it must be at least 1"),
        (0 <= chain.steps_offset < chain.num_steps, f"steps_offset is {chain.steps_offset}: it leaves the chain"),
        (
            not chain.zero_terminal_snr or chain.prediction != "eps",
            "rescale_betas_zero_snr excludes prediction_type='epsilon': where the signal is 0 no x_0 follows from eps",
        ),
        (chain.settings.get("order", 1) in (1, 2, 3), f"solver_order is {chain.settings.get('order')}: not 1, 2 or 3"),
    ]:
        if not fine:
            raise ValueError(what)


def scheduler_of(chain: Chain) -> dict[str, Any]:
    """Returns the config of the DDPMScheduler of a chain, whatever `chain.sampler` is.

    Raises:
      ValueError: a chain that a DDPMScheduler cannot be.
    """
    words = {"prediction": _PREDICTION, "variance": _VARIANCE, "spacing": _SPACING}
    words |= {} if chain.beta == "table" else {"beta": _BETA}
    for field, known in words.items():
        if getattr(chain, field) not in known:
            raise ValueError(
                f"diffusers' DDPMScheduler has no {field} {getattr(chain, field)!r}, only {', '.join(known)}"
            )
    _check(chain)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": chain.num_steps,
        "beta_schedule": _BETA.get(chain.beta, "linear"),
        "beta_start": chain.first,
        "beta_end": chain.last,
        "trained_betas": list(chain.table) if chain.beta == "table" else None,
        "prediction_type": _PREDICTION[chain.prediction],
        "variance_type": _VARIANCE[chain.variance],
        "clip_sample": chain.clip,
        "clip_sample_range": chain.clip_range,
        "thresholding": chain.dynamic,
        "dynamic_thresholding_ratio": chain.dynamic_quantile,
        "sample_max_value": chain.dynamic_max,
        "timestep_spacing": chain.spacing,
        "steps_offset": chain.steps_offset,
        "rescale_betas_zero_snr": chain.zero_terminal_snr,
    }
