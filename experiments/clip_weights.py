"""Published CLIPs as runs of `experiments.clip`, and its runs as folders that transformers reads."""

from pathlib import Path

import jax
import jax.numpy as jnp

from diffusion.data import text
from diffusion.evaluation.clip_features import OPENAI_MEAN, OPENAI_STD
from diffusion.networks.clip import CLIP
from diffusion.pretrained.clip import load_clip, load_normalisation, save_clip
from diffusion.pretrained.folder import weights_file
from diffusion.training import RunError
from experiments import image_text
from experiments.command_line import Config, Run
from experiments.imported import write_run


def import_weights(run: Run) -> None:
    """Makes --workdir a run that begins with the weights, the vocabulary and the normalisation of folder --weights.

    What its towers are is the folder's, all else the config's: the data of --mode=evaluate may be named now or then.
    """
    folder, config = _folder(run), run.config
    clip, params = load_clip(folder, jnp.dtype(config.network.dtype))
    tokenizer = text.read_tokenizer(folder)
    size = tokenizer.get_vocab_size()
    if size != clip.text.vocabulary_size:
        raise RunError(
            f"the tokenizer in {folder} has {size} tokens, the weights {clip.text.vocabulary_size}: take the tokenizer "
            "files that came with these weights"
        )
    text.check_vocabulary(tokenizer, clip.text.vocabulary_size, clip.text.end_of_text)
    describe(config, clip)
    config.data.mean, config.data.std = load_normalisation(folder) or (OPENAI_MEAN, OPENAI_STD)
    clip = image_text.make_clip(config, tokenizer)
    write_run(
        run.workdir,
        run.experiment,
        config,
        image_text.make_dataless(config, clip),
        image_text.abstract_batch(config),
        params,
        weights_file(folder, "model"),
        vocabulary=text.to_json(tokenizer),
    )


def describe(config: Config, clip: CLIP) -> None:
    """Changes a config into that of these towers. Raises RunError if they differ in what a run has once for both."""
    image, said = clip.image, clip.text
    if image.activation != said.activation:
        raise RunError(f"towers with {image.activation} and {said.activation}: a run has one activation for both")
    for name in config.network.image:
        config.network.image[name] = getattr(image, name)
    for name in config.network.text:
        config.network.text[name] = getattr(said, name)
    config.network.projection, config.network.activation = image.projection, image.activation
    config.data.image_size, config.text.length = image.image_size, said.length
    config.loss.name = "softmax"


def export_weights(run: Run) -> None:
    """Writes the averaged weights, the vocabulary and the normalisation of --workdir as the new folder --weights."""
    folder = _folder(run)
    trained = image_text.load(run.workdir, run.mesh, run.flags.checkpoint)
    if jax.process_index() != 0:
        return
    normalisation = run.config.data.mean, run.config.data.std
    save_clip(folder, trained.clip, jax.device_get(trained.params), text.to_json(trained.tokenizer), normalisation)
    print(f"{folder}: the averaged weights of {run.workdir} after {trained.step} steps")


def _folder(run: Run) -> Path:
    if not run.flags.weights:
        raise RunError("--weights is missing: name the folder that transformers reads")
    return Path(run.flags.weights)
