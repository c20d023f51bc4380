"""Samples -> features -> metrics -> a report, in which every number comes with how it was made."""

from diffusion.extras import need

need("runs")

from diffusion.evaluation.clip_features import clip_extractor, clip_score, load_encoder
from diffusion.evaluation.extractors import make_extractor
from diffusion.evaluation.features import (
    PIXELS,
    Extracted,
    Extractor,
    class_shares,
    fit_classifier,
    inception_extractor,
    network_extractor,
    pixel_features,
)
from diffusion.evaluation.figures import draw_curves, draw_nearest, draw_sweep, draw_terms
from diffusion.evaluation.held_out import HeldOutScore, held_out_score
from diffusion.evaluation.printed import print_report
from diffusion.evaluation.report import Measurement, Reference, reference_of, write_report
from diffusion.evaluation.scores import (
    METRICS,
    Metric,
    ReferenceSet,
    Score,
    all_images,
    bias_note,
    check_names,
    compare,
    count_bias,
    extract,
    fixed_subset,
    over_seeds,
    read_statistics,
    reference_set,
)

__all__ = [
    "METRICS",
    "PIXELS",
    "Extracted",
    "Extractor",
    "HeldOutScore",
    "Measurement",
    "Metric",
    "Reference",
    "ReferenceSet",
    "Score",
    "all_images",
    "bias_note",
    "check_names",
    "class_shares",
    "clip_extractor",
    "clip_score",
    "compare",
    "count_bias",
    "draw_curves",
    "draw_nearest",
    "draw_sweep",
    "draw_terms",
    "extract",
    "fit_classifier",
    "fixed_subset",
    "held_out_score",
    "inception_extractor",
    "load_encoder",
    "make_extractor",
    "network_extractor",
    "over_seeds",
    "pixel_features",
    "print_report",
    "read_statistics",
    "reference_of",
    "reference_set",
    "write_report",
]
