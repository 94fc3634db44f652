"""Distances between sets of feature vectors, in float64 numpy on the host."""

import numpy as np


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance of feature vectors (as pytorch-fid's np.mean and np.cov).

    Args:
      features: real [N,D], N ≥ 2, finite.

    Returns:
      Mean float64 [D] and covariance float64 [D,D], divided by N − 1.

    Raises:
      ValueError: for another shape, fewer than two vectors, or a value that is not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features must have shape [N,D] with D ≥ 1, got {list(features.shape)}")
    if len(features) < 2:
        raise ValueError(f"features must hold at least 2 vectors for a covariance, got {len(features)}")
    if not np.isfinite(features).all():
        raise ValueError(f"features must be finite, got {np.sum(~np.isfinite(features))} values that are not")
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """‖μ₁−μ₂‖² + tr(C₁ + C₂ − 2(C₁C₂)^½) between two Gaussians (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the square roots of the eigenvalues of C₁^½ C₂ C₁^½, which is
    symmetric: no matrix square root of an unsymmetric product, whose value changed with SciPy's version.
    Singular covariances are allowed.

    Args:
      mean1, mean2: real [D], finite.
      cov1, cov2: real [D,D], finite, symmetric, positive semidefinite up to round-off.

    Returns:
      The squared distance, ≥ 0; FID where the features are Inception's.

    Raises:
      ValueError: for shapes that do not match, a value that is not finite, or an unsymmetric covariance.
    """
    mean1, cov1 = _checked_gaussian(mean1, cov1, "1")
    mean2, cov2 = _checked_gaussian(mean2, cov2, "2")
    if mean1.shape != mean2.shape:
        raise ValueError(f"mean1 and mean2 must have the same length, got {len(mean1)} and {len(mean2)}")

    values, vectors = np.linalg.eigh(cov1)
    # In C₁'s null space round-off of 1e-16 would come back as 1e-8 per dimension from the square root, so
    # the product is formed on C₁'s range only: its nonzero eigenvalues are those of the full product.
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])
    product = np.linalg.eigvalsh(root.T @ cov2 @ root)
    trace_of_root = np.sum(np.sqrt(np.maximum(product, 0.0)))
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2.0 * trace_of_root
    return float(max(distance, 0.0))


def _checked_gaussian(mean, cov, name):
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or mean.size == 0 or cov.shape != (mean.size, mean.size):
        raise ValueError(
            f"mean{name} and cov{name} must have shapes [D] and [D,D], "
            f"got {list(mean.shape)} and {list(cov.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"mean{name} and cov{name} must be finite, got NaN or infinity")
    difference = np.abs(cov - cov.T).max()
    if difference > 1e-8 * np.abs(cov).max():
        raise ValueError(f"cov{name} must be symmetric, got entries that differ by {difference:.3g}")
    return mean, cov
