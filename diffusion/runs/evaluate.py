"""--mode=evaluate: samples scored against the training images, beside images never seen."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion import evaluation
from diffusion.data.sources import Source, check_apart
from diffusion.evaluation import Extracted, Extractor, Measurement, ReferenceSet
from diffusion.model.likelihood import check_mean
from diffusion.model.losses import make_objective
from diffusion.model.processes import make_process
from diffusion.runs import likelihood
from diffusion.runs.call import TEST, TRAIN, Call
from diffusion.runs.report import REAL, finish_run, made_by
from diffusion.runs.run import Run
from diffusion.runs.sample import draw_samples
from diffusion.training import check_seed


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this mode."""
    flags.DEFINE_list(
        "metrics",
        None,
        f"evaluate: of {', '.join(evaluation.METRICS)}, bits_per_dim, in place of the config's",
        flag_values=values,
    )
    flags.DEFINE_integer("num_seeds", 1, "evaluate: seeds, from --seed on", lower_bound=1, flag_values=values)


def evaluate(call: Call, run: Run | None = None) -> None:
    """Measures the run as its experiment asks, or as any images can be; writes report.json, report.md and pictures."""
    if run is None:
        _ = call.writers  # refused now, where one is
        (call.task.ready or ready)(call)
        run = call.open()
    measurements = (call.task.evaluate or of_images)(call, run)
    finish_run(run.workdir, run.experiment, run.step, measurements, writers=call.writers)


def ready(call: Call) -> None:
    """Checks what `of_images` needs, before hours of training or sampling.

    Raises:
      ValueError: unknown metrics, features that cannot be had, too few samples or images, or no test images.
    """
    settings, asked = call.config.evaluation, call.flags
    metrics = [name for name in asked.metrics or settings.metrics if name != "bits_per_dim"]
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    num_samples = asked.num_samples or settings.num_samples
    train, test = call.task.read(call.config, TRAIN), call.task.read(call.config, TEST)
    check_apart(test, train.fingerprint)
    evaluation.check_names(metrics, extractor, num_samples=num_samples, num_reference=train.num_examples)
    if "fid" in metrics:
        evaluation.check_names(["fid"], num_samples=test.num_examples)
    if "bits_per_dim" in (asked.metrics or settings.metrics):
        check_mean(make_objective(call.config, make_process(call.config)))
        steps = call.config.process.get("num_steps")
        if steps and settings.bound_terms >= steps:
            raise ValueError(f"evaluation.bound_terms={settings.bound_terms}: the chain has {steps} steps; 0 takes all")


def of_images(call: Call, run: Run) -> list[Measurement]:
    """Returns the scores of samples against the training images, and draws those nearest to them.

    Beside the FID is that of held-out real images at the same count, and of small images with classes the
    share of each, counted by a classifier of the real ones.
    """
    settings, asked = run.config.evaluation, call.flags
    names = list(asked.metrics or settings.metrics)
    metrics = [name for name in names if name != "bits_per_dim"]
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    train, test = call.task.read(call.config, TRAIN), call.task.read(call.config, TEST)
    if train.image_shape != run.model.space.image_shape:
        raise ValueError(
            f"{run.workdir} draws images of shape {run.model.space.image_shape}, and {train.name} has "
            f"{train.image_shape}: give its own data by --config.data"
        )
    num_samples = asked.num_samples or settings.num_samples
    seeds = [check_seed(seed) for seed in range(asked.seed, asked.seed + asked.num_seeds)]
    if asked.out and len(seeds) > 1:
        raise ValueError(f"--out is one file, but there are {len(seeds)} seeds: leave it out")
    requests, index = run.requests(num_samples), np.arange(num_samples)
    sets = [draw_samples(run, requests, index, seed, out=asked.out) for seed in seeds]
    bits: list[Measurement] = []
    if "bits_per_dim" in names:
        bits = likelihood.measure(run, test, settings.likelihood_images, settings.bound_terms, settings.ode_steps)
    if jax.process_index() != 0:
        return []
    reference = evaluation.reference_set(train, extractor)
    extracted = [evaluation.extract(samples, extractor, reference) for samples in sets] if metrics else []
    measurements = score(run, extracted, seeds, metrics, extractor, reference)
    if "fid" in metrics:
        measurements += beside_held_out(run, extracted[0], seeds[:1], test, extractor, reference)
    real = train.read(np.arange(train.num_examples))["image"]
    evaluation.draw_nearest(sets[0], real, run.workdir / "nearest.png")
    return [*measurements, *shares(run, sets[0], seeds[:1], train, test), *bits]


