"""Two halves of CIFAR-10's training set against each other: our FID, KID, precision and recall, and the tools' own.

    PYTHONPATH=.:PEER/lib/python3.11/site-packages python -m benchmarks.metrics_peer --data_dir=DIR --json OUT.json

PEER has PyTorch, pytorch-fid and torch-fidelity. The features are a seeded random projection of the pixels to 256
numbers and a tanh. FID is over 25,000 + 25,000 images; KID, precision and recall over the first 4,000 of each half, as
torch-fidelity holds whole matrices. The tools' formulae are called as in `tests/golden/record_metrics.py`.
"""

import argparse
import json
import runpy
from pathlib import Path

import numpy as np

from diffusion import metrics
from diffusion.data.tfds import tfds_source
from diffusion.files import replacing

PEERS = Path(__file__).parents[1] / "tests" / "golden" / "record_metrics.py"
FEW = 4000


def features_of(image: np.ndarray) -> np.ndarray:
    """tanh of pixels in [-1, 1] times a random matrix: float32 [N, 256]."""
    pixels = image.reshape(len(image), -1).astype(np.float32) / 127.5 - 1
    matrix = np.random.RandomState(0).randn(pixels.shape[1], 256).astype(np.float32)
    return np.tanh(pixels @ (matrix / np.sqrt(pixels.shape[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="where TFDS has its sets")
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()

    peers = runpy.run_path(str(PEERS))
    source = tfds_source("cifar10", "train", arguments.data_dir)
    features = features_of(source.read(np.arange(source.num_examples))["image"])
    first, second = features[: len(features) // 2], features[len(features) // 2 :]
    one, other = metrics.statistics(first), metrics.statistics(second)
    few = first[:FEW], second[:FEW]
    result = {
        "reference": {"name": source.name, "split": source.split, "fingerprint": source.fingerprint},
        "frechet_distance": {
            "ours": metrics.frechet_distance(one.mean, one.cov, other.mean, other.cov),
            **peers["fids"](first, second),
        },
        "kernel_distance": {"ours": metrics.kernel_distance(*few).value, "torch_fidelity": peers["kid"](*few)},
        "precision_recall": {
            "ours": list(metrics.precision_recall(*few)),
            "torch_fidelity": peers["precision_recall"](*few),
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        with replacing(arguments.json) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
