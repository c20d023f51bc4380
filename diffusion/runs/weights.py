"""--mode=import: published U-Nets and pipelines as runs of ours; `export.py` is the way back.

    python -m experiments.cifar10 --mode=import --weights=ddpm-cifar10-32 --workdir=runs/published
    python -m experiments.cifar10 --mode=sample --workdir=runs/published

`--weights` is a folder as diffusers publishes it, the whole pipeline's or its network's, or a file of guided-diffusion
(ADM), whose settings the config says: --config.data.image_size=64 --config.network.head_channels=64
--config.process.beta=cosine --new_attention_order. An import computes in float32.
"""

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from diffusion.data.pictures import one_side
from diffusion.files import check_folder
from diffusion.model import pipelines
from diffusion.model.autoencoders import find_folder
from diffusion.model.choices import fields_of
from diffusion.model.config import Config, from_plain, make_settings, plain
from diffusion.model.experiment import abstract_batch, make_learner, make_model, stored_of
from diffusion.model.fields import change, choose, complete
from diffusion.model.sampling import make_sampling
from diffusion.pretrained import adm, folder, pipeline, sd3, unet
from diffusion.pretrained.pipeline import Published
from diffusion.pretrained.scheduler import Chain
from diffusion.runs.call import Call
from diffusion.runs.published import FILES, is_published, read_about
from diffusion.runs.published import write_run as write_published
from diffusion.runs.run import model_of
from diffusion.training import Checkpoints, Experiment, RunError, check_finite, init_state, workdir
from diffusion.training.checkpoints import provenance

