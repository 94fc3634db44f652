"""Distances between sets of feature vectors, in float64 numpy on the host."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from s2dm_jax.common.progress import progress_bar

_KID_BLOCK = 1000
_EXTRAPOLATION_POINTS = 15
_SMALLEST_PIVOT = 1e-9
# Distances to this many vectors at a time: 80 MB for 10,000 others.
_ROWS = 1000


class FeatureSums(NamedTuple):
    """Number and mean [D] of feature vectors that come in batches, and the sum of (x−mean)(x−mean)ᵀ [D,D], float64."""

    number: int
    mean: np.ndarray
    products: np.ndarray


def init_sums(dimensions: int) -> FeatureSums:
    """The sums over no vectors."""
    return FeatureSums(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))


def update_sums(sums: FeatureSums, features: np.ndarray) -> FeatureSums:
    """The sums with one more batch, real [N,D], N ≥ 1 (Chan, Golub & LeVeque 1979: no cancellation for any batches)."""
    features = _checked(features, "features", 1)
    if features.shape[1] != len(sums.mean):
        raise ValueError(f"features must have {len(sums.mean)} columns, got {features.shape[1]}")
    mean = features.mean(axis=0)
    centred = features - mean
    count = sums.number + len(features)
    shift = mean - sums.mean
    between = sums.number * len(features) / count
    return FeatureSums(
        count,
        sums.mean + shift * (len(features) / count),
        sums.products + centred.T @ centred + np.outer(shift, shift) * between,
    )


def mean_and_cov(sums: FeatureSums) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D] of the vectors, at least 2; warns as `feature_statistics`."""
    if sums.number < 2:
        raise ValueError(f"features must hold at least 2 vectors for a covariance, got {sums.number}")
    if sums.number <= len(sums.mean):
        warnings.warn(
            f"{sums.number} images are too few for a covariance of {len(sums.mean)} features, which is singular: a "
            "distance from it is finite but much too large; use more images",
            RuntimeWarning,
            stacklevel=3,
        )
    return sums.mean, sums.products / (sums.number - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean float64 [D] and unbiased covariance float64 [D,D] of real [N,D], N ≥ 2 (as pytorch-fid's).

    A `RuntimeWarning` reports a singular covariance, N ≤ D.
    """
    features = _checked(features, "features", 2)
    return mean_and_cov(update_sums(init_sums(features.shape[1]), features))


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """‖μ₁−μ₂‖² + tr(C₁ + C₂ − 2(C₁C₂)^½) between two Gaussians (Heusel et al. 2017, eq. 6).

    The squared distance, ≥ 0, is FID if the features are Inception's. The trace of the root is the sum of the square
    roots of the eigenvalues of the symmetric RᵀC₂R, with C₁ = RRᵀ: no matrix square root of an unsymmetric product,
    whose value changed with SciPy's version.

    Args:
      mean1, mean2: real [D], finite.
      cov1, cov2: real [D,D], finite, symmetric, positive semidefinite up to round-off; they may be singular.

    Raises:
      ValueError: for shapes that do not match, a value that is not finite, or an unsymmetric covariance.
    """
    mean1, cov1 = _checked_gaussian(mean1, cov1, "1")
    mean2, cov2 = _checked_gaussian(mean2, cov2, "2")
    if mean1.shape != mean2.shape:
        raise ValueError(f"mean1 and mean2 must have the same length, got {len(mean1)} and {len(mean2)}")
    return _distance(mean1, cov1, _factor(cov1), mean2, cov2)


def _factor(cov):
    """R [D, rank] with R Rᵀ = cov."""
    # Cholesky's factor serves as well as a symmetric root and costs a tenth, where cov is far from singular.
    try:
        factor = np.linalg.cholesky(cov)
        pivots = np.diag(factor) ** 2
        if pivots.min() > _SMALLEST_PIVOT * pivots.max():
            return factor
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(cov)
    # In the null space round-off of 1e-16 would come back as 1e-8 per dimension from the square root, so the product is
    # formed on the range only: its nonzero eigenvalues are those of the full product.
    positive = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, positive] * np.sqrt(values[positive])


def _distance(mean1, cov1, factor1, mean2, cov2):
    product = np.linalg.eigvalsh(factor1.T @ cov2 @ factor1)
    trace_of_root = np.sum(np.sqrt(np.maximum(product, 0.0)))
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2.0 * trace_of_root
    return float(max(distance, 0.0))


def fid_infinity(features: np.ndarray, mean: np.ndarray, cov: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The Fréchet distance that infinitely many vectors would have (FID∞; Chong & Forsyth 2020).

    The distance of N samples is too large by about c/N. It is computed for 15 random subsets, of a tenth of the vectors
    (or 2·D, if more) up to all of them, and a line fitted against 1/N is extrapolated to 0. What is left is the bias of
    the reference's own number of images.

    Args:
      features: real [N,D], N ≥ 4·D, finite.
      mean, cov: of the reference, [D] and [D,D] as for `frechet_distance`.
      seed: of the subsets.

    Returns:
      The line's value at 1/N = 0, which may be below 0 by chance, and its standard error in the fit.

    Raises:
      ValueError: for another shape or too few vectors.
    """
    features = _checked(features, "features", 2)
    mean, cov = _checked_gaussian(mean, cov, " of the reference")
    count, dimensions = features.shape
    if count < 4 * dimensions:
        raise ValueError(f"features must hold at least 4·D = {4 * dimensions} vectors to extrapolate from, got {count}")
    sizes = np.linspace(max(count // 10, 2 * dimensions), count, _EXTRAPOLATION_POINTS).astype(int)
    factor, rng = _factor(cov), np.random.default_rng(seed)
    distances = []
    with progress_bar(len(sizes), "distances of fid_infinity", delay=2) as advance:
        for size in sizes:
            subset = features[rng.choice(count, size, replace=False)]
            distances.append(_distance(mean, cov, factor, *feature_statistics(subset)))
            advance(1)
    (_, value), variance = np.polyfit(1 / sizes, distances, 1, cov=True)
    return float(value), float(np.sqrt(variance[1, 1]))


def kid(features1: np.ndarray, features2: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """KID: squared maximum mean discrepancy with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018, eq. 3-4).

    Both sets are split at random into disjoint blocks of 1,000 (or a tenth of the smaller set). The estimates of blocks
    are independent and unbiased: their standard deviation over the root of their number is their mean's standard error.

    Args:
      features1, features2: real [N,D] and [M,D], finite, N and M ≥ 20.
      seed: of the blocks.

    Returns:
      The estimate, which may be below 0 by chance, and its standard error.

    Raises:
      ValueError: for other shapes or too few vectors.
    """
    x, y = _checked_pair(features1, features2, 20)
    smaller = min(len(x), len(y))
    size = min(_KID_BLOCK, smaller // 10)
    blocks = smaller // size
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(vectors))[: blocks * size].reshape(blocks, size) for vectors in (x, y)]
    estimates = [_unbiased_mmd(x[i], y[j]) for i, j in zip(*orders, strict=True)]
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / np.sqrt(blocks))


def _unbiased_mmd(x, y):
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def mean_of_pairs(a):
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return mean_of_pairs(x) + mean_of_pairs(y) - 2.0 * kernel(x, y).mean()


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) ‖ p(y)), mean and deviation over `splits` parts (Salimans et al. 2016, section 4).

    Args:
      logits: real [N,L], finite; of Inception, for the score of that name. The mean is in [1, L].
      splits: number of consecutive parts, from 1 to N.

    Raises:
      ValueError: for another shape or number of parts.
    """
    logits = _checked(logits, "logits", 1)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be from 1 to the number of images, {len(logits)}, got {splits}")
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, splits):
        p = np.exp(part)
        # A class that no image has counts as 0: 0 · log 0.
        marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (part - marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1-2).

    Precision, in [0, 1], is the fraction of generated vectors that lie in a ball around some real vector which reaches
    to its k-th nearest real neighbour; recall the same with the sets exchanged.

    Args:
      real, generated: real [N,D] and [M,D], finite, N and M > k.
      k: at least 1.

    Raises:
      ValueError: for other shapes, too few vectors, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, generated = _checked_pair(real, generated, k + 1)
    blocks = 2 * sum(math.ceil(len(each) / _ROWS) for each in (real, generated))
    with progress_bar(blocks, "blocks of distances for precision and recall", delay=2) as advance:
        return _fraction_covered(real, generated, k, advance), _fraction_covered(generated, real, k, advance)


def _fraction_covered(centres, vectors, k, advance):
    # Each vector is its own nearest: the k-th of the others is number k, counted from 0.
    distances = _squared_distances(centres, centres, advance)
    radii = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in distances])
    covered = [(block <= radii).any(axis=1) for block in _squared_distances(vectors, centres, advance)]
    return float(np.mean(np.concatenate(covered)))


def _squared_distances(a: np.ndarray, b: np.ndarray, advance: Callable[[int], object]) -> Iterator[np.ndarray]:
    """Blocks of rows, together [len(a), len(b)]."""
    norms = np.sum(b**2, axis=1)
    for start in range(0, len(a), _ROWS):
        rows = a[start : start + _ROWS]
        yield np.maximum(np.sum(rows**2, axis=1)[:, None] + norms - 2.0 * rows @ b.T, 0.0)
        advance(1)


def _checked(features, name, min_count):
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N,D] with D ≥ 1, got {list(features.shape)}")
    if len(features) < min_count:
        purpose = " for a covariance" if min_count == 2 else ""
        raise ValueError(f"{name} must hold at least {min_count} vectors{purpose}, got {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} must be finite, got {np.sum(~np.isfinite(features))} values that are not")
    return features


def _checked_pair(features1, features2, min_count):
    first, second = (_checked(features, "features", min_count) for features in (features1, features2))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"both sets of features must have as many columns, got {first.shape[1]} and {second.shape[1]}")
    return first, second


def _checked_gaussian(mean, cov, name):
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or mean.size == 0 or cov.shape != (mean.size, mean.size):
        got = f"{list(mean.shape)} and {list(cov.shape)}"
        raise ValueError(f"mean{name} and cov{name} must have shapes [D] and [D,D], got {got}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"mean{name} and cov{name} must be finite, got NaN or infinity")
    difference = np.abs(cov - cov.T).max()
    if difference > 1e-8 * np.abs(cov).max():
        raise ValueError(f"cov{name} must be symmetric, got entries that differ by {difference:.3g}")
    return mean, cov
