"""Extractors by the names that a config or a command line gives them."""

from diffusion.evaluation.clip_features import clip_extractor, load_encoder
from diffusion.evaluation.features import PIXELS, Extractor, inception_extractor

NAMES = ("inception", "pixels", "clip")


def make_extractor(name: str, weights: str | None = None) -> Extractor:
    """Returns the extractor that `name` says.

    Args:
      name: "pixels"; "inception", with its weights from a path or the cache; "clip", a published CLIP.
      weights: Inception's file, or CLIP's folder.

    Raises:
      ValueError: another name, or weights that cannot be had.
    """
    match name:
        case "pixels":
            return PIXELS
        case "inception":
            return inception_extractor(weights or None)
        case "clip" if weights:
            return clip_extractor(load_encoder(weights))
        case "clip":
            raise ValueError("features=clip needs the folder of a published CLIP (config.json, weights, tokenizer)")
    raise ValueError(f"features are {name!r}: choose {', '.join(NAMES)}")
