"""Text to image on captioned scenes (16x16): the MM-DiT steered by a frozen CLIP, trained before on the same scenes.

    ./launch.sh clip
    ./launch.sh scenes --config=experiments/configs/scenes_clip.py

All else is scenes_mmdit.py. Half of its steps satisfy 72% of never-seen prompts, sizes and relations least (45, 43%).
"""

from ml_collections import ConfigDict

from experiments.configs import scenes_mmdit


def get_config() -> ConfigDict:
    config = scenes_mmdit.get_config()
    config.text.encoder = "clip"
    config.text.clip = "runs/clip"
    config.text.precomputed = True  # 15 seconds once
    return config
