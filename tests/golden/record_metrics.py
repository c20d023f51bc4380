"""Records metrics.npz: what pytorch-fid and torch-fidelity make of seeded features, the numbers alone.

Run with PyTorch, pytorch-fid and torch-fidelity installed: `python tests/golden/record_metrics.py`. The features are
made again by `seeded_features`, by the tests too. FID is also computed in 50 digits where D is small.
"""

import pathlib
import warnings
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
# name: N of the one set, N of the other, D, seed. KID of all pairs by torch-fidelity needs sets of one size.
SIZES = {
    "many": (600, 600, 16, 1),
    "unequal": (500, 350, 64, 2),
    "singular": (40, 40, 64, 3),
    "inception": (300, 300, 512, 4),
}


def seeded_features(first: int, second: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of float32 features that overlap: positive, correlated and of unequal scales, as Inception's are."""
    random = np.random.RandomState(seed)
    mix = random.randn(width, width) / np.sqrt(width)
    scale = np.exp(0.5 * random.randn(width))
    x = np.abs(random.randn(first, width) @ mix) * scale
    y = np.abs(random.randn(second, width) @ mix + 0.1) * (1.05 * scale)
    return x.astype(np.float32), y.astype(np.float32)


def seeded_logits(count: int, num_classes: int, seed: int) -> np.ndarray:
    return (3 * np.random.RandomState(seed).randn(count, num_classes)).astype(np.float32)


def fids(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """FID by both tools' formulae from the same float64 statistics."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first, second = ({"mu": z.mean(0), "sigma": np.cov(z, rowvar=False)} for z in (x.astype("f8"), y.astype("f8")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy calls `disp` old
        theirs: Any = calculate_frechet_distance(first["mu"], first["sigma"], second["mu"], second["sigma"])
    return {
        "pytorch_fid": float(theirs),
        "torch_fidelity": fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID],
    }


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of one subset that is all of both sets, by torch-fidelity; the sets are of one size."""
    import torch
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    both = [torch.from_numpy(z.astype("f8")) for z in (x, y)]
    answer = kid_features_to_metric(*both, kid_subsets=1, kid_subset_size=len(x), verbose=False)
    return answer[KEY_METRIC_KID_MEAN]


def precision_recall(real: np.ndarray, generated: np.ndarray) -> list[float]:
    import torch
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    both = [torch.from_numpy(z.astype("f8")) for z in (generated, real)]
    answer = prc_features_to_metric(*both, verbose=False)
    return [answer[KEY_METRIC_PRECISION], answer[KEY_METRIC_RECALL]]


def inception_score(logits: np.ndarray) -> list[float]:
    import torch
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    answer = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    return [answer[KEY_METRIC_ISC_MEAN], answer[KEY_METRIC_ISC_STD]]


def exact_fid(x: np.ndarray, y: np.ndarray) -> float:
    """FID with 50 digits throughout: the square roots of the eigenvalues of A C2 A with A A = C1."""
    import mpmath as mp

    mp.mp.dps = 50

    def moments(z):
        rows = mp.matrix(z.astype("f8").tolist())
        mean = mp.matrix([mp.fsum(rows[:, i]) / rows.rows for i in range(rows.cols)])
        for i in range(rows.rows):
            for j in range(rows.cols):
                rows[i, j] -= mean[j]
        return mean, rows.T * rows / (rows.rows - 1)

    (mean_1, cov_1), (mean_2, cov_2) = moments(x), moments(y)
    value, vector = mp.eigsy(cov_1)
    root = vector * mp.diag([mp.sqrt(max(v, mp.mpf(0))) for v in value]) * vector.T
    inner = root * cov_2 * root
    product = mp.eigsy((inner + inner.T) / 2, eigvals_only=True)
    trace = mp.fsum(mp.sqrt(max(v, mp.mpf(0))) for v in product)
    total = mp.fsum((a - b) ** 2 for a, b in zip(mean_1, mean_2, strict=True))
    return float(total + mp.fsum(cov_1[i, i] + cov_2[i, i] for i in range(cov_1.rows)) - 2 * trace)


def main():
    numbers = {}
    for name, (first, second, width, seed) in SIZES.items():
        x, y = seeded_features(first, second, width, seed)
        numbers |= {f"{name}/{tool}": value for tool, value in fids(x, y).items()}
        numbers[f"{name}/precision_recall"] = precision_recall(x, y)
        if first == second:
            numbers[f"{name}/kid"] = kid(x, y)
        if width <= 64:
            numbers[f"{name}/exact_fid"] = exact_fid(x, y)
    numbers["inception_score"] = inception_score(seeded_logits(1003, 20, 5))
    for name, value in numbers.items():
        print(name, value)
    np.savez(HERE / "metrics.npz", **numbers)


if __name__ == "__main__":
    main()
