"""--mode=evaluate and --mode=sweep: samples scored against the training images, beside images never seen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion import evaluation
from diffusion.data.sources import Source
from diffusion.evaluation import Extractor, Measurement, ReferenceSet
from experiments import image_likelihood, image_modes
from experiments.command_line import Run
from experiments.image_modes import Trained

TITLES = {
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "inception_score": "inception score",
    "precision_recall": "precision and recall",
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of these modes."""
    flags.DEFINE_list(
        "metrics",
        None,
        f"evaluate: of {', '.join(evaluation.METRICS)}, bits_per_dim, in place of the config's",
        flag_values=values,
    )
    flags.DEFINE_integer("num_seeds", 1, "evaluate: seeds, from --seed on", lower_bound=1, flag_values=values)
    flags.DEFINE_list("sweep_steps", [], "sweep: score samples of each of these numbers of steps", flag_values=values)
    flags.DEFINE_list("sweep_ema", [], "sweep: score samples of averages of each of these lengths", flag_values=values)


def evaluate(run: Run, train: Source, test: Source, trained: Trained | None = None) -> None:
    """Draws samples and scores them; writes report.json, report.md and pictures into the run's folder.

    Beside the Fréchet distance stands that of held-out real images at the same count, and of small images with classes
    the share of each, told by a classifier of the real ones.
    """
    settings = run.config.evaluation
    names = list(run.flags.metrics or settings.metrics)
    metrics = [name for name in names if name != "bits_per_dim"]
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    evaluation.check_names(metrics, extractor)  # before hours of sampling
    trained = trained or image_modes.load(run, train)
    num_samples = run.flags.num_samples or settings.num_samples
    seeds = list(range(run.flags.seed, run.flags.seed + run.flags.num_seeds))
    if run.flags.out and len(seeds) > 1:
        raise ValueError(f"--out is one file, but there are {len(seeds)} seeds: leave it out")
    sets = [image_modes.draw_samples(run, train, trained, num_samples, seed, run.flags.out) for seed in seeds]
    bits: list[Measurement] = []
    if "bits_per_dim" in names:
        bits = image_likelihood.measure(
            run, test, trained, settings.likelihood_images, settings.bound_terms, settings.ode_steps
        )
    if jax.process_index() != 0:
        return
    reference = evaluation.reference_set(train, extractor)
    measurements = score(run, trained, sets, seeds, metrics, extractor, reference)
    if "fid" in metrics:
        measurements += beside_held_out(run, trained, sets[0], seeds[:1], test, extractor, reference)
    measurements += [*shares(run, trained, sets[0], seeds[:1], train, test), *bits]
    about = {"experiment": run.experiment, "steps trained": trained.step, "device": jax.devices()[0].device_kind}
    evaluation.write_report(run.workdir, f"{run.experiment} after {trained.step} steps", measurements, about)
    real = train.read(np.arange(train.num_examples))["image"]
    evaluation.draw_nearest(sets[0], real, run.workdir / "nearest.png")
    course = run.workdir / "metrics.jsonl"
    if course.exists() and course.stat().st_size:  # an imported model has none
        evaluation.draw_curves(course, run.workdir / "curves.png")
    print((run.workdir / "report.md").read_text(), end="")


def made_by(run: Run, trained: Trained, seeds: list[int], extractor: Extractor, train: Any) -> dict[str, Any]:
    """Returns the fields of a `Measurement` that say how these samples came to be."""
    settings = run.config.sampling
    grid = "" if settings.grid == "uniform" else f", {settings.grid} grid"
    guided = "" if settings.guidance == 1.0 else f", guidance {settings.guidance:g}"
    return {
        "features": extractor.name,
        "reference": train,
        "sampler": settings.sampler + grid + guided,
        "num_steps": settings.num_steps,
        "seeds": seeds,
        "ema": trained.average,
    }


def score(
    run: Run,
    trained: Trained,
    sets: list[np.ndarray],
    seeds: list[int],
    metrics: list[str],
    extractor: Extractor,
    reference: ReferenceSet,
) -> list[Measurement]:
    """Returns each metric over all seeds."""
    made = made_by(run, trained, seeds, extractor, reference.reference)
    scores = [evaluation.compare(samples, extractor, reference, metrics) for samples in sets]
    measurements = []
    for name in metrics:
        count = scores[0][name].num_samples
        note = evaluation.bias_note(reference, count) if name == "fid" else ""
        value = evaluation.over_seeds([one[name].value for one in scores])
        measurements.append(Measurement(TITLES[name], value, count, note=note, **made))
    return measurements


