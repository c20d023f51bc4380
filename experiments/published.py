"""Published DDPM models as runs of ours, and our runs as models for diffusers' `DDPMPipeline`.

    python -m experiments.published --mode=import --weights=ddpm-cifar10-32 --workdir=runs/published
    python -m experiments.cifar10 --workdir=runs/published --mode=evaluate
    python -m experiments.published --mode=export --workdir=runs/ddpm --weights=my-ddpm

`--weights` is a folder as diffusers publishes it: the whole pipeline's, or its network's (config.json and
diffusion_pytorch_model.safetensors). An import computes in float32 unless --config.network.dtype says otherwise.
"""

import sys
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags

from diffusion.data.sources import Source, digits
from diffusion.pretrained import folder, pipeline, unet
from diffusion.training import RunError, make_mesh
from diffusion.training.checkpoints import open_existing
from experiments import cifar10, image_diffusion, image_modes
from experiments.command_line import Config, Run, from_plain, load, override, run_to_end
from experiments.imported import write_run

DDPM = Path(__file__).parent / "configs" / "cifar10_ddpm.py"


def import_weights(weights: Path, run_folder: Path, arguments: list[str], values: flags.FlagValues) -> None:
    """Makes `run_folder` a work folder of experiments.cifar10, its raw and averaged weights both the published ones."""
    network, params, published = unet.load_unet(weights)
    chain = pipeline.load_chain(weights) or pipeline.Chain()
    shape = unet.network_of(published)[1]
    config = load(str(DDPM))
    with config.unlocked():
        describe(config, network, chain, shape)
        config.network.dropout = published.get("dropout", config.network.dropout)
        config.training.ema_profiles = ()  # of the training that led here nothing is known
    config = override(config, arguments, values)
    if config.data.name == "cifar10" and (shape != (32, 32, 3) or network.num_classes not in (None, 10)):
        raise RunError(
            f"{weights} is of images {shape} and {network.num_classes or 'no'} classes, CIFAR-10 is of (32, 32, 3) and "
            "10: name the data by --config.data.name"
        )

    def read(indices: np.ndarray) -> Any:
        raise AssertionError("only the shape of the images is needed")

    source = Source(config.data.name, "train", sys.maxsize, shape, network.num_classes, read, "")
    experiment = image_diffusion.make_experiment(config, source, make_mesh())
    batch = {
        "image": jax.ShapeDtypeStruct((config.data.batch_size, *shape), np.uint8),
        "label": jax.ShapeDtypeStruct((config.data.batch_size,), np.int32),
    }
    file = folder.weights_file(weights / "unet" if (weights / "unet").is_dir() else weights)
    write_run(run_folder, "cifar10", config, experiment, batch, {"params": params}, file)


def describe(config: Config, network: Any, chain: pipeline.Chain, image_shape: tuple[int, int, int]) -> None:
    """Changes a config of DDPM on CIFAR-10 into that of a published network and chain."""
    learned = chain.variance == "learned"
    if network.out_channels != (1 + learned) * image_shape[-1]:
        raise RunError(
            f"a network from {image_shape[-1]} to {network.out_channels} channels does not fit a scheduler whose "
            f"variance is {chain.variance}"
        )
    for field in ("channels", "multipliers", "num_blocks", "attention_resolutions", "num_groups"):
        config.network[field] = getattr(network, field)
    if network.head_channels is not None:
        config.network.head_channels = network.head_channels
    config.network.class_conditional = network.num_classes is not None
    config.network.dtype = "float32"
    if image_shape[:2] != (32, 32):
        config.data.image_size = image_shape[0]
    for field in ("beta", "first", "last", "num_steps"):
        config.process[field] = getattr(chain, field)
    config.loss.prediction, config.loss.learned_variance = chain.prediction, learned
    config.sampling.num_steps, config.sampling.variance = chain.num_steps, chain.variance
    config.sampling.threshold = "clip" if chain.clip else "none"


def export_weights(weights: Path, run_folder: Path, arguments: list[str], values: flags.FlagValues) -> None:
    """Writes the averaged weights of a work folder, and its chain, as a pipeline's folder."""
    with open_existing(run_folder, values.checkpoint) as checkpoints:
        stored = checkpoints.description()
    config = override(from_plain(stored["config"]), arguments, values)
    if config.process.name != "ddpm":
        raise RunError(f"{run_folder} has process {config.process.name}: a DDPMPipeline is only for process.name=ddpm")
    if config.sampling.threshold not in ("clip", "none"):
        raise RunError("a DDPMPipeline clips or does not: add --config.sampling.threshold=clip (or none)")
    source = digits("train") if config.data.name == "digits" else cifar10.make_source(config, "train")
    network = image_diffusion.make_network(config, source, image_diffusion.make_diffusion(config))
    trained = image_modes.load(Run(stored["experiment"], config, run_folder, make_mesh(), values), source)
    process = config.process
    chain = pipeline.Chain(
        num_steps=process.num_steps,
        beta=process.beta,
        first=process.first,
        last=process.last,
        prediction=config.loss.prediction,
        variance="learned" if config.loss.learned_variance else config.sampling.variance,
        clip=config.sampling.threshold == "clip",
    )
    params = jax.device_get(trained.ema["params"])
    pipeline.save_pipeline(weights, network, params, source.image_shape[:2], chain)
    print(f"{weights}: the averaged weights of {run_folder} after {trained.step} steps")


def main() -> NoReturn:
    """Does what the command line says; errors are one line, as those of every experiment."""
    modes = {"import": import_weights, "export": export_weights}
    values = flags.FlagValues()
    flags.DEFINE_enum("mode", None, list(modes), "what to do", flag_values=values)
    flags.DEFINE_string("weights", None, "folder as diffusers publishes it", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_integer("checkpoint", None, "export the one of this step, not the newest", flag_values=values)
    flags.DEFINE_bool("traceback", False, "show where an error comes from", flag_values=values)

    def work() -> None:
        if {"--help", "-h"} & set(sys.argv):
            print(f"{__doc__}\nFlags:\n{values.get_help()}")
            return
        arguments = values(sys.argv, known_only=True)
        for name in ("mode", "weights", "workdir"):
            if not values[name].value:
                raise RunError(f"--{name} is missing: see --help")
        modes[values.mode](Path(values.weights), Path(values.workdir), arguments, values)

    run_to_end(work)


if __name__ == "__main__":
    main()
