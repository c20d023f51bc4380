"""An autoencoder of experiments.autoencoder over its training: PSNR before and after, its curve, reconstructions.

    ./launch.sh autoencoder --workdir=runs/autoencoder --config.data.name=folder --config.data.dir=DIR ...
    python -m benchmarks.autoencoder runs/autoencoder

Minutes are those spent in steps. Writes benchmarks/results/autoencoder_cpu.json, with the run's report, and beside it
a picture of held-out images above their reconstructions.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import make_parser, write_results
from diffusion.data.images import save_png
from diffusion.model import vae
from diffusion.model.config import Config, from_plain, plain
from diffusion.training import run_key
from diffusion.training.checkpoints import open_existing
from experiments import autoencoder


def curve(folder: Path, batch_size: int) -> list[dict[str, float]]:
    """Returns step, minutes spent in steps, and means of the training batches, at each line of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found, minutes, step = [], 0.0, 0
    for line in lines:
        minutes += (line["step"] - step) * batch_size / line["images_per_second"] / 60
        step = line["step"]
        means = {name: round(line[name], 4) for name in ("loss", "psnr", "kl")}
        found.append({"step": step, "minutes": round(minutes, 2), **means})
    return found


def psnr_before(config: Config, images: np.ndarray) -> float:
    """Returns the mean PSNR with the weights that the run began with."""
    learner = vae.make_learner(config)
    params = jax.jit(learner.init)(run_key(config.seed, "init"))["autoencoder"]
    begun = vae.Trained(vae.make_autoencoder(config), params, 0)
    return float(autoencoder.run_through(begun, images, config.evaluation.batch_size)["psnr"].mean())


def measure(folder: Path, picture: Path, columns: int) -> dict[str, Any]:
    """Returns what a run has learned, and draws held-out images above their reconstructions."""
    with open_existing(folder) as checkpoints:
        config = from_plain(checkpoints.description()["config"])
    trained = vae.open_trained(folder)
    images = autoencoder.spread(autoencoder.read(config, "test"), config.evaluation.num_images)
    found = autoencoder.run_through(trained, images, config.evaluation.batch_size)
    shown = np.linspace(0, len(images) - 1, 2 * columns).astype(int)
    save_png(picture, autoencoder.above(images[shown], found["image"][shown], columns), smallest_side=256)
    report = json.loads((folder / "report.json").read_text())
    fields = plain(config)
    return {
        "network": fields["network"],
        "loss": fields["loss"],
        "optimizer": fields["optimizer"],
        "batch_size": config.data.batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(trained.params)),
        "image_shape": list(images.shape[1:]),
        "latent_shape": list(found["mean"].shape[1:]),
        "held_out_images": len(images),
        "psnr_before": round(psnr_before(config, images), 3),
        "psnr_after": round(float(found["psnr"].mean()), 3),
        "report": [
            {key: one[key] for key in ("name", "value", "num_samples", "note")} for one in report["measurements"]
        ],
        "curve": curve(folder, config.data.batch_size),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="work folder")
    parser.add_argument("--columns", type=int, default=10, help="of the picture, which has two rows")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/autoencoder_cpu.json"))
    arguments = parser.parse_args()
    picture = arguments.out.with_name(f"{arguments.out.stem}_pictures.png")
    write_results(arguments.out, measure(arguments.run, picture, arguments.columns))


if __name__ == "__main__":
    main()
