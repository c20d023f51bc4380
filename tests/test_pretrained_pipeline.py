"""Published chains: what diffusers' scheduler files say, there and back, and what is refused by name."""

import json

import pytest
from published_folders import NAMES, write_folder

from diffusion.pretrained.pipeline import load_chain, load_pipeline, save_pipeline
from diffusion.pretrained.scheduler import Chain
from diffusion.pretrained.unet import load_unet

SCHEDULER = "scheduler/scheduler_config.json"
SMALL = Chain(variance="small")  # what diffusers' DDPMScheduler is without arguments
# What the arguments of record_unets.py say, in our words.
EXPECTED = {
    "defaults": SMALL,
    "ddpm": SMALL._replace(beta="cosine"),
    "scale_shift": SMALL._replace(beta="sqrt_linear", first=0.00085, last=0.012, sampler="ddim"),
    "resnet_samplers": SMALL._replace(
        clip=False, steps_offset=1, final="sigma_min", sampler=None, left_out={"skip_prk_steps": True}
    ),
    "no_multiples": SMALL._replace(
        clip=False,
        spacing="linspace",
        sampler="dpm_solver_pp",
        settings={"order": 3, "solver_type": "heun", "as_released": True},
    ),
    "down_only": SMALL._replace(num_steps=4, beta="table", table=(0.1, 0.2, 0.3, 0.5), prediction="x_0"),
    "up_only": Chain(num_steps=500, beta="sigmoid", clip_range=2.0),
    "classes": SMALL._replace(dynamic=True, dynamic_quantile=0.9, dynamic_max=1.5),
    "half": SMALL._replace(zero_terminal_snr=True, prediction="v", spacing="trailing", sampler="ddim"),
    "bfloat16": SMALL._replace(clip=False, prediction="v", spacing="linspace", sampler="unipc", settings={"order": 1}),
    "shards": SMALL,
    "half_shards": SMALL._replace(clip=False),
    "learned": Chain(beta="cosine", variance="learned", spacing="linspace", steps_offset=1),
}
# The file of google/ddpm-cifar10-32's first revision has these names and lies at the root; the values are others.
FIRST = {
    "_class_name": "GaussianDDPMScheduler",
    "beta_end": 0.03,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.001,
    "clip_predicted_image": False,
    "tensor_format": "np",
    "timesteps": 500,
    "timestep_values": None,
    "variance_type": "fixed_large",
    "predict_epsilon": False,
}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "theirs")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", NAMES)
def test_schedulers_that_diffusers_wrote(tmp_path, case):
    assert load_chain(write_folder(tmp_path, case)) == EXPECTED[case]


def test_a_whole_pipeline(tmp_path):
    folder = write_folder(tmp_path, "learned")
    published = load_pipeline(folder)
    assert published.chain == EXPECTED["learned"] and published.image_shape == (8, 12, 3)
    assert published.network == load_unet(folder)[0]
    assert load_pipeline(folder / "unet").chain is None
    change(folder / SCHEDULER, variance_type="fixed_small")
    with pytest.raises(ValueError, match="from 3 to 6 channels does not fit a scheduler whose variance is small"):
        load_pipeline(folder)
    change(folder / "unet" / "config.json", sample_size=None)
    assert load_pipeline(folder / "unet", image_size=(8, 12)).image_shape == (8, 12, 3)


def test_all_at_the_root_and_the_names_of_2022(folder):
    expected = Chain(500, "cosine", 0.001, 0.03, prediction="x_0", clip=False)
    network = load_unet(folder)[0]
    (folder / SCHEDULER).unlink()
    (folder / "scheduler").rmdir()
    for file in list((folder / "unet").iterdir()):
        file.rename(folder / file.name)
    (folder / "unet").rmdir()
    assert load_unet(folder)[0] == network
    (folder / "scheduler_config.json").write_text(json.dumps(FIRST))
    assert load_chain(folder) == expected
    change(folder / "scheduler_config.json", _class_name="DDPMScheduler")
    assert load_chain(folder) == expected
    # The earliest had no choice: they clip, and predict eps.
    silent = {
        field: value for field, value in FIRST.items() if field not in ("clip_predicted_image", "predict_epsilon")
    }
    (folder / "scheduler_config.json").write_text(json.dumps(silent))
    assert load_chain(folder) == expected._replace(clip=True, prediction="eps")


