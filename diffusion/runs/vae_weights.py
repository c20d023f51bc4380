"""Published autoencoders as runs of `experiments.autoencoder`, and its runs as folders that diffusers reads."""

from typing import Any

import jax

from diffusion.model import vae
from diffusion.model.config import Config
from diffusion.networks.vae import Autoencoder
from diffusion.pretrained.folder import weights_files
from diffusion.pretrained.vae import PublishedAutoencoder, load_vae, save_vae, vae_folder
from diffusion.runs.call import Call
from diffusion.runs.weights import published_folder, refuse_asked, write_run
from diffusion.training import RunError, run_key

# Of the network, what a config has fields for; of the rest a run has what is said here.
FIXED = {"image_channels": 3, "decoder_channels": None}


def import_weights(call: Call) -> None:
    """Makes --workdir a run that begins with the autoencoder in --weights, an AutoencoderKL's folder or a pipeline's.

    Its network, shift and scale are the folder's, all else the config's.
    """
    path = published_folder(call)
    found = load_vae(path, call.flags.variant)
    config = call.config.copy_and_resolve_references().unlock()
    describe(config, found)
    refuse_asked(call, path, config)
    learner = vae.make_learner(config)
    params = jax.jit(lambda key: others(learner.init(key)))(run_key(config.seed, "init"))
    params["autoencoder"] = {"params": found.params["params"]}
    files = weights_files(vae_folder(path), variant=call.flags.variant)
    write_run(call.workdir, call.task.name, config, learner, vae.abstract_batch(config), params, files, {})
    if jax.process_index() == 0:
        vae.write_latents(call.workdir, 0, vae.Latents(tuple(found.shift.tolist()), tuple(found.scale.tolist())))


def others(params: dict[str, Any]) -> dict[str, Any]:
    """Returns what is trained beside the autoencoder."""
    return {name: group for name, group in params.items() if name != "autoencoder"}


def describe(config: Config, found: PublishedAutoencoder) -> None:
    """Changes a config into that of a published autoencoder. Raises RunError for one that no config describes."""
    module: Autoencoder = found.module
    if found.patch != 1:
        raise RunError(f"its latents are normalised in patches of {found.patch}: experiments.autoencoder has none")
    for field, value in FIXED.items():
        if getattr(module, field) != value:
            raise RunError(f"{field} is {getattr(module, field)}: experiments.autoencoder has {value} alone")
    for field in config.network:
        if field != "dtype":
            value = getattr(module, field)
            config.network[field] = tuple(value) if field == "channels" else value


def export_weights(call: Call, trained: vae.Trained, latents: vae.Latents) -> None:
    """Writes the averaged weights with their shift and scale as the new folder --weights."""
    folder = published_folder(call)
    if jax.process_index() != 0:
        return
    save_vae(folder, vae.as_published(trained, latents))
    print(f"{folder}: the averaged weights of {call.workdir} after {trained.step} steps")
