"""The reference that samples are compared with: real images in the chosen features, or a file of statistics."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.files import ZIP_DAMAGE
from s2dm_jax.common.hashing import digest_of_file, sha256_of_arrays, sha256_of_json
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.config.metrics import METRICS
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.hardware import numerics
from s2dm_jax.devices.sharding import shard_batch
from s2dm_jax.evaluation import metrics
from s2dm_jax.evaluation.features import Features
from s2dm_jax.evaluation.statistics_file import (
    default_reference,
    read_statistics,
    resolve_resize,
    statistics_dir,
    write_statistics,
)
from s2dm_jax.inference.sampler import map_batches

# Vectors for a covariance.
_MIN_IMAGES = 2


class _NotFiniteError(Exception):
    pass


class Reference(NamedTuple):
    """Statistics of the images that samples are compared with, and their features if a metric requires them.

    Attributes:
      mean, cov: float64 [D] and [D,D].
      features: float32 [N,D], or None.
      provenance: plain data.
      problem: why there are no statistics, which are 0 then; "" if there are.
    """

    mean: np.ndarray
    cov: np.ndarray
    features: np.ndarray | None
    provenance: dict
    problem: str = ""


def image_batches(
    images: np.ndarray, features: Features, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Features and logits, float32 [B, D + L], of the images uint8 [N,H,W,C] at `rows`, by default all."""
    rows = np.arange(len(images)) if rows is None else rows

    def compute(indices):
        # Beyond the last image it is repeated; `map_batches` drops the repetitions.
        return features.apply(shard_batch(images[rows[np.minimum(indices, len(rows) - 1)]]))

    return map_batches(compute, len(rows), batch_size)


def sha256_of_images(images: np.ndarray) -> str:
    """`hashing.sha256_of_arrays` of images that need not fit into memory."""

    def chunks():
        for start in range(0, len(images), 1000):
            chunk = images[start : start + 1000]
            yield chunk
            advance(len(chunk))

    with progress_bar(len(images), "images hashed", shown=is_main_process(), delay=2) as advance:
        return sha256_of_arrays(chunks())


def _finite(batches: Iterable[np.ndarray], dimensions: int) -> Iterator[np.ndarray]:
    """The features without the logits; at the end a `_NotFiniteError` with the number of those that are not finite."""
    bad = 0
    for batch in batches:
        bad += int((~np.isfinite(batch[:, :dimensions])).any(axis=1).sum())
        if not bad:
            yield batch[:, :dimensions]
    if bad:
        raise _NotFiniteError(f"{bad:,}")


def _read_cached(path: Path, dimensions: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and covariance from the cache; None if they are missing, or the file is damaged."""
    try:
        with np.load(path) as arrays:
            mean, cov = arrays["mu"], arrays["sigma"]
    except FileNotFoundError:
        return None
    except ZIP_DAMAGE:
        mean = cov = np.zeros(0)
    if mean.shape == (dimensions,) and cov.shape == (dimensions, dimensions):
        return mean, cov
    print(f"{path} is empty or damaged; the statistics are computed again", file=sys.stderr)
    return None


def load_reference(
    config: ConfigDict, data: Dataset, features: Features, names: list[str], batch_size: int
) -> tuple[Reference, np.ndarray]:
    """The reference of `config.eval.reference` for the metrics `names`, and other real images, uint8 [N,H,W,C].

    Raises:
      UserError: for a file that does not hold statistics of these features.
    """
    chosen = config.eval.reference
    if chosen == "auto":
        chosen = default_reference(features.name)
    if chosen == "train":
        images, split, floor_images = data.train, "training", data.held_out
    elif chosen == "held_out":
        images, split, floor_images = data.held_out, "held-out", data.train
    else:
        mean, cov = read_statistics(chosen, [(features.name, features.dimensions)], config.eval.inception_resize)
        return Reference(mean, cov, None, {"file": chosen, "sha256": digest_of_file(Path(chosen))}), data.train
    provenance = {"images": f"{len(images)} {split} images", "sha256": sha256_of_images(images)}
    empty = metrics.init_sums(features.dimensions)
    unknown = Reference(empty.mean, empty.products, None, provenance)
    if len(images) < _MIN_IMAGES:
        return unknown._replace(problem=f"the reference has {len(images)} image"), floor_images
    batches = _finite(image_batches(images, features, batch_size), features.dimensions)
    try:
        if any("reference_features" in METRICS[name].requires for name in names):
            vectors = np.concatenate(list(batches))
            return Reference(*metrics.feature_statistics(vectors), vectors, provenance), floor_images
        # Inception's statistics of a dataset take minutes.
        path = None
        if features.name == "inception":
            depends_on = {**features.provenance, **provenance, **numerics()}
            path = statistics_dir() / f"{sha256_of_json(depends_on)}.npz"
        if path and jax.process_count() == 1 and (cached := _read_cached(path, features.dimensions)):
            return Reference(*cached, None, provenance), floor_images
        sums = empty
        for batch in batches:
            sums = metrics.update_sums(sums, batch)
        mean, cov = metrics.mean_and_cov(sums)
    except _NotFiniteError as error:
        return unknown._replace(problem=f"the features of {error} images of the reference are not finite"), floor_images
    if path and is_main_process():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(path, mean, cov, resolve_resize(config.eval.inception_resize))
        except OSError as error:
            print(f"the statistics could not be cached in {path.parent} ({error.strerror})", file=sys.stderr)
    return Reference(mean, cov, None, provenance), floor_images
