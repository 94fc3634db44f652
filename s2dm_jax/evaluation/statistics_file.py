"""Statistics of real images in a file, in place of the dataset's own."""

import zipfile

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.evaluation import metrics


def default_reference(features: str) -> str:
    """What the reference "auto" stands for: the training images for Inception, as in the papers, else the held-out."""
    return "train" if features == "inception" else "held_out"


def read_statistics(path: str, features: str, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D,D], float64, of an .npz with mu and sigma, as pytorch-fid writes; D is `dimensions`.

    Raises:
      UserError: for a file that is none, or of other features.
    """
    try:
        with np.load(path) as arrays:
            mean, cov = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            metrics.frechet_distance(mean, cov, mean, cov)
    # NumPy raises EOFError and BadZipFile for files that are empty or cut short, TypeError for an .npy.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = _reason(error)
        raise UserError(
            f"config.eval.reference={path!r} cannot be read ({reason}); it must be an .npz with mu [D] and "
            "sigma [D,D], as pytorch-fid writes"
        ) from error
    if len(mean) != dimensions:
        raise UserError(
            f"config.eval.reference={path!r} holds {len(mean)} features, config.eval.feature_extractor="
            f"{features!r} makes {dimensions}; the numbers must be equal"
        )
    return mean, cov


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no array {str(error.args[0]).split()[0]}"
    if "context manager" in str(error):
        return "it is a single array"
    if "pickle" in str(error):
        return "it holds Python objects or text, not arrays of numbers"
    return str(error).strip().partition("\n")[0] or "it is empty"
