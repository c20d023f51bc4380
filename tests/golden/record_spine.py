"""Records spine.npz, the numbers of every config that tests/test_spine.py compares.

    JAX_PLATFORMS=cpu .venv/bin/python tests/golden/record_spine.py

The arrays were first recorded by the code of commit e41a445, through experiments.image_diffusion, text_to_image and
text_modes, before diffusion/model took their place: the same tiny networks, images, keys and prompts as `numbers` has,
op by op. On one machine both gave the same bits, which compiled programs are off by some roundings. Record again only
where numbers are meant to change, and say so in CHANGELOG.md.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from test_spine import GOLDEN, IMAGES, TEXTS, numbers  # noqa: E402

if __name__ == "__main__":
    arrays = {f"{spec}/{name}": array for spec in (*IMAGES, *TEXTS) for name, array in numbers(spec).items()}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {len(arrays)} arrays, {GOLDEN.stat().st_size / 1024:.0f} kB")
