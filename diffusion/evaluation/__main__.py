"""Scores any samples against any reference, wherever they were made.

    python -m diffusion.evaluation SAMPLES REFERENCE [--features inception|pixels|clip] [--metrics fid,kid] [--out DIR]

SAMPLES is an .npz with arr_0, uint8 [N, H, W, C] (the convention of ADM), or a folder of pictures. REFERENCE is the
same, or published statistics (an .npz with mu and sigma), or tfds:NAME/SPLIT, or digits:SPLIT. With --features clip,
--weights the folder of a published CLIP and --prompts a file with the prompt of each sample in a line, the CLIP score
is also told.
"""

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np

from diffusion import evaluation
from diffusion.data.folder import image_folder
from diffusion.data.samples import load_samples
from diffusion.data.sources import Source, array_source, digits
from diffusion.data.tfds import tfds_source
from diffusion.evaluation.extractors import NAMES


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; bad input ends it with one line and a code that is not 0."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", metavar="SAMPLES")
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("--features", default="inception", choices=NAMES)
    parser.add_argument("--weights", help="Inception's published file, where it is not to be fetched; CLIP's folder")
    parser.add_argument("--prompts", help="clip: text file, the prompt of each sample in a line")
    parser.add_argument("--metrics", help=f"of {', '.join(evaluation.METRICS)}; default: all that can be had")
    parser.add_argument("--out", help="folder for report.json, report.md and nearest.png")
    parser.add_argument("--data-dir", help="where prepared TFDS sets are")
    options = parser.parse_args(argv)
    try:
        score(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def score(options: argparse.Namespace) -> None:
    """Prints, and with --out writes, a report."""
    if options.prompts and options.features != "clip":
        raise ValueError("--prompts are for the CLIP score: add --features=clip --weights=FOLDER")
    samples = open_images(options.samples, None)
    assert samples is not None
    source = open_images(options.reference, options.data_dir)
    extractor = evaluation.make_extractor(options.features, options.weights)
    if source is None:
        reference = evaluation.read_statistics(Path(options.reference))
    else:
        reference = evaluation.reference_set(source, extractor)
    names = options.metrics.split(",") if options.metrics else possible(extractor, reference)
    image = samples.read(np.arange(samples.num_examples))["image"]
    made = {
        "features": extractor.name,
        "reference": reference.reference,
        "sampler": f"not known ({samples.name})",
        "num_steps": None,
        "seeds": [],
        "ema": None,
    }
    measurements = [
        evaluation.Measurement(
            name,
            found.value,
            found.num_samples,
            note=evaluation.bias_note(reference, found.num_samples) if name == "fid" else "",
            **made,
        )
        for name, found in evaluation.compare(image, extractor, reference, names).items()
    ]
    if options.prompts:
        prompts = Path(options.prompts).read_text("utf-8").splitlines()
        mean = float(evaluation.clip_score(evaluation.load_encoder(options.weights), image, prompts).mean())
        made["reference"] = None
        measurements.append(evaluation.Measurement("CLIP score", mean, len(image), note="100 max(0, cosine)", **made))
    about = {"samples": samples.name, "fingerprint of the samples": samples.fingerprint}
    print(evaluation.render_report(f"{samples.name} against {reference.reference.name}", measurements, about), end="")
    if options.out:
        evaluation.write_report(options.out, f"{samples.name} scored", measurements, about)
        if source is not None and source.image_shape == samples.image_shape:
            real = source.read(np.arange(source.num_examples))["image"]
            evaluation.draw_nearest(image, real, Path(options.out) / "nearest.png")


def possible(extractor: evaluation.Extractor, reference: evaluation.ReferenceSet) -> list[str]:
    """Returns the metrics that these features and this reference allow."""
    names = []
    for name in evaluation.METRICS:
        try:
            evaluation.check_names([name], extractor, reference)
        except ValueError:
            continue
        names.append(name)
    return names


def open_images(name: str, data_dir: str | None) -> Source | None:
    """Returns the images that `name` means, None for a file of statistics.

    Raises:
      ValueError: there are none.
    """
    kind, _, rest = name.partition(":")
    if kind == "tfds" and rest:
        data_set, _, split = rest.rpartition("/")
        return tfds_source(data_set or split, split if data_set else "train", data_dir)
    if kind == "digits":
        return digits(rest or "train")
    path = Path(name)
    if path.is_dir():
        return image_folder(path)
    if is_statistics(path):
        return None
    return array_source(load_samples(path), None, path.name, "all", None)


def is_statistics(path: Path) -> bool:
    """Says whether an .npz holds mu and sigma, and no images."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return "arr_0.npy" not in names and {"mu.npy", "sigma.npy"} <= set(names)


if __name__ == "__main__":
    main()
