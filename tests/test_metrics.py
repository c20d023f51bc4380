"""Metrics against closed forms, SciPy's and scikit-learn's routes, and what must not change them."""

import pathlib
import runpy

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.special
import scipy.stats
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from diffusion import metrics
from diffusion.metrics import frechet_distance, inception_score, kernel_distance, precision_recall, statistics

rng = np.random.RandomState(0)


def random_cov(width, rank=None):
    factor = rng.randn(width, rank or 2 * width)
    return factor @ factor.T / width


def test_statistics_are_numpys():
    features = (rng.randn(5000, 7) @ rng.randn(7, 7) + 1e3).astype(np.float32)
    got = statistics(features)
    exact = features.astype(np.float64)
    # float64 rounding of 5000 squares: 5000 * 1e-16 of a variance of about 7.
    np.testing.assert_allclose(got.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.cov, np.cov(exact, rowvar=False), rtol=0, atol=1e-11)
    assert got.count == 5000 and got.cov.dtype == np.float64


# --- Fréchet distance


def test_frechet_distance_of_gaussians_in_one_dimension_and_along_axes():
    std_1, std_2, mean = rng.rand(6) + 0.1, rng.rand(6) + 0.1, rng.randn(6)
    turn = scipy.stats.ortho_group.rvs(6, random_state=0)
    for basis in (np.eye(6), turn):
        cov_1, cov_2 = basis @ np.diag(std_1**2) @ basis.T, basis @ np.diag(std_2**2) @ basis.T
        expected = (mean**2).sum() + ((std_1 - std_2) ** 2).sum()
        assert frechet_distance(mean, cov_1, np.zeros(6), cov_2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_scipys_formula():
    for width in (2, 10, 100):
        mean_1, mean_2, cov_1, cov_2 = rng.randn(width), rng.randn(width), random_cov(width), random_cov(width)
        root = np.trace(scipy.linalg.sqrtm(cov_1 @ cov_2)).real
        expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * root
        got = frechet_distance(mean_1, cov_1, mean_2, cov_2)
        assert got == pytest.approx(expected, rel=1e-9)  # what sqrtm itself is good for
        assert frechet_distance(mean_2, cov_2, mean_1, cov_1) == pytest.approx(got, rel=1e-12)


def test_frechet_distance_of_two_by_two_matrices():
    # By Cayley-Hamilton the trace of the root of a 2x2 matrix M is sqrt(tr M + 2 sqrt(det M)).
    cov_1, cov_2 = random_cov(2), random_cov(2)
    product = cov_1 @ cov_2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(cov_1) + np.trace(cov_2) - 2 * root
    assert frechet_distance(np.zeros(2), cov_1, np.zeros(2), cov_2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_singular_covariances_is_exact():
    # The root of (u u') C has the one eigenvalue sqrt(u' C u). sqrtm is off by 1e-8 for such matrices.
    u, cov = rng.randn(50), random_cov(50, rank=20)
    expected = u @ u + np.trace(cov) - 2 * np.sqrt(u @ cov @ u)
    assert frechet_distance(np.zeros(50), np.outer(u, u), np.zeros(50), cov) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(np.zeros(50), cov, np.zeros(50), cov) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(np.ones(50), 0 * cov, np.zeros(50), 0 * cov) == 50


def test_frechet_distance_is_metric_in_scale():
    # Features times s make it s^2 times as large, whatever their unit: no absolute tolerance is hidden in it.
    means, covs = rng.randn(2, 8), (random_cov(8), random_cov(8, rank=3))
    one = frechet_distance(means[0], covs[0], means[1], covs[1])
    for scale in (1e-6, 1e6):
        scaled = frechet_distance(scale * means[0], scale**2 * covs[0], scale * means[1], scale**2 * covs[1])
        assert scaled == pytest.approx(scale**2 * one, rel=1e-12)


def test_frechet_distances_error_messages():
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match=r"agree in D.*\(4, 4\)"):
        frechet_distance(mean, cov, mean, np.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(mean, cov, mean, cov * np.nan)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(mean * np.nan, cov, mean, cov)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(mean, cov, mean, cov - 2 * np.outer([1, 0, 0], [1, 0, 0]))


# --- kernel distance


def unbiased_mmd(x, y):
    """The textbook estimator from scikit-learn's whole kernel matrices."""
    own = [polynomial_kernel(z, degree=3, coef0=1) for z in (x, y)]  # its gamma is 1 / D
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own)
    return within - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean()


def test_kernel_distance_is_the_unbiased_estimator(monkeypatch):
    x, y = rng.randn(60, 5), rng.randn(45, 5) * 1.2 + 0.1
    got = kernel_distance(x, y)
    assert got.value == pytest.approx(unbiased_mmd(x, y), rel=1e-10)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert kernel_distance(x, y).value == pytest.approx(got.value, rel=1e-12)
    assert kernel_distance(y, x) == pytest.approx(got, rel=1e-12)


def test_kernel_distances_error_is_the_jackknife():
    x, y = rng.randn(12, 4), rng.randn(9, 4) + 0.3
    variance = 0.0
    for which, count in (("x", 12), ("y", 9)):
        kept = [np.delete(np.arange(count), i) for i in range(count)]
        left = [unbiased_mmd(x[rows], y) if which == "x" else unbiased_mmd(x, y[rows]) for rows in kept]
        variance += (count - 1) / count * np.square(np.array(left) - np.mean(left)).sum()
    assert kernel_distance(x, y).standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_kernel_distance_of_gaussians():
    # For one dimension the kernel is (xy + 1)^3, so the MMD is that of three moments: dx^3^2 + 3 dx^2^2 + 3 dx^2.
    def moments(mean, std):
        return np.array([mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])

    exact = np.array([3.0, 3.0, 1.0]) @ np.square(moments(0.5, 1.0) - moments(0.0, 1.2))
    draws = [kernel_distance(rng.randn(200, 1) + 0.5, 1.2 * rng.randn(300, 1)) for _ in range(200)]
    values, errors = np.array(draws).T
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(200)  # unbiased, to four standard errors
    # The errors describe the spread; heavy tails (sixth powers) leave them uncertain themselves.
    assert 0.8 < np.sqrt((errors**2).mean()) / values.std() < 1.3
    same = np.array([kernel_distance(rng.randn(100, 2), rng.randn(100, 2)).value for _ in range(200)])
    assert abs(same.mean()) < 4 * same.std() / np.sqrt(200) and (same < 0).any()


# --- inception score


def test_inception_score_of_what_is_known():
    certain = np.eye(10)[np.arange(200) % 10]
    assert inception_score(certain) == pytest.approx((10, 0), abs=1e-12)
    assert inception_score(np.full((200, 10), 0.1)) == pytest.approx((1, 0), abs=1e-12)
    halves = np.eye(10)[np.repeat([0, 1, 2, 3], 50)]  # two splits of two classes each, one whole of four
    assert inception_score(halves, 2) == pytest.approx((2, 0), abs=1e-12)
    assert inception_score(halves, 1) == pytest.approx((4, 0), abs=1e-12)


def test_inception_score_is_the_mutual_information():
    probability = rng.dirichlet(np.full(7, 0.3), 103).astype(np.float32)
    splits = [probability[:51].astype(np.float64), probability[51:].astype(np.float64)]
    exact = []
    for part in splits:
        part = part / part.sum(1, keepdims=True)
        exact.append(np.exp(scipy.stats.entropy(part.mean(0)) - scipy.stats.entropy(part, axis=1).mean()))
    got = inception_score(probability, 2)
    assert got == pytest.approx((np.mean(exact), np.std(exact)), rel=1e-5)  # float32 rows sum to 1 only to 1e-7


def test_inception_scores_error_messages():
    with pytest.raises(ValueError, match="softmax"):
        inception_score(rng.randn(20, 5))
    with pytest.raises(ValueError, match="5 images cannot be split into 10 parts"):
        inception_score(np.eye(5))


# --- precision and recall


def test_precision_and_recall_on_a_line():
    # Real points at 0, 1, .., 9 have balls of radius 1 (k = 1); generated ones at 3.5, 4.5 too, the one at 30 of 25.5.
    real, generated = np.arange(10.0)[:, None], np.array([[3.5], [4.5], [30.0]])
    precision, recall = precision_recall(real, generated, num_neighbours=1)
    assert precision == pytest.approx(2 / 3)  # not the one at 30
    assert recall == pytest.approx(7 / 10)  # 3 to 5 from the first two balls, and 5 to 9 (4.5 to 55.5) from the third
    far = precision_recall(real, generated + 1000, num_neighbours=2)
    assert far.precision == 0 and far.recall == 0
    assert precision_recall(real, real) == (1, 1)


def test_precision_and_recall_are_scikit_learns_neighbours(monkeypatch):
    real, generated = rng.randn(150, 6).astype(np.float32), (1.2 * rng.randn(90, 6) + 0.6).astype(np.float32)

    def share(points, centres, k):
        radius = NearestNeighbors(n_neighbors=k).fit(centres).kneighbors()[0][:, -1]  # of others than itself
        distance = scipy.spatial.distance.cdist(points, centres)
        return (distance <= radius).any(1).mean()

    monkeypatch.setattr(metrics, "_BLOCK", 40)
    for k in (1, 3, 5):
        got = precision_recall(real, generated, k)
        assert got == pytest.approx((share(generated, real, k), share(real, generated, k)), abs=1e-12)
        assert 0 < got.recall < 1 and 0 < got.precision < 1


# --- all of them


def test_the_order_of_the_samples_does_not_matter():
    x, y = rng.randn(300, 6), rng.randn(200, 6) + 0.2
    a, b = rng.permutation(300), rng.permutation(200)

    def scores(x, y):
        first, second = statistics(x), statistics(y)
        distance = frechet_distance(first.mean, first.cov, second.mean, second.cov)
        return [distance, *kernel_distance(x, y), *precision_recall(x, y)]

    assert scores(x, y) == pytest.approx(scores(x[a], y[b]), rel=1e-11)


def test_bad_features_get_one_line():
    good, nan = rng.randn(20, 3), rng.randn(20, 3)
    nan[13, 1] = np.nan
    for call in (
        lambda features: statistics(features),
        lambda features: kernel_distance(good, features),
        lambda features: kernel_distance(features, good),
        lambda features: precision_recall(good, features),
        lambda features: precision_recall(features, good),
        lambda features: inception_score(features),
    ):
        for features, line in [
            (nan, "NaN or infinity at row 13"),
            (good[:1], r"at least [234] features are needed, not 1"),
            (good[0], r"float \[N, D\], not float64\[3\]"),
            (good.astype(int), r"float \[N, D\], not int64\[20, 3\]"),
        ]:
            with pytest.raises(ValueError, match=line):
                call(features)
    for call in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="of 3 and of 2 numbers"):
            call(good, good[:, :2])