def score(
    run: Run,
    sets: list[Extracted],
    seeds: list[int],
    metrics: list[str],
    extractor: Extractor,
    reference: ReferenceSet,
) -> list[Measurement]:
    """Returns each metric of `sets` of samples, one per seed, over all seeds."""
    made: dict[str, Any] = {"features": extractor.name, "reference": reference.reference, "seeds": seeds}
    scores = [evaluation.compare(samples, extractor, reference, metrics) for samples in sets]
    measurements: list[Measurement] = []
    for name in metrics:
        count = scores[0][name].num_samples
        note = evaluation.bias_note(reference, count) if name == "fid" else ""
        value = evaluation.over_seeds([one[name].value for one in scores])
        measurements.append(
            Measurement(evaluation.METRICS[name].title, value, count, note=note, **made, **made_by(run))
        )
    return measurements


def beside_held_out(
    run: Run,
    samples: Extracted,
    seeds: list[int],
    test: Source,
    extractor: Extractor,
    reference: ReferenceSet,
) -> list[Measurement]:
    """Returns the FID of unseen real images, and the samples' over it, at the same count."""
    held_out = test.read(np.arange(test.num_examples))["image"]
    found = evaluation.held_out_score(samples, held_out, reference, extractor)
    what: dict[str, Any] = {"features": extractor.name, "reference": reference.reference}
    unseen = {**what, **REAL, "sampler": f"real images, {test.name} {test.split}"}
    sets = f"the mean of {found.parts} sets of as many samples" if found.parts > 1 else "as many samples"
    note = f"1 is as good as unseen images; both over {found.count} images, {sets}"
    ratio: Any = found.ratio
    if found.standard_error is not None:
        ratio = {"mean": found.ratio, "standard error": found.standard_error}
    made = {**what, **made_by(run), "seeds": seeds, "note": note}
    return [
        Measurement("FID of held-out real images", found.held_out, found.count, **unseen),
        Measurement("samples' FID over theirs", ratio, found.count * found.parts, **made),
    ]


def shares(run: Run, samples: np.ndarray, seeds: list[int], train: Source, test: Source) -> list[Measurement]:
    """Returns the share of each class among the samples, of images small enough for a machine on pixels to read."""
    if train.num_classes is None or np.prod(train.image_shape) > 256:
        return []
    real, held_out = (source.read(np.arange(source.num_examples)) for source in (train, test))
    classify = evaluation.fit_classifier(real["image"], real["label"])
    right = float(np.mean(classify(held_out["image"]) == held_out["label"]))
    found = evaluation.class_shares(classify(samples), train.num_classes)
    named: Mapping[str, float] = {str(number): float(share) for number, share in enumerate(found)}
    made: dict[str, Any] = {
        "features": evaluation.PIXELS.name,
        "reference": evaluation.reference_of(train),
        "seeds": seeds,
        "note": f"counted by a support vector machine that reads {right:.1%} of the held-out images",
    }
    return [Measurement("share of each class", named, len(samples), **made, **made_by(run))]


def first_metric(call: Call, run: Run) -> Measurement:
    """Returns the first of --metrics, else the FID, of samples of one seed: what sweeps draw."""
    settings, asked = run.config.evaluation, call.flags
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    train = call.task.read(call.config, TRAIN)
    num_samples = asked.num_samples or settings.num_samples
    metrics = list(asked.metrics or ["fid"])[:1]
    evaluation.check_names(metrics, extractor, num_samples=num_samples, num_reference=train.num_examples)
    drawn = draw_samples(run, run.requests(num_samples), np.arange(num_samples), asked.seed)
    reference = evaluation.reference_set(train, extractor)
    samples = evaluation.extract(drawn, extractor, reference)
    (measured,) = score(run, [samples], [asked.seed], metrics, extractor, reference)
    return measured
