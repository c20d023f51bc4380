"""Records schedulers.npz: what diffusers' schedulers make of one fixed "network", step by step.

Recorded with diffusers 0.42.1 and PyTorch 2.13 on CPU, by `python tests/golden/record_schedulers.py` in an environment
that has both. tests/test_released_samplers.py has the same network (`toy_network`) and needs neither.

For each case: grid [3, N + 1] (signal, noise, time of each visited point), x_0_hats (what each evaluation of the
network means, before it is clipped; left out where there are 1000), x_0 (the result). All start at x_T * noise[0] of
the grid; noise[i] is drawn in step i.

Besides: beta/NAME, beta tables; times/FAMILY/SPACING/N, the times that N steps of 1000 visit.
"""

import pathlib

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm

SHAPE = (2, 2, 3, 2)  # PyTorch's order: the learned variance doubles axis 1
CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
STABLE_DIFFUSION = {**CHAIN, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def toy_network(x, time):
    """A smooth stand-in for a network: half linear, half not, and different at every time."""
    return 0.5 * x + 0.5 * torch.tanh(x + torch.sin(0.01 * torch.as_tensor(time, dtype=x.dtype)))


def toy_variance(x, time):
    return torch.cos(3 * x + 0.01 * torch.as_tensor(time, dtype=x.dtype))


def record(scheduler, num_steps, x_T, noise, process="preserving", eta=None, use_clipped_model_output=False):
    """`process` is "preserving" (signal^2 + noise^2 = 1), "exploding" (signal 1) or "flow" (signal 1 - noise)."""
    scheduler.set_timesteps(num_steps)
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas.double()
        signal = {"preserving": (1 + sigma**2) ** -0.5, "exploding": torch.ones_like(sigma), "flow": 1 - sigma}[process]
        level = sigma * signal if process == "preserving" else sigma
    else:
        final = getattr(scheduler, "final_alpha_cumprod", torch.ones(())).reshape(1)
        alpha_bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], final]).double()
        signal, level = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    time = torch.cat([scheduler.timesteps.double(), -torch.ones(1, dtype=torch.float64)])

    x = x_T * level[0].float()
    x_0_hats = []
    for i, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, t) if process == "exploding" else x
        output = toy_network(x_in, t)
        if scheduler.config.get("prediction_type") == "v_prediction":
            x_0_hats.append(signal[i].float() * x - level[i].float() * output)
        else:
            x_0_hats.append((x - level[i].float() * output) / (1 if process == "flow" else signal[i].float()))
        extra = {}
        if isinstance(scheduler, diffusers.DDPMScheduler):
            scheduling_ddpm.randn_tensor = lambda *_, i=i, **__: noise[i]
            if scheduler.config.variance_type == "learned_range":
                output = torch.cat([output, toy_variance(x_in, t)], dim=1)
        if isinstance(scheduler, diffusers.DDIMScheduler):
            clipped = {"use_clipped_model_output": use_clipped_model_output}
            extra = {"eta": eta, "variance_noise": noise[i], **clipped}
        x = scheduler.step(output, t, x, **extra).prev_sample
    # Heun's scheduler lists the points between first and last twice, once for each evaluation.
    visited = [i for i in range(len(time)) if i == 0 or time[i] != time[i - 1]]
    grid = torch.stack([signal, level, time])[:, visited].float()
    return {"grid": grid.numpy(), "x_0_hats": torch.stack(x_0_hats).numpy(), "x_0": x.numpy()}


