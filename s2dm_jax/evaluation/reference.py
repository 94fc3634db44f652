"""What samples are compared with: real images in the features of choice, or statistics from a file."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import cache_dir
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.sharding import shard_batch
from s2dm_jax.evaluation import metrics
from s2dm_jax.evaluation.features import Features
from s2dm_jax.inference.sampler import map_batches


class Reference(NamedTuple):
    """What is compared with.

    Attributes:
      mean, cov: float64 [D] and [D,D].
      features: float32 [N,D], or None where no metric needs them.
      provenance: plain data.
    """

    mean: np.ndarray
    cov: np.ndarray
    features: np.ndarray | None
    provenance: dict


def image_batches(
    images: np.ndarray, features: Features, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """The features of images that are there.

    Args:
      images: uint8 [N,H,W,C], in memory or mapped from a file.
      features: what to make of them.
      batch_size: how many at once.
      rows: which of them, in which order; by default all.

    Yields:
      float32 [B, D + L].
    """
    rows = np.arange(len(images)) if rows is None else rows

    def compute(indices):
        # Beyond the last image it is repeated; `map_batches` cuts that off.
        return features.apply(shard_batch(images[rows[np.minimum(indices, len(rows) - 1)]]))

    return map_batches(compute, len(rows), batch_size)


def sha256_of_images(images: np.ndarray) -> str:
    """`hashing.sha256_of_arrays` of images that need not fit into memory."""
    with progress_bar(len(images), "images hashed", shown=is_main_process(), delay=2) as advance:

        def pieces():
            for start in range(0, len(images), 1000):
                yield images[start : start + 1000]
                advance(len(images[start : start + 1000]))

        return sha256_of_arrays(pieces())


def load_reference(
    config: ConfigDict, data: Dataset, features: Features, names: list[str], batch_size: int
) -> tuple[Reference, np.ndarray]:
    """What to compare with, and real images that are not in it.

    Args:
      config: a checked config.
      data: the data set.
      features: what images are compared in.
      names: the metrics, of evaluation_plan.METRICS.
      batch_size: images at once.

    Returns:
      The reference, and uint8 [N,H,W,C].

    Raises:
      UserError: for a file that does not hold the statistics of these features.
    """
    chosen = config.eval.reference
    if chosen == "auto":
        chosen = "train" if features.name == "inception" else "held_out"
    if chosen not in ("train", "held_out"):
        return _reference_file(chosen, features), data.train
    images, others = (data.train, data.held_out) if chosen == "train" else (data.held_out, data.train)
    told = "training" if chosen == "train" else "held-out"
    provenance = {"images": f"{len(images)} {told} images", "sha256": sha256_of_images(images)}
    needs = bool({"kid", "precision_recall"} & set(names))
    batches = image_batches(images, features, batch_size)
    if needs:
        vectors = np.concatenate([batch[:, : features.dimensions] for batch in batches])
        return Reference(*metrics.feature_statistics(vectors), vectors, provenance), others

    def statistics():
        sums = metrics.init_sums(features.dimensions)
        for batch in batches:
            sums = metrics.update_sums(sums, batch[:, : features.dimensions])
        return metrics.mean_and_cov(sums)

    if features.name == "inception":
        mean, cov = _cached(statistics, {**features.provenance, **provenance})
    else:
        mean, cov = statistics()
    return Reference(mean, cov, None, provenance), others


def _cached(statistics: Callable, depends_on: dict) -> tuple[np.ndarray, np.ndarray]:
    """Inception's statistics of a data set, which take minutes, kept in the cache."""
    path = cache_dir() / "statistics" / f"{sha256_of_json(depends_on)}.npz"
    if jax.process_count() == 1 and path.exists():
        with np.load(path) as arrays:
            return arrays["mu"], arrays["sigma"]
    mean, cov = statistics()
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.tmp.npz")
        np.savez(temporary, mu=mean, sigma=cov)
        temporary.replace(path)
    return mean, cov


def _reference_file(path: str, features: Features) -> Reference:
    try:
        with np.load(path) as arrays:
            mean, cov = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
            metrics.frechet_distance(mean, cov, mean, cov)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.eval.reference={path!r} cannot be read ({error}); it must be an .npz with mu [D] and "
            "sigma [D,D], as pytorch-fid writes"
        ) from error
    if len(mean) != features.dimensions:
        raise UserError(
            f"config.eval.reference={path!r} holds {len(mean)} features, config.eval.feature_extractor="
            f"{features.name!r} makes {features.dimensions}; they must be the same"
        )
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Reference(mean, cov, None, {"file": path, "sha256": sha256})