def beside_held_out(
    run: Run,
    trained: Trained,
    samples: np.ndarray,
    seeds: list[int],
    test: Source,
    extractor: Extractor,
    reference: ReferenceSet,
) -> list[Measurement]:
    """Returns the Fréchet distance of unseen real images at the same count, and the samples' over it."""
    held_out = test.read(np.arange(test.num_examples))["image"]
    found = evaluation.held_out_score(samples, held_out, reference, extractor)
    made = made_by(run, trained, seeds, extractor, reference.reference)
    unseen = {**made, "sampler": f"real images, {test.name} {test.split}", "num_steps": None, "seeds": [], "ema": None}
    note = f"1 is as good as unseen images; both over {found.count} images"
    return [
        Measurement("Fréchet distance of held-out real images", found.held_out, found.count, **unseen),
        Measurement("samples' Fréchet distance over theirs", found.ratio, found.count, note=note, **made),
    ]


def shares(
    run: Run, trained: Trained, samples: np.ndarray, seeds: list[int], train: Source, test: Source
) -> list[Measurement]:
    """Returns the share of each class among the samples, of images small enough for a machine on pixels to read."""
    if train.num_classes is None or np.prod(train.image_shape) > 256:
        return []
    real, held_out = (source.read(np.arange(source.num_examples)) for source in (train, test))
    classify = evaluation.fit_classifier(real["image"], real["label"])
    right = float(np.mean(classify(held_out["image"]) == held_out["label"]))
    found = evaluation.class_shares(classify(samples), train.num_classes)
    named = {str(number): float(share) for number, share in enumerate(found)}
    note = f"told by a support vector machine that reads {right:.1%} of the held-out images"
    made = made_by(run, trained, seeds, evaluation.PIXELS, evaluation.reference_of(train))
    return [Measurement("share of each class", named, len(samples), note=note, **made)]


def sweep(run: Run, train: Source) -> None:
    """Scores samples over the number of steps, or over the length of the average: a report and a picture of each."""
    if not run.flags.sweep_steps and not run.flags.sweep_ema:
        raise ValueError("--mode=sweep needs what to vary: --sweep_steps=5,10,20,50 or --sweep_ema=0.03,0.05,0.1")
    settings = run.config.evaluation
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    num_samples = run.flags.num_samples or settings.num_samples

    def fid(run: Run, trained: Trained) -> list[Measurement]:
        samples = image_modes.draw_samples(run, train, trained, num_samples, run.flags.seed)
        if jax.process_index() != 0:
            return []
        reference = evaluation.reference_set(train, extractor)
        return score(run, trained, [samples], [run.flags.seed], ["fid"], extractor, reference)

    def at_steps(num_steps: float) -> list[Measurement]:
        config = run.config.copy_and_resolve_references()
        config.sampling.num_steps = int(num_steps)
        return fid(run._replace(config=config), newest)

    sweeps: list[tuple[str, str, list[float], Callable[[float], list[Measurement]]]] = []
    if run.flags.sweep_steps:
        newest = image_modes.load(run, train)
        sweeps.append(("steps", "sampling steps", numbers("sweep_steps", run.flags.sweep_steps), at_steps))
    if run.flags.sweep_ema:
        lengths = numbers("sweep_ema", run.flags.sweep_ema)
        sweeps.append(
            ("ema", "relative length of the average", lengths, lambda x: fid(run, image_modes.load(run, train, x)))
        )
    for name, label, values, at in sweeps:
        found = [at(x) for x in values]
        if jax.process_index() != 0:
            continue
        folder = run.workdir / "sweeps" / name
        rows = [one._replace(name=f"{one.name}, {label} {x:g}") for x, (one,) in zip(values, found, strict=True)]
        evaluation.write_report(folder, f"Over the {label}", rows, {"experiment": run.experiment})
        evaluation.draw_sweep(values, [plain(one.value) for one in rows], folder / "fid.png", label, TITLES["fid"])
        print((folder / "report.md").read_text(), end="")


def numbers(flag: str, values: list[str]) -> list[float]:
    """Returns the numbers of a list flag.

    Raises:
      ValueError: one is no number above 0.
    """
    try:
        found = [float(value) for value in values]
    except ValueError as error:
        raise ValueError(f"--{flag}={','.join(values)}: numbers are needed") from error
    if min(found) <= 0:
        raise ValueError(f"--{flag}={','.join(values)}: every number must be above 0")
    return found


def plain(value: float | Mapping[str, float]) -> float:
    """Returns a value's number, or its mean."""
    return value["mean"] if isinstance(value, Mapping) else value