def cases():
    """Name -> (scheduler, number of steps, keywords of `record`)."""

    def ddpm(variance, **config):
        # "leading" ends at t = 0: only there does this scheduler leave out the last step's noise, as Algorithm 2 does.
        return diffusers.DDPMScheduler(
            **CHAIN, **{"clip_sample": False, "timestep_spacing": "leading", "variance_type": variance, **config}
        )

    def dpm(order=2, **config):
        return diffusers.DPMSolverMultistepScheduler(**CHAIN, solver_order=order, **config)

    ddim = diffusers.DDIMScheduler(**CHAIN, clip_sample=False, timestep_spacing="trailing")
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": False}
    return {
        "ddpm_small": (ddpm("fixed_small"), 10, {}),
        "ddpm_large": (ddpm("fixed_large"), 10, {}),
        "ddpm_learned": (ddpm("learned_range"), 10, {}),
        "ddpm_large_1000": (ddpm("fixed_large"), 1000, {}),
        "ddpm_small_clip": (ddpm("fixed_small", clip_sample=True), 10, {}),
        "ddim_0": (ddim, 10, {"eta": 0.0}),
        "ddim_half": (ddim, 10, {"eta": 0.5}),
        "ddim_1": (ddim, 10, {"eta": 1.0}),
        "euler": (diffusers.EulerDiscreteScheduler(**CHAIN, use_karras_sigmas=True), 10, {"process": "exploding"}),
        "heun": (
            diffusers.HeunDiscreteScheduler(**CHAIN, use_karras_sigmas=True),
            10,
            {"process": "exploding"},
        ),
        "dpm_solver_pp_2": (diffusers.DPMSolverMultistepScheduler(**CHAIN, solver_order=2), 10, {}),
        "dpm_solver_pp_3": (diffusers.DPMSolverMultistepScheduler(**CHAIN, solver_order=3), 10, {}),
        "unipc_2": (diffusers.UniPCMultistepScheduler(**CHAIN, solver_order=2), 10, {}),
        "unipc_3": (diffusers.UniPCMultistepScheduler(**CHAIN, solver_order=3), 10, {}),
        "flow_euler": (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 10, {"process": "flow"}),
        # Published pipelines, as their schedulers space the steps and end.
        "ddpm_small_trailing": (ddpm("fixed_small", timestep_spacing="trailing"), 7, {}),
        "ddpm_small_linspace": (ddpm("fixed_small", timestep_spacing="linspace"), 7, {}),
        "ddim_clip": (diffusers.DDIMScheduler(**CHAIN), 10, {"eta": 0.0}),
        "ddim_clip_half": (diffusers.DDIMScheduler(**CHAIN), 10, {"eta": 0.5}),
        "ddim_clip_anew": (diffusers.DDIMScheduler(**CHAIN), 10, {"eta": 0.0, "use_clipped_model_output": True}),
        "ddim_stable_diffusion": (
            diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            10,
            {"eta": 0.0},
        ),
        "ddim_zero_snr": (diffusers.DDIMScheduler(**CHAIN, **zero_snr, timestep_spacing="trailing"), 10, {"eta": 0.0}),
        "dpm_solver_pp_heun": (dpm(solver_type="heun"), 10, {}),
        "dpm_solver_pp_3_of_20": (dpm(3), 20, {}),
        "dpm_solver_pp_leading": (dpm(timestep_spacing="leading", steps_offset=1), 10, {}),
        "dpm_solver_pp_sigma_min": (dpm(final_sigmas_type="sigma_min"), 10, {}),
        "dpm_solver_pp_3_sigma_min_of_16": (dpm(3, final_sigmas_type="sigma_min"), 16, {}),
    }


def tables():
    """Name -> a beta table, or the times of many numbers of steps."""
    sigmoid = diffusers.DDPMScheduler(**{**CHAIN, "beta_schedule": "sigmoid"})
    rescaled = diffusers.DDIMScheduler(**CHAIN, rescale_betas_zero_snr=True)
    found = {
        "beta/sigmoid": sigmoid.betas,
        "beta/sqrt_linear": diffusers.DDIMScheduler(**STABLE_DIFFUSION).betas,
        "beta/zero_snr": rescaled.betas,
    }
    for spacing in ("leading", "trailing", "linspace"):
        for n in (1, 2, 3, 7, 10, 15, 30, 50, 64, 333, 400, 999):
            for family, kind in (("ddim", diffusers.DDIMScheduler), ("dpm", diffusers.DPMSolverMultistepScheduler)):
                scheduler = kind(**CHAIN, timestep_spacing=spacing)
                scheduler.set_timesteps(n)
                found[f"times/{family}/{spacing}/{n}"] = scheduler.timesteps.short()
    return {name: table.numpy() for name, table in found.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    x_T, noise = torch.randn(SHAPE), torch.randn(1000, *SHAPE)
    arrays = {"x_T": x_T.numpy(), "noise": noise.numpy(), **tables()}
    for name, (scheduler, num_steps, keywords) in cases().items():
        for key, value in record(scheduler, num_steps, x_T, noise, **keywords).items():
            if key != "x_0_hats" or num_steps < 1000:
                arrays[f"{name}/{key}"] = value
    np.savez_compressed(pathlib.Path(__file__).with_name("schedulers.npz"), **arrays)
