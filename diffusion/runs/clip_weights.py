"""Published CLIPs as runs of `experiments.clip`, and its runs as folders that transformers reads."""

import jax
import jax.numpy as jnp

from diffusion.data import text
from diffusion.evaluation.clip_features import OPENAI_MEAN, OPENAI_STD
from diffusion.model import clip as contrastive_model
from diffusion.model.config import Config
from diffusion.model.fields import retype
from diffusion.networks.clip import CLIP
from diffusion.pretrained.clip import load_clip, load_normalisation, save_clip
from diffusion.pretrained.folder import weights_files
from diffusion.runs.call import Call
from diffusion.runs.weights import published_folder, write_run
from diffusion.training import RunError


def import_weights(call: Call) -> None:
    """Makes --workdir a run that begins with the weights, the vocabulary and the normalisation of folder --weights.

    What its towers are is the folder's, all else the config's: the data of --mode=evaluate may be named now or then.
    """
    folder = published_folder(call)
    config = call.config.copy_and_resolve_references().unlock()
    clip, params = load_clip(folder, jnp.dtype(config.network.dtype))
    tokenizer = text.read_tokenizer(folder)
    size = tokenizer.get_vocab_size()
    if size != clip.text.vocabulary_size:
        raise RunError(
            f"the tokenizer in {folder} has {size} tokens, the weights {clip.text.vocabulary_size}: use the tokenizer "
            "files that were published with these weights"
        )
    text.check_vocabulary(tokenizer, clip.text.vocabulary_size, clip.text.end_of_text)
    describe(config, clip)
    config.data.mean, config.data.std = load_normalisation(folder) or (OPENAI_MEAN, OPENAI_STD)
    clip = contrastive_model.make_clip(config, tokenizer)
    write_run(
        call.workdir,
        call.task.name,
        config,
        contrastive_model.make_dataless(config, clip),
        contrastive_model.abstract_batch(config),
        params,
        weights_files(folder, "model"),
        {"vocabulary": text.to_json(tokenizer)},
    )


def describe(config: Config, clip: CLIP) -> None:
    """Changes a config into that of these towers. Raises RunError if they differ in what a run has once for both."""
    image, read = clip.image, clip.text
    if image.activation != read.activation:
        raise RunError(f"towers with {image.activation} and {read.activation}: a run has one activation for both")
    for name in config.network.image:
        config.network.image[name] = getattr(image, name)
    for name in config.network.text:
        config.network.text[name] = getattr(read, name)
    config.network.projection, config.network.activation = image.projection, image.activation
    retype(config, "data.image_size", isinstance(image.image_size, tuple))
    config.data.image_size, config.text.length = image.image_size, read.length
    config.loss.name = "softmax"


def export_weights(call: Call) -> None:
    """Writes the averaged weights, the vocabulary and the normalisation of --workdir as the new folder --weights."""
    folder = published_folder(call)
    trained = contrastive_model.open_clip(call.workdir, call.mesh, call.flags.checkpoint)
    if jax.process_index() != 0:
        return
    normalisation = call.config.data.mean, call.config.data.std
    save_clip(folder, trained.clip, jax.device_get(trained.params), text.to_json(trained.tokenizer), normalisation)
    print(f"{folder}: the averaged weights of {call.workdir} after {trained.step} steps")
