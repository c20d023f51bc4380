"""Stable Diffusion 3 as a whole: an imported pipeline draws the pictures that diffusers draws from the same noise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import do_call, make_call
from PIL import Image
from published_sd3 import ASKED, GOLDEN, T5_LENGTH, noise, write_pipeline

from diffusion import editing
from diffusion.model.autoencoders import restore
from diffusion.model.model import parts, steered
from diffusion.model.sampling import make_sampling
from diffusion.model.warnings import warnings_of
from diffusion.runs import weights
from diffusion.runs.run import open_run
from diffusion.training import RunError
from experiments.sd3 import TASK

TINY = (
    "--config.network.dtype=float32",
    "--config.condition.dtype=float32",
    f"--config.condition.length={T5_LENGTH}",
    f"--config.sampling.num_steps={ASKED['steps']}",
)


def import_into(folder: Path, published: Path, *flags: str) -> Path:
    call = make_call(TASK, "sd3", folder, "--mode=import", f"--weights={published}", *TINY, *flags)
    weights.import_weights(call)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a tiny pipeline."""
    return write_pipeline(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """A run with the pipeline's files."""
    return import_into(tmp_path_factory.mktemp("run") / "sd3", published)


def draw(run, x_T, changes=None, use=lambda sampler, denoise, grid, x_T: sampler(denoise, x_T, grid)):
    """Returns pictures of the recorded prompts from given noise, floats in [0, 1]."""
    model, own = run.model, parts(run.model, run.params)
    sampling = make_sampling(run.change(changes or {}).config, model.process)
    tell = jax.jit(model.condition.of_request)
    told, fro = (tell(own.text, model.condition.read(ASKED[name])) for name in ("prompts", "negatives"))

    @jax.jit
    def drawn(params, told, fro, x_T):
        return use(sampling.sampler, steered(model, sampling, params, told, fro), sampling.grid, x_T)

    @jax.jit
    def decoded(space, x_0):  # as Space.decode does, which rounds to levels
        codec = restore(model.space.description)
        image = codec.decode(space["autoencoder"], x_0 / space["scale"] + space["shift"])
        return jnp.clip(image / 2 + 0.5, 0, 1)

    return np.asarray(decoded(own.space, drawn(run.params, told, fro, x_T)))


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("height, width", [(16, 16), (16, 24)])
def test_pictures_are_those_of_diffusers(imported, scale, height, width):
    run = open_run(imported, changes={"sampling.guidance": scale, "sampling.size": (height, width)})
    images = draw(run, noise(height, width))
    np.testing.assert_allclose(images, GOLDEN[f"all/{scale:g}/{height}x{width}"], atol=1e-3)


def test_a_pipeline_without_t5_draws_its_pictures(published, tmp_path):
    run = open_run(import_into(tmp_path / "run", published, "--config.condition.leave_out=('t5',)"))
    assert "t5" not in run.params["text"]
    np.testing.assert_allclose(draw(run, noise(16, 16)), GOLDEN["without_t5/7/16x16"], atol=1e-3)


def test_blocks_are_skipped_as_diffusers_does(imported):
    changes = {"sampling.guidance": 4.0, "sampling.skip_layers": (1,), "sampling.skip_interval": (0.2, 0.9)}
    skipped = draw(open_run(imported, changes=changes), noise(16, 16))
    np.testing.assert_allclose(skipped, GOLDEN["skipped"], atol=1e-3)


def test_pictures_from_pictures_are_those_of_diffusers(imported):
    begun, eps = (jnp.asarray(GOLDEN[f"img2img/{name}"].transpose(0, 2, 3, 1)) for name in ("begun", "eps"))
    run = open_run(imported)

    def use(sampler, denoise, grid, x_0):
        last = editing.last_steps(grid, ASKED["strength"])
        return sampler(denoise, last.signal[0] * x_0 + last.noise[0] * eps, last)

    np.testing.assert_allclose(draw(run, begun, use=use), GOLDEN["img2img"], atol=1e-3)


def test_more_devices_draw_the_same_pictures(imported):
    runs = [open_run(imported, num_devices=count) for count in (1, 2)]
    drawn = [run.sample(prompts=ASKED["prompts"], num_samples=4, seed=3) for run in runs]
    assert drawn[0].shape == (4, 16, 16, 3)
    one, two = (images.astype(int) for images in drawn)
    np.testing.assert_allclose(one, two, atol=1)  # sums are in another order


@pytest.mark.parametrize("mode", ["sample", "img2img", "inpaint", "interpolate", "progressive"])
def test_every_use_of_a_run_works_on_an_imported_one(imported, tmp_path, mode):
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    images = (f"--images={tmp_path / 'a.png'}",) if mode in ("img2img", "inpaint") else ()
    masks = ("--mask=right", "--resample=1") if mode == "inpaint" else ()
    prompts = [f"--prompt={prompt}" for prompt in ASKED["prompts"]]
    out = tmp_path / f"{mode}.npz"
    flags = ("--num_samples=2", "--config.sampling.num_steps=2", f"--out={out}", *images, *prompts)
    do_call(TASK, "sd3", imported, f"--mode={mode}", *masks, *flags)
    with np.load(out) as found:
        assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape[-3:] == (16, 16, 3)


def test_an_imported_run_is_not_trained_in_its_place(imported):
    with pytest.raises(RunError, match="is a published model, which is not trained further there"):
        make_call(TASK, "sd3", imported, "--config.data.dir=somewhere")
    with pytest.raises(RunError, match="without averages: leave --ema_length out"):
        open_run(imported, ema_length=0.1)
    with pytest.raises(ValueError, match="bits/dim are of pixels"):
        open_run(imported).likelihood(np.zeros((1, 16, 16, 3), np.uint8), prompts=["a"])


def test_an_unknown_variant_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.fp8\.safetensors cannot be read"):
        import_into(tmp_path / "run", published, "--variant=fp8")
    assert not (tmp_path / "run").exists()


def test_pictures_have_the_size_that_is_asked_for(imported):
    run = open_run(imported, num_devices=1)
    assert run.sample(prompts=["a"], num_samples=1, num_steps=1, size=(16, 24)).shape == (1, 16, 24, 3)
    assert run.sample(prompts=["a"], num_samples=1, num_steps=1).shape == (1, 16, 16, 3)
    wide = open_run(imported, num_devices=1, changes={"sampling.size": (16, 24), "sampling.num_steps": 1})
    at_once = run.sample(prompts=["a"], num_samples=1, num_steps=1, size=(16, 24))
    np.testing.assert_array_equal(wide.sample(prompts=["a"], num_samples=1), at_once)
    with pytest.raises(ValueError, match="have no whole latents"):
        run.sample(prompts=["a"], num_samples=1, size=(15, 24))
    for size in ((16,), (0, 16), (16.0, 16)):
        with pytest.raises(ValueError, match="give height and width"):
            run.sample(prompts=["a"], num_samples=1, size=size)


def test_layers_that_are_skipped_without_guidance_are_warned_of(imported):
    run = open_run(imported, changes={"sampling.skip_layers": (1,), "sampling.guidance": 1.0})
    assert warnings_of(run.config, run.model) == ["sampling.skip_layers change nothing at sampling.guidance=1"]