def test_a_folder_without_a_scheduler_has_no_chain(folder):
    assert load_chain(folder / "unet") is None
    (folder / SCHEDULER).unlink()
    with pytest.raises(ValueError, match=r"cannot read \S+scheduler_config\.json"):
        load_chain(folder)
    (folder / "scheduler").rmdir()
    assert load_chain(folder) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"beta_schedule": "laplace"},
        {"prediction_type": "flow_prediction"},
        {"prediction_type": ["epsilon"]},
        {"variance_type": "learned"},
        {"variance_type": "fixed_large_log"},
        {"timestep_spacing": "quadratic"},
        {"trained_betas": [0.1]},
        {"trained_betas": ["0.1"] * 1000},
        {"trained_betas": [0.1] * 999 + [1.0]},
        {"beta_start": 0.0},
        {"beta_end": float("nan")},
        {"clip_sample_range": -1.0},
        {"dynamic_thresholding_ratio": 1.5},
        {"sample_max_value": 0.5},
        {"steps_offset": -1},
        {"steps_offset": 1000},
        {"rescale_betas_zero_snr": True},  # with eps: where the signal is 0 it says nothing of x_0
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": True},
        {"clip_sample": 1},
        {"set_alpha_to_one": "yes"},
        {"final_sigmas_type": "half"},
        {"use_flow_sigmas": True},
        {"timestep_values": [1, 2]},
        {"noise": list(range(5000))},
        {"x" * 5000: 1},
    ],
)
def test_chains_that_are_not_ours_are_refused_by_name(folder, fields):
    (field,) = fields
    change(folder / SCHEDULER, **fields)
    with pytest.raises(ValueError, match=field[:100]) as error:
        load_chain(folder)
    assert SCHEDULER in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_orders_that_no_solver_has(folder):
    change(folder / SCHEDULER, _class_name="UniPCMultistepScheduler", solver_order=4)
    with pytest.raises(ValueError, match="solver_order is 4: not 1, 2 or 3"):
        load_chain(folder)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "KarrasVeScheduler", "LCMScheduler", None])
def test_schedulers_of_other_processes_are_refused_by_name(folder, name):
    change(folder / SCHEDULER, _class_name=name)
    with pytest.raises(ValueError, match=f"is of a {name}, which does not describe a DDPM chain"):
        load_chain(folder)


def test_settings_of_other_samplers_that_a_file_carries_along_change_nothing(folder):
    """Diffusers keeps them in a file when one scheduler is made from another, and its class ignores them."""
    before = load_chain(folder)
    assert before is not None
    change(folder / SCHEDULER, skip_prk_steps=True, set_alpha_to_one=False, algorithm_type="deis", solver_order=3)
    assert load_chain(folder) == before
    change(folder / SCHEDULER, _class_name="PNDMScheduler")
    chain = load_chain(folder)
    # This one never clips.
    assert chain is not None
    assert (chain.sampler, chain.clip, chain.final) == (None, False, "sigma_min")
    assert chain.left_out == {"skip_prk_steps": True}
    # This one has an algorithm that ours is not, and ends where it is told to.
    fields = {"solver_type": "logrho", "final_sigmas_type": "sigma_min", "clip_sample": False}
    change(folder / SCHEDULER, _class_name="DPMSolverMultistepScheduler", **fields)
    chain = load_chain(folder)
    assert chain is not None
    assert (chain.sampler, chain.final) == ("dpm_solver_pp", "sigma_min")
    assert chain.settings == {"order": 3, "solver_type": "midpoint", "as_released": True}
    assert chain.left_out == {"algorithm_type": "deis", "solver_type": "logrho"}


def test_chains_there_and_back(tmp_path, folder):
    network, params, _ = load_unet(folder)
    chains = [
        Chain(300, "cosine", variance="small"),
        Chain(prediction="v", clip=False, zero_terminal_snr=True),
        Chain(3, "table", prediction="x_0", table=(0.1, 0.25, 0.5), spacing="trailing"),
        Chain(beta="sqrt_linear", clip_range=3.0, spacing="linspace", steps_offset=1),
        Chain(beta="sigmoid", dynamic=True, dynamic_quantile=0.9, dynamic_max=2.0),
    ]
    for number, chain in enumerate(chains):
        save_pipeline(tmp_path / str(number), network, params, 32, chain)
        assert load_chain(tmp_path / str(number)) == chain
    for number, (chain, message) in enumerate(
        [
            (Chain(prediction="F"), "no prediction 'F'"),
            (Chain(beta="vp"), "no beta 'vp'"),
            (Chain(spacing="uniform"), "no spacing 'uniform'"),
            (Chain(zero_terminal_snr=True), "rescale_betas_zero_snr"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            save_pipeline(tmp_path / f"refused_{number}", network, params, 32, chain)
        assert not (tmp_path / f"refused_{number}").exists()
