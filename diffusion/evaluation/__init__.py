"""Samples -> features -> metrics -> a report in which no number stands without how it was made."""

from diffusion.evaluation.curves import draw_curves
from diffusion.evaluation.features import class_shares, fit_classifier, pixel_features
from diffusion.evaluation.held_out import HeldOutScore, fixed_subset, held_out_score
from diffusion.evaluation.report import Measurement, Reference, reference_of, write_report

__all__ = [
    "HeldOutScore",
    "Measurement",
    "Reference",
    "class_shares",
    "draw_curves",
    "fit_classifier",
    "fixed_subset",
    "held_out_score",
    "pixel_features",
    "reference_of",
    "write_report",
]
