import numpy as np
import pytest

from s2dm_jax.evaluation.metrics import feature_statistics, frechet_distance


def random_covariance(rng, size, rank):
    factor = rng.standard_normal((size, rank))
    return factor @ factor.T


def random_gaussian(rng, size, rank):
    return rng.standard_normal(size), random_covariance(rng, size, rank)


def test_statistics_equal_numpy():
    features = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32) + 3
    mean, cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


def test_statistics_of_two_vectors_by_hand():
    mean, cov = feature_statistics([[0, 2], [2, 6]])
    np.testing.assert_array_equal(mean, [1, 4])
    np.testing.assert_array_equal(cov, [[2, 4], [4, 8]])


def test_diagonal_gaussians():
    mean1, mean2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    std1, std2 = np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0, 3.0])
    expected = (1 + 0 + 4) + (1 + 9 + 0)
    assert frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2)) == pytest.approx(expected)


def test_shift_alone_is_the_squared_distance_of_the_means():
    mean, cov = random_gaussian(np.random.default_rng(1), 6, 10)
    assert frechet_distance(mean, cov, mean + 0.5, cov) == pytest.approx(6 * 0.25, abs=1e-10)


@pytest.mark.parametrize("rank", [1, 20, 64, 100])
def test_identical_gaussians_are_at_zero(rank):
    mean, cov = random_gaussian(np.random.default_rng(2), 64, rank)
    assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-9


def test_covariances_that_commute():
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    std1, std2 = rng.uniform(0, 3, 8), rng.uniform(0, 3, 8)
    cov1, cov2 = (basis * std1**2) @ basis.T, (basis * std2**2) @ basis.T
    expected = np.sum((std1 - std2) ** 2)
    assert frechet_distance(np.zeros(8), cov1, np.zeros(8), cov2) == pytest.approx(expected, rel=1e-10)


def test_two_by_two_covariances_that_do_not_commute():
    # tr √M = √(tr M + 2 √det M) for a 2×2 matrix M with nonnegative eigenvalues.
    cov1, cov2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    product = cov1 @ cov2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(cov1) + np.trace(cov2) - 2 * root
    assert frechet_distance(np.zeros(2), cov1, np.zeros(2), cov2) == pytest.approx(expected, rel=1e-12)


def test_rank_one_covariances():
    # √(aaᵀ) against bbᵀ: the only eigenvalue of the product is (a·b)².
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 30))
    expected = a @ a + b @ b - 2 * abs(a @ b)
    zero = np.zeros(30)
    assert frechet_distance(zero, np.outer(a, a), zero, np.outer(b, b)) == pytest.approx(expected, rel=1e-7)


def test_zero_covariance():
    cov = random_covariance(np.random.default_rng(5), 5, 3)
    zero = np.zeros((5, 5))
    assert frechet_distance(np.zeros(5), zero, np.ones(5), cov) == pytest.approx(5 + np.trace(cov))
    assert frechet_distance(np.ones(5), zero, np.ones(5), zero) == 0


@pytest.mark.parametrize("ranks", [(40, 40), (5, 40), (5, 12)])
def test_symmetry_and_invariance_to_rotation(ranks):
    rng = np.random.default_rng(6)
    (mean1, cov1), (mean2, cov2) = (random_gaussian(rng, 32, rank) for rank in ranks)
    distance = frechet_distance(mean1, cov1, mean2, cov2)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(distance, rel=1e-7)
    turn = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    turned = frechet_distance(turn @ mean1, turn @ cov1 @ turn.T, turn @ mean2, turn @ cov2 @ turn.T)
    assert turned == pytest.approx(distance, rel=1e-7)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((2, 3, 4)), r"features must have shape \[N,D\] with D ≥ 1, got \[2, 3, 4\]"),
        (np.zeros((2, 0)), r"got \[2, 0\]"),
        (np.zeros((1, 3)), "at least 2 vectors for a covariance, got 1"),
        ([[1.0, np.nan], [np.inf, 0.0]], "features must be finite, got 2 values"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(ValueError, match=message):
        feature_statistics(features)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"cov1": np.eye(3)}, r"mean1 and cov1 must have shapes \[D\] and \[D,D\], got \[2\] and \[3, 3\]"),
        ({"mean2": np.zeros(3), "cov2": np.eye(3)}, "must have the same length, got 2 and 3"),
        ({"mean2": np.array([0, np.inf])}, "mean2 and cov2 must be finite"),
        ({"cov2": np.array([[1.0, np.nan], [np.nan, 1.0]])}, "mean2 and cov2 must be finite"),
        (
            {"cov2": np.array([[1.0, 0.5], [0.0, 1.0]])},
            "cov2 must be symmetric, got entries that differ by 0.5",
        ),
    ],
)
def test_bad_gaussians(replace, message):
    good = {"mean1": np.zeros(2), "cov1": np.eye(2), "mean2": np.zeros(2), "cov2": np.eye(2)}
    with pytest.raises(ValueError, match=message):
        frechet_distance(**(good | replace))