# --- the tools that published figures come from (recorded, see golden/record_metrics.py)

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECORDED = runpy.run_path(str(GOLDEN / "record_metrics.py"))  # for its sizes and seeded features


@pytest.mark.parametrize("name", RECORDED["SIZES"])
def test_distances_are_pytorch_fids_and_torch_fidelitys(name):
    golden = np.load(GOLDEN / "metrics.npz")
    x, y = RECORDED["seeded_features"](*RECORDED["SIZES"][name])
    first, second = statistics(x), statistics(y)
    fid = frechet_distance(first.mean, first.cov, second.mean, second.cov)
    # Where N < D the tools' roots of a singular product are themselves good to 3e-8 only: by 50 digits the FID of
    # "singular" is 25.13604971, by torch-fidelity 25.13604901, by pytorch-fid 25.13604908.
    assert fid == pytest.approx(golden[f"{name}/torch_fidelity"], rel=1e-7)
    assert fid == pytest.approx(golden[f"{name}/pytorch_fid"], rel=1e-7)
    if f"{name}/exact_fid" in golden:
        assert fid == pytest.approx(golden[f"{name}/exact_fid"], rel=1e-12)
    if f"{name}/kid" in golden:
        assert kernel_distance(x, y).value == pytest.approx(golden[f"{name}/kid"], rel=1e-9)
    # torch-fidelity takes means of float32 zeros and ones.
    assert precision_recall(x, y) == pytest.approx(golden[f"{name}/precision_recall"], rel=1e-6)


def test_inception_score_is_torch_fidelitys():
    golden = np.load(GOLDEN / "metrics.npz")
    probability = scipy.special.softmax(RECORDED["seeded_logits"](1003, 20, 5).astype(np.float64), axis=1)
    assert inception_score(probability) == pytest.approx(golden["inception_score"], rel=1e-9)
