"""Extractors by the names that a config or a command line gives them."""

from pathlib import Path

from diffusion.evaluation.clip_features import clip_extractor, load_encoder
from diffusion.evaluation.features import PIXELS, Extractor, inception_extractor

NAMES = ("inception", "pixels", "clip")


def make_extractor(name: str, weights: str | None = None) -> Extractor:
    """Returns the extractor of a name.

    Args:
      name: "pixels"; "inception"; or "clip", a published one.
      weights: Inception's file (empty: in the cache, fetched once), or CLIP's folder.

    Raises:
      ValueError: an unknown name, or weights that are missing, damaged or cannot be fetched.
    """
    match name:
        case "pixels":
            return PIXELS
        case "inception":
            return inception_extractor(Path(weights).expanduser() if weights else None)
        case "clip" if weights:
            return clip_extractor(load_encoder(weights))
        case "clip":
            raise ValueError(
                "features=clip needs the folder of a published CLIP (config.json, weights, tokenizer): name it by "
                "--weights, or evaluation.weights in a config"
            )
    raise ValueError(f"unknown features {name!r}: choose from {', '.join(NAMES)}")
