"""Two halves of CIFAR-10's training set against each other: our FID, KID, precision and recall, and those of the tools.

    PYTHONPATH=.:PEER/lib/python3.11/site-packages python -m benchmarks.metrics_peer --data_dir=DIR --json OUT.json

PEER is an environment with PyTorch, pytorch-fid and torch-fidelity. The features are a seeded random projection of the
pixels to 256 numbers and a tanh. FID is over 25,000 + 25,000 images; KID, precision and recall over the first 4,000 of
each half, because torch-fidelity holds whole matrices. The tools' formulas are called as in
`tests/golden/record_metrics.py`. `--data_name=digits` needs no prepared data.
"""

import runpy
from pathlib import Path

import numpy as np

from benchmarks.common import make_parser, write_results
from diffusion import metrics
from diffusion.data.named import named_images

PEERS = Path(__file__).parents[1] / "tests" / "golden" / "record_metrics.py"
FEW = 4000


def features_of(image: np.ndarray) -> np.ndarray:
    """Returns the tanh of pixels in [-1, 1] times a random matrix: float32 [N, 256]."""
    pixels = image.reshape(len(image), -1).astype(np.float32) / 127.5 - 1
    matrix = np.random.RandomState(0).randn(pixels.shape[1], 256).astype(np.float32)
    return np.tanh(pixels @ (matrix / np.sqrt(pixels.shape[1])))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_name", default="cifar10", help="of the images, as --config.data.name takes it")
    parser.add_argument("--data_dir", default="", help="where TFDS has its sets")
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()

    peers = runpy.run_path(str(PEERS))
    source = named_images(arguments.data_name, "train", data_dir=arguments.data_dir)
    features = features_of(source.read(np.arange(source.num_examples))["image"])
    half = len(features) // 2
    first, second = features[:half], features[half : 2 * half]
    one, other = metrics.statistics(first), metrics.statistics(second)
    few = first[:FEW], second[:FEW]
    results = {
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
    print(write_results(arguments.json, results), end="")


if __name__ == "__main__":
    main()
