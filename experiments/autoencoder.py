"""A small autoencoder whose latents diffusion models are trained in: of CIFAR-10, TFDS, pictures of your own, scenes.

    ./launch.sh autoencoder --workdir=runs/autoencoder
    ./launch.sh autoencoder --config.data.name=folder --config.data.dir=DIR --config.data.image_size=64
    ./launch.sh autoencoder --workdir=runs/autoencoder --mode=reconstruct --images=a.png,b.png
    ./launch.sh autoencoder --workdir=runs/autoencoder --mode=export --weights=my-vae
    ./launch.sh autoencoder --mode=import --weights=sd-vae-ft-mse --workdir=runs/published
    ./launch.sh cifar10 --config.space.name=latents --config.space.folder=runs/autoencoder

The last trains in the latents. The loss is latent diffusion's: L1, a small KL and with --config.loss.adversarial=1 a
discriminator of patches, without a perceptual distance, whose network cannot be had here. Latents' shift and scale are
fitted when training ends; an export holds them as shift_factor and scaling_factor.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion import autoencoding, evaluation, training
from diffusion.data import scenes
from diffusion.data.batches import full_batches
from diffusion.data.images import image_grid, save_png, to_float
from diffusion.data.named import named_images
from diffusion.data.pictures import decode
from diffusion.data.sources import Source, array_source, facts_of
from diffusion.evaluation import Measurement
from diffusion.model import formats, vae
from diffusion.model.config import Config, make_settings, plain
from diffusion.runs import compare, target, vae_weights, weights
from diffusion.runs.call import TEST, TRAIN, Call, Task, held_out, refuse_flags
from diffusion.runs.check import try_out
from diffusion.runs.modes import main
from diffusion.runs.pictures import read_pictures, write_rows
from diffusion.runs.report import REAL, finish_run
from diffusion.training.started import process_start

NUM_SHOWN = 16  # test images in reconstructions.png


def read(config: Config, split: str) -> Source:
    """Returns the images of a split, "train" or "test"."""
    data, held_out = config.data, config.evaluation
    if data.name == "scenes":
        return scenes.scenes("train" if split == TRAIN else "held_out", data.image_size or 16, data.num_examples)
    apart = data.name == "folder" and held_out.dir
    if data.name not in ("folder", "digits"):
        split = split if split == TRAIN else held_out.split
    return named_images(
        data.name,
        "all" if apart else split,
        data_dir=held_out.dir if apart and split == TEST else data.dir,
        image_size=data.image_size,
        channels=data.channels,
        held_out=data.held_out,
        skip_broken=data.skip_broken,
    )


def train(call: Call) -> None:
    """Trains, fits shift and scale of the latents, then evaluates."""
    config = call.config
    if config.evaluation.after_training:
        ready(call)
    source = read(config, TRAIN)
    state = training.train(
        vae.make_experiment(config, source),
        make_settings(config),
        workdir=call.workdir,
        mesh=call.mesh,
        description={"experiment": call.task.name, "config": plain(config), "data": facts_of(source)},
        migrate=formats.current,
        writers=call.writers,
        started=process_start(),
    )
    trained = vae.make_trained(config, call.mesh, state)
    if jax.process_index() == 0:
        fit(call, trained)
        if config.evaluation.after_training:
            measure(call, trained)


def check(call: Call) -> None:
    """Prints the findings of a dry run; reconstructions after one step remain in its check/."""
    source = read(call.config, TRAIN)
    try_out(call, vae.make_experiment(call.config, source), source)


def open_trained(call: Call) -> vae.Trained:
    """Returns the trained autoencoder of a call."""
    if call.flags.ema_length is not None:
        raise ValueError("--ema_length: this experiment keeps one average of its weights, leave it out")
    return vae.open_trained(call.workdir, call.mesh, call.flags.checkpoint)


def run_through(trained: vae.Trained, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Returns what becomes of images uint8[N, H, W, 3].

    Returns:
      "image", the reconstructions from the mode; "mean" of the latents [N, h, w, c]; "kl" and "psnr" [N].
    """

    @jax.jit
    def forward(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        image, posterior = vae.make_reconstruct(trained.module)(params, x)
        kl = autoencoding.kl_to_unit_normal(*posterior)
        return {
            "image": image,
            "mean": posterior.mean,
            "kl": kl,
            "psnr": autoencoding.psnr(to_float(x), to_float(image)),
        }

    parts = [
        jax.device_get(forward(trained.params, images[rows]))
        for rows in full_batches(len(images), min(batch_size, len(images)))
    ]
    return {name: np.concatenate([part[name] for part in parts])[: len(images)] for name in parts[0]}


def spread(source: Source, count: int) -> np.ndarray:
    """Returns `count` of the images of a source, evenly spread; all where there are fewer."""
    rows = np.linspace(0, source.num_examples - 1, min(count, source.num_examples))
    return source.read(np.unique(rows.astype(int)))["image"]


def fit(call: Call, trained: vae.Trained) -> vae.Latents:
    """Returns shift and scale of the latents, one number each as Stable Diffusion's; kept in the run's folder."""
    latents = vae.read_latents(call.workdir, trained.step)
    if latents is None:
        settings = call.config.evaluation
        images = spread(read(call.config, TRAIN), settings.num_latents)
        z = run_through(trained, images, settings.batch_size)["mean"].astype(np.float64)
        channels = z.shape[-1]
        latents = vae.Latents((float(z.mean()),) * channels, (float(1 / z.std()),) * channels)
        vae.write_latents(call.workdir, trained.step, latents)
    return latents


def ready(call: Call) -> None:
    """Checks what `measure` needs before training."""
    refuse_flags(call, "num_samples", "out")
    settings = call.config.evaluation
    extractor = evaluation.make_extractor(settings.features, settings.weights) if settings.metrics else None
    test = held_out(call)
    vae.check_fits(vae.make_autoencoder(call.config), test)
    count = min(test.num_examples, settings.num_images)
    evaluation.check_names(settings.metrics, extractor, num_samples=count, num_reference=count)


def evaluate(call: Call) -> None:
    """Measures reconstructions; writes report.json, report.md, curves.png and reconstructions.png."""
    ready(call)
    trained = open_trained(call)
    if jax.process_index() == 0:
        fit(call, trained)
        measure(call, trained)


def measure(call: Call, trained: vae.Trained) -> None:
    """Does so."""
    config, settings = call.config, call.config.evaluation
    test = read(config, TEST)
    images = spread(test, settings.num_images)
    found = run_through(trained, images, settings.batch_size)
    shown = min(NUM_SHOWN, len(images))
    save_png(call.workdir / "reconstructions.png", above(images[:shown], found["image"][:shown]), smallest_side=480)
    made: dict[str, Any] = REAL | {
        "sampler": "reconstruction from the mode",
        "features": "pixels",
        "reference": evaluation.reference_of(test),
        "ema": config.training.ema_decay,
    }
    latents = fit(call, trained)
    kl = float(found["kl"].mean())
    measurements = [
        Measurement(
            "PSNR in dB",
            {"mean": float(found["psnr"].mean()), "lowest": float(found["psnr"].min())},
            len(images),
            **made,
            note="of levels 0 to 255; the mean over images",
        ),
        Measurement("KL to the unit normal in nats per image", kl, len(images), **made),
    ]
    if settings.metrics:
        extractor = evaluation.make_extractor(settings.features, settings.weights)
        reference = evaluation.reference_set(array_source(images, None, test.name, test.split, None), extractor)
        made |= {"features": extractor.name, "reference": reference.reference}
        samples = evaluation.extract(found["image"], extractor, reference)
        for name, score in evaluation.compare(samples, extractor, reference, list(settings.metrics)).items():
            title = f"{evaluation.METRICS[name].title} of reconstructions"
            note = "from the images that they are of"
            measurements.append(Measurement(title, score.value, score.num_samples, **made, note=note))
    made |= {"features": "latents", "reference": evaluation.reference_of(test)}
    z = found["mean"].reshape(-1, found["mean"].shape[-1]).astype(np.float64)
    for name, values in (("mean", z.mean(axis=0)), ("standard deviation", z.std(axis=0))):
        by_channel = {f"channel {number}": float(value) for number, value in enumerate(values)}
        measurements.append(Measurement(f"latents' {name}", by_channel, len(images), **made))
    for name, values in latents._asdict().items():
        value = values[0] if len({*values}) == 1 else {f"channel {number}": one for number, one in enumerate(values)}
        measurements.append(Measurement(f"{name} to x_0", value, len(images), **made, note="x_0 = (z - shift) * scale"))
    finish_run(call.workdir, call.task.name, trained.step, measurements, curves=("psnr",), writers=call.writers)


def above(images: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> np.ndarray:
    """Returns a picture of full rows of images, each row above that of its reconstructions."""
    columns = min(columns, len(images))
    count = len(images) // columns * columns
    rows = (block[:count].reshape(-1, columns, *images.shape[1:]) for block in (images, reconstructions))
    return image_grid(np.stack([*rows], axis=1).reshape(-1, *images.shape[1:]), columns)


def reconstruct(call: Call) -> None:
    """Writes --images, or --num_samples test images, beside their reconstructions, as .npz and .png."""
    trained = open_trained(call)
    if call.flags.images:
        images = read_pictures(call.flags.images, shape_of(call.flags.images[0], trained.module.factor))
    else:
        images = spread(read(call.config, TEST), call.flags.num_samples or NUM_SHOWN)
    found = run_through(trained, images, call.config.evaluation.batch_size)
    out = Path(call.flags.out or call.workdir / "samples" / f"reconstructions_step{trained.step}.npz").expanduser()
    rows = found["image"][:, None]
    write_rows(out, [images[:, None], rows], ["image", "reconstruction"], None, rows, psnr=found["psnr"])
    if jax.process_index() == 0:
        print(f"PSNR {found['psnr'].mean():.2f} dB, the mean of {len(images)}")


def shape_of(path: str, factor: int) -> tuple[int, int, int]:
    """Returns the shape to which pictures are cropped and resized: the first one's, its sides made to be divided."""
    height, width, _ = decode(Path(path).expanduser(), channels=3).shape
    if min(height, width) < factor:
        raise ValueError(f"{path} has {height}x{width} pixels: at least {factor}x{factor} are needed")
    return height // factor * factor, width // factor * factor, 3


def export(call: Call) -> None:
    """Writes the averaged weights as the folder of a diffusers' AutoencoderKL, --weights."""
    trained = open_trained(call)
    vae_weights.export_weights(call, trained, fit(call, trained))


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of --mode=reconstruct, import, export and check."""
    flags.DEFINE_list("images", [], "reconstruct: pictures, in place of test images", flag_values=values)
    weights.define_flags(values)
    target.define_flags(values)
    compare.define_flags(values)


MODES = {
    "train": train,
    "check": check,
    "evaluate": evaluate,
    "reconstruct": reconstruct,
    "compare": compare.compare,
    "import": vae_weights.import_weights,
    "export": export,
}

TASK = Task(vae.NAME, read)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="autoencoder", modes=MODES, extra_flags=define_flags)
