"""Scores any samples against any reference, wherever they were made.

    python -m diffusion.evaluation SAMPLES REFERENCE [--features inception|pixels|clip] [--metrics fid,kid] [--out DIR]

SAMPLES is an .npz with arr_0, uint8 [N, H, W, C] (the convention of ADM), or a folder of pictures. REFERENCE is the
same, or published statistics (an .npz with mu and sigma), or tfds:NAME/SPLIT, or digits:SPLIT.

With --features=clip, --weights=FOLDER (a published CLIP) and --prompts=FILE, the CLIP score is measured too: line n of
FILE is the prompt of sample n. Pictures of a folder are in natural order, 2.png before 10.png.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from diffusion import evaluation
from diffusion.data.lines import read_lines
from diffusion.data.named import open_images
from diffusion.evaluation import Measurement, clip_extractor
from diffusion.evaluation.extractors import NAMES
from diffusion.files import check_folder
from diffusion.training.errors import RunError, one_line
from diffusion.training.sharding import find_devices


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Exits with the message."""
        sys.exit(f"error: {message} (--help lists all)")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; bad input ends it with one line and an exit code of 1."""
    parser = OneLine(
        prog="python -m diffusion.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", metavar="SAMPLES")
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("--features", default="inception", choices=NAMES)
    parser.add_argument("--weights", help="Inception's file, if it cannot be fetched; the folder of a published CLIP")
    parser.add_argument("--prompts", help="clip: a text file, the prompt of each sample in a line")
    parser.add_argument("--metrics", help=f"of {', '.join(evaluation.METRICS)}; default: all that can be computed")
    parser.add_argument("--out", help="folder for report.json, report.md and nearest.png")
    parser.add_argument("--data-dir", default="", help="where prepared TFDS sets are")
    options = parser.parse_args(argv)
    try:
        score(options)
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error, 560)}")
    except MemoryError as error:
        sys.exit(f"error: not enough memory ({one_line(error)}): lower what was asked for")
    except KeyboardInterrupt:
        sys.exit(130)


def score(options: argparse.Namespace) -> None:
    """Prints a report, and with --out writes it.

    All input is checked before features are computed.

    Raises:
      ValueError: bad input, in one line.
      RunError: a network is needed, and there is no device for it.
    """
    asked = None if options.metrics is None else [name.strip() for name in options.metrics.split(",")]
    evaluation.check_names(asked or ())
    if options.out == "":
        raise ValueError("--out= is empty: name a folder, or leave it out")
    out = None if options.out is None else Path(options.out).expanduser()
    if out:
        check_folder(out, f"--out={options.out}")
    if options.prompts and not (options.features == "clip" and options.weights):
        raise ValueError("--prompts are for the CLIP score: add --features=clip --weights=FOLDER")
    if options.weights and options.features == "pixels":
        raise ValueError("--weights are those of a network, and --features=pixels has none: leave one out")
    if options.data_dir and not any(name.startswith("tfds:") for name in (options.samples, options.reference)):
        raise ValueError("--data-dir is where sets named tfds:NAME are, and none is named: leave it out")
    prompts = read_prompts(Path(options.prompts).expanduser()) if options.prompts else []
    if options.features != "pixels":
        find_devices()
    judge = evaluation.load_encoder(options.weights) if prompts else None
    extractor = clip_extractor(judge) if judge else evaluation.make_extractor(options.features, options.weights)

    data_dir = os.path.expanduser(options.data_dir)
    samples, source = (open_images(os.path.expanduser(x), data_dir) for x in (options.samples, options.reference))
    if samples is None:
        raise ValueError(f"{options.samples} holds statistics (mu and sigma), no images: give it as REFERENCE")
    if prompts and len(prompts) != samples.num_examples:
        raise ValueError(f"{samples.num_examples} samples and {len(prompts)} prompts: one prompt per sample is needed")
    counts = {"num_samples": samples.num_examples, "num_reference": source.num_examples if source else 0}
    names = possible(extractor, counts) if asked is None else asked
    evaluation.check_names(names, extractor, **counts)
    if source is None:
        reference = evaluation.read_statistics(Path(options.reference).expanduser())
    else:
        reference = evaluation.reference_set(source, extractor)

    image = evaluation.all_images(samples)
    measurements = measure(image, samples.name, extractor, reference, names)
    if judge:
        score = float(evaluation.clip_score(judge, image, prompts).mean())
        made = measurements[0]._replace(reference=None, note="100 max(0, cosine)")
        measurements.append(made._replace(name="CLIP score", value=score, num_samples=len(image)))
    about = {"samples": samples.name, "fingerprint of the samples": samples.fingerprint}
    print(evaluation.print_report(f"{samples.name} against {reference.reference.name}", measurements, about), end="")
    if out:
        evaluation.write_report(out, f"{samples.name} scored", measurements, about)
        if source is not None and source.image_shape == samples.image_shape:
            evaluation.draw_nearest(image, evaluation.all_images(source), out / "nearest.png")


def measure(
    image: np.ndarray,
    name: str,
    extractor: evaluation.Extractor,
    reference: evaluation.ReferenceSet,
    metrics: Sequence[str],
) -> list[Measurement]:
    """Returns a measurement by each metric of samples of that name, of which nothing else is known."""
    samples = evaluation.extract(image, extractor, reference)
    unknown = {"sampler": f"unknown ({name})", "num_steps": None, "seeds": [], "ema": None}
    made: dict[str, Any] = {"features": extractor.name, "reference": reference.reference, **unknown}
    return [
        Measurement(
            evaluation.METRICS[metric].title,
            found.value,
            found.num_samples,
            note=evaluation.bias_note(reference, found.num_samples) if metric == "fid" else "",
            **made,
        )
        for metric, found in evaluation.compare(samples, extractor, reference, metrics).items()
    ]


def possible(extractor: evaluation.Extractor, counts: Mapping[str, int]) -> list[str]:
    """Returns the metrics that can be computed of these features and counts; "fid" where none can."""
    names = []
    for name in evaluation.METRICS:
        with contextlib.suppress(ValueError):
            evaluation.check_names([name], extractor, **counts)
            names.append(name)
    return names or ["fid"]


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts of a file: line n is that of sample n.

    Raises:
      ValueError: the file cannot be read, or has no prompts or a blank line between them.
    """
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path} holds no prompt: write the prompt of each sample in a line")
    for expected, (number, _) in enumerate(lines, 1):
        if number != expected:
            raise ValueError(f"{path}, line {expected} is blank: line n is the prompt of sample n")
    return [line.strip() for _, line in lines]


if __name__ == "__main__":
    main()
