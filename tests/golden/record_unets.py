"""Records published_unets.npz: tiny pipelines' folders as diffusers writes them, and what their networks compute.

Run with PyTorch, diffusers, JAX and Flax installed: `python tests/golden/record_unets.py`. It also opens what we write
for each of them with diffusers, and prints whether weights and outputs are the same.

For each case of CASES: files/CASE/PATH (bytes), CASE/x_t, CASE/time, CASE/label, CASE/output. Weights are random and
of 8 significant bits, so that they compress and are the same in float16, bfloat16 and float32.
"""

import pathlib
import shutil
import tempfile

import diffusers
import jax
import numpy as np
import torch
from record_unet import make_peer, outputs

from diffusion.pretrained.pipeline import load_chain, save_pipeline
from diffusion.pretrained.unet import load_unet

HERE = pathlib.Path(__file__).parent
TWO_LEVELS = dict(
    sample_size=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=4,
)
DDPM = dict(freq_shift=1, flip_sin_to_cos=False, downsample_padding=0, norm_eps=1e-6, attention_head_dim=None)
# For each case what differs from TWO_LEVELS, the scheduler, and how the folder is written.
CASES = {
    # Else diffusers' defaults: cosines first, frequencies short of 1 / 10,000, padding on every side, eps 1e-5.
    "defaults": ({}, diffusers.DDPMScheduler(), {}),
    "ddpm": (DDPM, diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"), dict(safe_serialization=False)),
    "scale_shift": (
        dict(resnet_time_scale_shift="scale_shift"),
        diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        {},
    ),
    # The architecture of ADM and of consistency models.
    "resnet_samplers": (
        dict(
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=2,
            num_class_embeds=3,
        ),
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        {},
    ),
    "no_multiples": (
        dict(
            block_out_channels=(4, 6, 10),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
        ),
        diffusers.DPMSolverMultistepScheduler(solver_order=3, solver_type="heun"),
        {},
    ),
    "down_only": (
        dict(up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=2, add_attention=False),
        diffusers.DDPMScheduler(4, trained_betas=[0.1, 0.2, 0.3, 0.5], prediction_type="sample"),
        {},
    ),
    "up_only": (
        dict(down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D")),
        diffusers.DDPMScheduler(500, beta_schedule="sigmoid", clip_sample_range=2.0, variance_type="fixed_large"),
        {},
    ),
    "classes": (
        dict(num_class_embeds=3, center_input_sample=True),
        diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5),
        {},
    ),
    "half": (
        {},
        diffusers.DDIMScheduler(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        dict(dtype=torch.float16, variant="fp16"),
    ),
    "bfloat16": (
        dict(flip_sin_to_cos=False),
        diffusers.UniPCMultistepScheduler(solver_order=1, prediction_type="v_prediction"),
        dict(dtype=torch.bfloat16),
    ),
    "shards": (dict(attn_norm_num_groups=4), diffusers.DDPMScheduler(), dict(max_shard_size="16KB")),
    "half_shards": (
        dict(freq_shift=1),
        diffusers.DDPMScheduler(clip_sample=False),
        dict(dtype=torch.float16, variant="fp16", max_shard_size="8KB"),
    ),
    "learned": (
        dict(sample_size=(8, 12), out_channels=6, downsample_padding=0, attention_head_dim=None),
        diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            timestep_spacing="linspace",
            steps_offset=1,
        ),
        {},
    ),
}


def save(case: str, folder: pathlib.Path) -> diffusers.UNet2DModel:
    """Writes the folder of a case, and returns its network in float32."""
    config, scheduler, options = CASES[case]
    peer = make_peer(TWO_LEVELS | config)
    for parameter in peer.parameters():
        parameter.data = (torch.round(128 * parameter.data) / 128).to(torch.bfloat16).float()
    options = dict(options)
    written = make_peer(TWO_LEVELS | config)
    written.load_state_dict(peer.state_dict())
    written.to(options.pop("dtype", torch.float32))
    shard = {"max_shard_size": options.pop("max_shard_size")} if "max_shard_size" in options else {}
    diffusers.DDPMPipeline(written, scheduler).save_pretrained(folder, **options)
    if shard:
        shutil.rmtree(folder / "unet")
        written.save_pretrained(folder / "unet", **options, **shard)
    return peer


def main():
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    arrays = {"versions": f"diffusers {diffusers.__version__}, torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as temporary:
        for case in CASES:
            theirs, ours = (pathlib.Path(temporary) / whose / case for whose in ("theirs", "ours"))
            peer = save(case, theirs)
            height, width = np.broadcast_to(peer.config.sample_size, 2)
            inputs = {
                "x_t": rng.randn(2, height, width, 3).astype(np.float32),
                "time": np.array([3.0, 877.0], np.float32),
            }
            if peer.config.num_class_embeds:
                inputs["label"] = np.array([2, 0])
            output = outputs(peer, **inputs)
            for path in sorted(theirs.rglob("*")):
                if path.is_file():
                    arrays[f"files/{case}/{path.relative_to(theirs)}"] = np.frombuffer(path.read_bytes(), np.uint8)
            arrays |= {f"{case}/{name}": array for name, array in inputs.items()} | {f"{case}/output": output}

            network, params, _ = load_unet(theirs)
            chain = load_chain(theirs)
            assert chain is not None
            here = np.asarray(jax.jit(network.apply)({"params": params}, **inputs))
            save_pipeline(ours, network, params, (int(height), int(width)), chain)
            again = diffusers.DDPMPipeline.from_pretrained(ours)
            there = again.unet.eval()
            state, before = there.state_dict(), peer.state_dict()
            same = state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
            betas = type(CASES[case][1]).from_pretrained(theirs / "scheduler").betas
            print(
                f"{case}: outputs of size {np.std(output):.2f} differ by {np.max(np.abs(here - output)):.1e}; "
                f"what we write has for diffusers the same bits {same}, betas "
                f"{torch.equal(again.scheduler.betas, betas)} and outputs "
                f"{np.max(np.abs(outputs(there, **inputs) - output)):.1e} away"
            )
    np.savez_compressed(HERE / "published_unets.npz", **arrays)


if __name__ == "__main__":
    main()
