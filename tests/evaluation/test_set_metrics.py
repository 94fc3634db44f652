"""FID of whole sets, KID, Inception Score, precision and recall, against closed forms and other programs."""

import numpy as np
import pytest
import scipy.linalg

from s2dm_jax.evaluation.metrics import (
    feature_statistics,
    fid_infinity,
    frechet_distance,
    inception_score,
    init_sums,
    kid,
    mean_and_cov,
    precision_recall,
    update_sums,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def sums_in_batches(features, size):
    sums = init_sums(features.shape[1])
    for start in range(0, len(features), size):
        sums = update_sums(sums, features[start : start + size])
    return sums


def test_frechet_distance_equals_scipys_matrix_root():
    turn = normal(0, 48, 48)
    first, second = normal(1, 400, 48) @ turn, normal(2, 300, 48) @ turn * 1.2 + 0.3
    statistics = [feature_statistics(features) for features in (first, second)]
    (mean1, cov1), (mean2, cov2) = statistics
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_sums_do_not_depend_on_the_batches(size):
    # A mean that is large beside the spread: sums of plain squares would lose nine of the sixteen digits.
    features = 1000 + 0.01 * normal(3, 200, 5)
    sums = sums_in_batches(features, size)
    assert sums.number == 200
    mean, cov = mean_and_cov(sums)
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-12)


def test_a_set_in_other_batches_is_at_zero_from_itself():
    features = np.abs(normal(4, 500, 64))
    one, other = (mean_and_cov(sums_in_batches(features, size)) for size in (500, 33))
    assert frechet_distance(*one, *other) < 1e-6


def test_fewer_images_than_features_warn_and_stay_finite():
    features = normal(5, 20, 50)
    with pytest.warns(RuntimeWarning, match="20 images are too few for a covariance of 50 features"):
        one = feature_statistics(features)
    with pytest.warns(RuntimeWarning, match="singular"):
        other = mean_and_cov(sums_in_batches(features + 1, 6))
    assert frechet_distance(*one, *other) == pytest.approx(50, rel=1e-9)


def test_sums_refuse_other_widths_and_single_vectors():
    with pytest.raises(ValueError, match="features must have 3 columns, got 2"):
        update_sums(init_sums(3), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at least 2 vectors for a covariance, got 1"):
        mean_and_cov(update_sums(init_sums(3), np.zeros((1, 3))))


def test_extrapolation_removes_the_bias_of_few_samples():
    # Of N samples of the reference itself the distance is about D/N + D(D+1)/(4N), of infinitely many 0.
    features = normal(6, 2000, 40)
    reference = np.zeros(40), np.eye(40)
    plain = frechet_distance(*reference, *feature_statistics(features))
    value, error = fid_infinity(features, *reference)
    assert plain == pytest.approx(40 / 2000 + 40 * 41 / 8000, rel=0.15)
    assert abs(value) < plain / 6
    assert 0 < error < plain / 10


def test_extrapolation_refuses_few_vectors():
    with pytest.raises(ValueError, match=r"at least 4·D = 40 vectors to extrapolate from, got 39"):
        fid_infinity(normal(7, 39, 10), np.zeros(10), np.eye(10))


def test_kernel_distance_of_gaussians_on_a_line():
    # D = 1: E(xy+1)³ = E(x³)E(y³) + 3E(x²)E(y²) + 3E(x)E(y) + 1, so MMD² = 9·0 + 3(σ₁²−σ₂²)² for means 0.
    x, y = normal(8, 6000, 1), 1.5 * normal(9, 6000, 1)
    value, error = kid(x, y)
    assert value == pytest.approx(3 * (1 - 2.25) ** 2, abs=4 * error)
    assert 0 < error < 1


def test_standard_error_of_the_kernel_distance_is_that_of_repetitions():
    # Equal distributions: the estimate is unbiased around 0, and spreads as its standard error says.
    runs = [kid(normal(s, 400, 6), normal(1000 + s, 400, 6)) for s in range(60)]
    values, errors = np.array(runs).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(60)
    assert 0.7 < values.std() / errors.mean() < 1.4


def test_kernel_distance_of_two_points_by_hand():
    a, b = np.array([[1.0, 2.0]]), np.array([[0.0, 4.0]])
    # a·a = 5, b·b = 16, a·b = 8, D = 2.
    expected = 3.5**3 + 9**3 - 2 * 5**3
    value, error = kid(np.repeat(a, 40, 0), np.repeat(b, 70, 0))
    assert (value, error) == pytest.approx((expected, 0))


@pytest.mark.parametrize("function", [kid, precision_recall])
def test_sets_that_do_not_match(function):
    with pytest.raises(ValueError, match="as many columns, got 2 and 3"):
        function(np.zeros((40, 2)), np.zeros((40, 3)))
    with pytest.raises(ValueError, match="features must hold at least"):
        function(np.zeros((2, 2)), np.zeros((40, 2)))


def test_inception_score_of_certain_and_of_uniform_classes():
    certain = np.where(np.eye(5)[np.arange(100) % 5], 800.0, -800.0)
    assert inception_score(certain) == pytest.approx((5, 0))
    assert inception_score(np.zeros((100, 5))) == pytest.approx((1, 0))


def test_inception_score_of_two_kinds_of_images():
    # Half at (p, 1−p), half at (1−p, p): the marginal is uniform, the score 2·exp(−H(p)).
    p = 0.8
    logits = np.log([[p, 1 - p], [1 - p, p]] * 50)
    expected = 2 * np.exp(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert inception_score(logits) == pytest.approx((expected, 0), abs=1e-12)


def test_inception_score_has_the_spread_of_its_parts():
    logits = np.where(np.eye(2)[[0, 1, 0, 0]], 800.0, -800.0)
    assert inception_score(logits, splits=2) == pytest.approx((1.5, 0.5))
    with pytest.raises(ValueError, match="splits must be from 1 to the number of images, 4, got 5"):
        inception_score(logits, splits=5)


def test_precision_and_recall_on_a_line():
    # Balls around 0, 1, …, 9 reach to the third neighbour: 3 at the ends, 2 inside but next to the ends 2.
    real = np.arange(10.0)[:, None]
    near_and_far = np.array([[4.5], [12.0], [12.1], [500.0], [11.9]])
    precision, recall = precision_recall(real, near_and_far)
    # 4.5 lies in a ball, and 12, 11.9 in that of 9, which ends at 12.
    assert precision == pytest.approx(3 / 5)
    # Around 4.5 the ball ends at 12.1 (7.6), so −3.1 … 12.1 holds all.
    assert recall == 1


def test_precision_without_recall():
    # All generated at one place inside of the real ones, which lie far apart.
    real = 100 * np.arange(10.0)[:, None]
    assert precision_recall(real, 450 + 0.001 * normal(10, 30, 1)) == (1, 0)
    assert precision_recall(real, real + 1e6) == (0, 0)
    assert precision_recall(real, real) == (1, 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        precision_recall(real, real, k=0)
