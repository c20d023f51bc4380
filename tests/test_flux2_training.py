"""A tiny FLUX.2 [klein], fine-tuned whole or by adapters, with and without pictures to edit, and exported."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import do_call, make_call, write_pairs
from published_flux2 import REFERENCES, noise, write_pipeline
from safetensors.numpy import load_file
from test_flux2_pipeline import CELL, ASKED, import_into

from diffusion.model.autoencoders import restore
from diffusion.model.model import make_generate
from diffusion.model.sampling import make_sampling
from diffusion.pretrained.lora import FILE, save_lora
from diffusion.runs.adapters import with_lora
from diffusion.runs.pictures import fit_reference
from diffusion.runs.run import open_run
from experiments.flux2 import TASK

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "lora_flux2.npz")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder of a run with the files of a tiny distilled pipeline."""
    published = write_pipeline(tmp_path_factory.mktemp("published"))
    return import_into(tmp_path_factory.mktemp("run") / "klein", published)


@pytest.fixture(scope="module")
def base(imported):
    return open_run(imported, num_devices=1)


def draw(run, references=REFERENCES[:1]):
    """Returns pictures of the recorded prompts from the recorded noise, floats in [0, 1]."""
    x_T, codec = jnp.asarray(noise(16, 16)), restore(run.model.space.description)

    def decode(space, x_0):
        return jnp.clip(codec.decode(space["autoencoder"], x_0 / space["scale"] + space["shift"]) / 2 + 0.5, 0, 1)

    model = run.model._replace(space=run.model.space._replace(decode=decode))
    use = lambda sampler, denoise, grid, keys, eps: sampler(denoise, x_T, grid, keys)  # noqa: E731
    generate = make_generate(model, make_sampling(run.config, model.process), run.mesh, use)
    rows, away = (model.condition.read(prompts) for prompts in (ASKED["prompts"], [None, None]))
    seen = [np.stack([fit_reference(image, CELL)] * 2) for image in references]
    return np.asarray(generate(run.params, rows, away, np.uint32(0), np.arange(2), references=seen)[0])


def test_adapters_of_diffusers_draw_its_picture(base, tmp_path):
    file = tmp_path / "peer" / FILE
    file.parent.mkdir()
    file.write_bytes(GOLDEN["adapters"].tobytes())
    adapted = with_lora(base, file.parent)
    assert set(adapted.params["lora"]["double_0"]) == {
        "image_qkv", "image_out", "text_qkv", "text_out", "image_mlp_1", "image_mlp_2"
    }  # fmt: skip
    assert set(adapted.params["lora"]["single_1"]) == {"parallel_in"}
    images = draw(adapted)
    np.testing.assert_allclose(images, GOLDEN["picture"], atol=1e-3)
    # For `record_lora_flux2.py FOLDER`, by which diffusers draws what we do with the file that we write.
    written = save_lora(tmp_path / "ours", base.model.network, adapted.params["lora"], 1.0)
    np.save(written.with_name("picture.npy"), images)
    assert load_file(file).keys() <= load_file(written).keys()
