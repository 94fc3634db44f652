"""Statistics of real images in a file, in place of the dataset's own."""

import re
import zipfile
from pathlib import Path

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path, cache_dir
from s2dm_jax.config.fields import INCEPTION_RESIZES

# Relative to the largest entry: of statistics that were computed or saved in float32.
_ROUND_OFF = 1e-5


def default_reference(features: str) -> str:
    """What the reference "auto" stands for: the training images for Inception, as in the papers, else the held-out."""
    return "train" if features == "inception" else "held_out"


def resolve_resize(inception_resize: str) -> str:
    """The pipeline that `config.eval.inception_resize` stands for: "auto" is that of TensorFlow 1."""
    return INCEPTION_RESIZES[0] if inception_resize == "auto" else inception_resize


def statistics_dir() -> Path:
    """The folder in the user's cache with the statistics of whole datasets."""
    return cache_dir() / "statistics"


def write_statistics(path: Path, mean: np.ndarray, cov: np.ndarray, resize: str) -> None:
    """An .npz with mu and sigma, as pytorch-fid writes, and the pipeline of Inception's images, `resize`."""
    with atomic_path(path) as temporary:
        np.savez(temporary, mu=mean, sigma=cov, inception_resize=np.array(resize))


def read_statistics(
    path: str, features: list[tuple[str, int]], inception_resize: str = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D,D], float64, of an .npz with mu and sigma, as pytorch-fid writes.

    Args:
      features: names and numbers D of the features that it may be of.
      inception_resize: the config's field; with "auto", the file must record the pipeline of Inception's statistics.

    Raises:
      UserError: for an unreadable file, statistics of other features, or a pipeline that differs or is not recorded.
    """
    try:
        with np.load(path) as arrays:
            mean, cov = (_real(arrays[name], name) for name in ("mu", "sigma"))
            recorded = str(arrays["inception_resize"]) if "inception_resize" in arrays else ""
        cov = _symmetric(mean, cov)
    # NumPy raises EOFError and BadZipFile for files that are empty or cut short, TypeError for an .npy.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = _reason(error)
        raise UserError(
            f"config.eval.reference={path!r} cannot be read ({reason}); it must be an .npz with mu [D] and "
            "sigma [D,D], as pytorch-fid writes"
        ) from error
    if len(mean) not in (dimensions for _, dimensions in features):
        made = " or ".join(f"config.eval.feature_extractor={name!r} makes {number}" for name, number in features)
        raise UserError(
            f"config.eval.reference={path!r} holds {len(mean)} features, {made}; the two numbers must be equal"
        )
    if ("inception", len(mean)) in features:
        _check_resize(path, recorded, inception_resize)
    return mean, cov


def _check_resize(path: str, recorded: str, inception_resize: str) -> None:
    """That a file's statistics of Inception are of the config's pipeline."""
    field, reference = "config.eval.inception_resize", f"config.eval.reference={path!r}"
    recorded = recorded or (INCEPTION_RESIZES[0] if _is_cached(path) else "")
    resize = resolve_resize(inception_resize)
    if recorded and recorded not in INCEPTION_RESIZES:
        raise UserError(
            f"{reference} records inception_resize={recorded!r}, which is not supported: it must be one of "
            f"{', '.join(INCEPTION_RESIZES)}"
        )
    if recorded and recorded != resize:
        given = f"{inception_resize!r}, which is {resize}" if inception_resize == "auto" else repr(resize)
        raise UserError(
            f"{reference} holds statistics with inception_resize {recorded}, which cannot be compared with {field}="
            f"{given}: give --{field}={recorded}, or another reference"
        )
    if not recorded and inception_resize == "auto":
        raise UserError(
            f"{reference} does not record how its images were resized for Inception: give --{field}=pytorch_fid for "
            "statistics of pytorch-fid (Analytic-DPM's, PNDM's), or tf1 for those of TensorFlow, torch-fidelity, "
            "StyleGAN and EDM"
        )


def _is_cached(path: str) -> bool:
    """Whether the file is in the user's cache, where earlier versions left statistics of tf1 without a record."""
    file = Path(path).resolve()
    return file.parent == statistics_dir().resolve() and bool(re.fullmatch(r"[0-9a-f]{16}\.npz", file.name))


def _real(array: np.ndarray, name: str) -> np.ndarray:
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} holds {array.dtype}, not real numbers")
    return array.astype(np.float64)


def _symmetric(mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """The covariance without the asymmetry of round-off.

    Raises:
      ValueError: for shapes that do not match, values that are not finite, and a matrix that is not a covariance.
    """
    if mean.ndim != 1 or not mean.size or cov.shape != (mean.size, mean.size):
        raise ValueError(f"mu is {list(mean.shape)} and sigma {list(cov.shape)}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError("it holds NaN or infinity")
    largest, difference = np.abs(cov).max(), np.abs(cov - cov.T).max()
    if difference > _ROUND_OFF * largest:
        raise ValueError(f"sigma is not symmetric: entries differ by {difference:.3g}")
    cov = (cov + cov.T) / 2
    if np.linalg.eigvalsh(cov)[0] < -_ROUND_OFF * largest * len(cov):
        raise ValueError("sigma is not a covariance matrix: it has negative eigenvalues")
    return cov


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no array {str(error.args[0]).split()[0]}"
    if "context manager" in str(error):
        return "it is a single array"
    if isinstance(error, EOFError | zipfile.BadZipFile):
        return "it is empty, cut short or not an .npz"
    if "pickle" in str(error):
        return "it holds Python objects or text, not arrays of numbers"
    return str(error).strip().partition("\n")[0] or "it is empty"