USUAL_STEPS = 50  # of DDIM and multistep solvers, where a published model names no number


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flag of these modes."""
    flags.DEFINE_string("weights", None, "import, export: a published folder; import: an ADM file", flag_values=values)
    flags.DEFINE_string("tokenizers", None, "import: of a single file, a folder of its tokenizers", flag_values=values)
    flags.DEFINE_string("variant", None, "import: of a folder's weights, as fp16", flag_values=values)
    flags.DEFINE_bool("null_class", None, "import: whether the last class means no class", flag_values=values)
    flags.DEFINE_bool(
        "new_attention_order", None, "import: whether an ADM file has --use_new_attention_order", flag_values=values
    )


def published_folder(call: Call) -> Path:
    """Returns --weights. Raises RunError where it is missing, ValueError where it is to be written and cannot be."""
    if not call.flags.weights:
        raise RunError("--weights is missing: name the published folder to read, or to write")
    path = Path(call.flags.weights).expanduser()
    if call.flags.mode == "export":
        check_folder(path.parent, f"--weights={path}")
    return path


def load_published(call: Call, path: Path) -> tuple[Published, list[Path]]:
    """Returns the model at --weights, and the files that it was read from.

    A file is a checkpoint of guided-diffusion (ADM); the config says what leaves no trace in its weights.
    """
    config = call.config
    if path.is_dir():
        asked, size = call.flags, config.data.image_size or None
        files = folder.weights_files(unet.unet_folder(path), variant=asked.variant)
        return pipeline.load_pipeline(path, asked.variant, asked.null_class, size), files
    if config.network.name != "unet" or not config.data.image_size:
        raise RunError(f"{path} does not hold the size of its images: add --config.data.image_size=N")
    if call.flags.new_attention_order is None:
        raise RunError(
            f"{path} does not hold the order of its heads: add --new_attention_order or --nonew_attention_order"
        )
    heads = config.network.head_channels
    published = adm.load_adm(
        path,
        one_side(config.data.image_size, "images of ADM"),
        new_attention_order=call.flags.new_attention_order,
        num_heads=None if heads else config.network.num_heads,
        head_channels=heads or None,
        null_class=bool(call.flags.null_class),
        dropout=config.network.dropout,
        noise_schedule=config.process.beta,
        num_steps=config.process.num_steps,
    )
    return published, [path]


def import_weights(call: Call) -> None:
    """Makes --workdir a run at step 0 whose raw and averaged weights both are the published ones."""
    path = published_folder(call)
    if is_published(path):
        return import_run(call, path)
    if sd3.is_single_file(path):
        return import_single_file(call, path)
    if kind := pipelines.kind_of(path):
        return import_pipeline(call, path, kind)
    published, files = load_published(call, path)
    network, shape = published.network, published.image_shape
    config = call.config.copy_and_resolve_references().unlock()
    describe_network(config, network)
    if published.chain is None:
        logging.warning("%s has no scheduler: it is taken to be %s", path, plain(config)["process"])
        config.loss.learned_variance = network.out_channels == 2 * shape[-1]
    else:
        describe_chain(config, published.chain)
    refuse_asked(call, path, config)
    config.training.ema_profiles = ()  # of the training that led here nothing is known
    config.evaluation.after_training = False
    config = complete(config)
    model = make_model(config, shape, network.num_classes)
    make_sampling(config, model.process)  # what cannot be sampled is refused now
    facts = {"image_shape": list(shape), "num_classes": network.num_classes, **stored_of(model)}
    learner, batch = make_learner(config, model), abstract_batch(config, model)
    write_run(call.workdir, call.task.name, config, learner, batch, {"params": published.params}, files, facts)


def import_run(call: Call, path: Path) -> None:
    """Makes --workdir the same run as an artefact of --mode=export, or as the work folder of a published pipeline."""
    about = read_about(path)
    name, config = about.pop("experiment"), from_plain(about.pop("config"))
    if name != call.task.name:
        raise RunError(f"{path} holds a run of experiment {name}, not {call.task.name}")
    write_published(call.workdir, path / FILES, name, asked_again(call, complete(config)), about)
    print(f"{call.workdir} is now a run of experiments.{name} with the weights of {path}")


def refuse_asked(call: Call, path: Path, config: Config) -> None:
    """Raises RunError where the command line names a field that the published model has otherwise."""
    theirs, asked = workdir.flatten(plain(config)), workdir.flatten(plain(call.config))
    for field in call.asked:
        field = field if field in asked else f"{field}.name"
        if field.partition(".")[0] in ("network", "process") and theirs.get(field) != asked[field]:
            has = f"has {theirs[field]}" if field in theirs else "has no such field"
            raise RunError(f"--config.{field}={asked[field]}: {path} {has}: leave it out")


def import_single_file(call: Call, path: Path) -> None:
    """Does the same with a Stable Diffusion 3 in one file, written as the folder of a pipeline."""
    if not call.flags.tokenizers:
        raise RunError(
            f"{path} holds no tokenizers: add --tokenizers=DIR, a folder with tokenizer, tokenizer_2 and tokenizer_3 "
            "as the published pipeline has them"
        )
    read = sd3.read_single_file(path, Path(call.flags.tokenizers).expanduser())
    call.workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=call.workdir.parent, prefix=".importing-") as temporary:
        sd3.save_pipeline(Path(temporary) / "pipeline", read)
        import_pipeline(call, Path(temporary) / "pipeline", sd3.CLASS)


def import_pipeline(call: Call, path: Path, kind: str) -> None:
    """Makes --workdir the run of a published pipeline, whose files it keeps."""
    config = call.config.copy_and_resolve_references().unlock()
    about = pipelines.PIPELINES[kind].describe(path, config, call.flags.variant)
    config.evaluation.after_training = False
    config = asked_again(call, complete(config))
    model = model_of(config, about)
    make_sampling(config, model.process)  # what cannot be sampled is refused now
    about |= {"pipeline": kind, "variant": call.flags.variant}
    preview = config.space.get("preview")
    write_published(
        call.workdir, folder.resolve(path), call.task.name, config, about, find_folder(preview) if preview else None
    )
    print(f"{call.workdir} is now a run of experiments.{call.task.name} with the files of {path}, a {kind}")


def asked_again(call: Call, config: Config) -> Config:
    """Returns the config of a pipeline, with what the command line asks of its sampling in place of its own."""
    theirs = workdir.flatten(plain(call.config))
    fields = [field for field in call.asked if field.startswith("sampling.")]
    fields += ["sampling.num_steps"] if call.flags.sampling_steps is not None else []
    fields += ["sampling.sampler"] if call.flags.sampler is not None else []
    names = [field if field in theirs else f"{field}.name" for field in fields]
    return change(config, {name: from_plain({"it": theirs[name]}).it for name in names})


def describe_network(config: Config, network: Any) -> None:
    """Changes a config into that of a published U-Net."""
    own = {field: getattr(network, field) for field in fields_of(type(network))}
    own = {field: 0 if value is None else value for field, value in own.items()}
    config.network = ConfigDict({**own, "name": "unet", "dtype": "float32"})
    choose(config, "condition", "nothing" if network.num_classes is None else "classes")
    if network.num_classes is not None and not network.null_class:
        config.condition.dropout = 0.0
    if network.num_classes is None or not network.null_class:
        config.sampling.guidance = 1.0  # there is nothing to be guided away from


def describe_chain(config: Config, chain: Chain) -> None:
    """Changes a config into that of a published chain, sampled as its scheduler samples.

    Raises:
      RunError: a threshold that ours cannot be.
    """
    choose(config, "process", "ddpm")
    for field in ("beta", "first", "last", "num_steps", "zero_terminal_snr", "table"):
        config.process[field] = getattr(chain, field)
    config.loss.prediction, config.loss.learned_variance = chain.prediction, chain.variance == "learned"
    sampler = chain.sampler or "ancestral"
    if chain.left_out or chain.sampler is None:
        named = ", ".join(f"{name}={value!r}" for name, value in chain.left_out.items()) or "steps"
        logging.warning("sampled with %s: the published sampler's %s cannot be repeated", sampler, named)
    choose(config, "sampling.sampler", sampler)
    if sampler == "ancestral":
        config.sampling.sampler.variance = chain.variance
    else:
        config.sampling.sampler.update(chain.settings)
    every = sampler == "ancestral" and not chain.steps_offset  # others have no step for the chain's last
    config.sampling.num_steps = chain.num_steps if every else min(USUAL_STEPS, chain.num_steps)
    choose(config, "sampling.grid", chain.spacing)
    config.sampling.grid.final = chain.final
    if chain.spacing == "leading":
        config.sampling.grid.steps_offset = chain.steps_offset
    if "skip_last" in config.sampling.grid:
        config.sampling.grid.skip_last = sampler in ("dpm_solver_pp", "unipc")
    # With its default largest value, 1, diffusers' dynamic threshold is a clip to [-1, 1].
    if chain.dynamic and chain.dynamic_max != 1.0:
        raise RunError(f"sample_max_value={chain.dynamic_max:g} of a dynamic threshold cannot be honoured (only 1)")
    choose(config, "sampling.threshold", "clip" if chain.clip or chain.dynamic else "none")
    if chain.clip or chain.dynamic:
        largest = 1.0 if chain.dynamic else chain.clip_range
        config.sampling.threshold.update(low=-largest, high=largest, keep_eps=sampler == "ddim")


def write_run(
    run_folder: Path,
    name: str,
    config: Config,
    experiment: Experiment,
    batch: dict[str, Any],
    params: Any,
    files: list[Path],
    facts: dict[str, Any],
) -> None:
    """Makes `run_folder` a work folder of experiment `name` at step 0, its raw and averaged weights both `params`.

    Args:
      run_folder: must not exist yet.
      name: of the experiment.
      config: of the run; it describes the network of `params`.
      experiment: all but its first parameters is taken from it.
      batch: the shapes of one.
      params: arrays.
      files: where they are from; names and checksums are kept in the checkpoint.
      facts: what else is stored beside the weights, plain JSON.

    Raises:
      RunError: weights that are not finite.
    """
    params = jax.tree.map(jnp.asarray, params)
    check_finite(params, f"the weights in {files[0].parent}")
    begun = experiment._replace(init=lambda key: params)
    state = init_state(begun, config.seed, batch, make_settings(config).ema_profiles)
    origin = [{"file": file.name, "sha256": file_digest(file)} for file in files]
    described = {"experiment": name, "config": plain(config), **facts, "provenance": provenance(), "weights": origin}
    with folder.new_folder(run_folder) as temporary:
        workdir.claim(temporary, name, plain(config))
        (temporary / "metrics.jsonl").touch()
        with Checkpoints(temporary / "checkpoints") as checkpoints:
            checkpoints.save(0, state, described)
    read = ", ".join(f"{one['file']} (sha256 {one['sha256']})" for one in origin)
    print(f"{run_folder} is now a run of experiments.{name} with the weights of {files[0].parent}: {read}")


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
