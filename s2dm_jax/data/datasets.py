"""Datasets as uint8 arrays in memory or mapped from the cache."""

import json
import math
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.images import is_saturated
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.data.cache import PROVENANCE, cached_folder, check_hashes, is_ready, prepare_dataset
from s2dm_jax.data.import_images import SPLITS

_HELD_OUT = 500
# Values of training images that `saturation` counts: enough for three digits, of any size of images.
_COUNTED_VALUES = 2**25


class Dataset(NamedTuple):
    """Images and labels of two disjoint splits.

    Attributes:
      train, held_out: uint8 [N, H, W, C], in memory or mapped from a file.
      train_labels, held_out_labels: int [N].
      num_classes: number of distinct labels.
      provenance: content and source in one line.
      digest: SHA-256 of the file of `train`; empty for images that never change.
      labels_digest: SHA-256 of the labels of `train`; empty likewise.
      split: the splits and classes inferred from your own images, a line each; empty for the datasets by name.
    """

    train: np.ndarray
    train_labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray
    num_classes: int
    provenance: str
    digest: str = ""
    labels_digest: str = ""
    split: str = ""

    @property
    def labelled(self) -> bool:
        """Whether the labels are classes: two or more, and fewer than half of the images."""
        most = len(self.train) // 2
        return 2 <= self.num_classes <= most and len(np.unique(self.train_labels)) > 1

    @property
    def saturation(self) -> float:
        """The share of the values of the training images, or of evenly spaced ones of many, that are 0 or 255."""
        return _saturation(self.train)


def _saturation(images: np.ndarray) -> float:
    return float(is_saturated(images[:: math.ceil(images.size / _COUNTED_VALUES)]).mean())


def load_digits() -> Dataset:
    """The 1,797 handwritten digits of scikit-learn (test set of UCI optdigits), [N, 8, 8, 1] in 17 shades of grey.

    500 of them, drawn once with seed 0, are held out.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = order[_HELD_OUT:], order[:_HELD_OUT]
    provenance = "digits of scikit-learn (UCI optdigits), 8×8 grey, 1,297 for training, 500 held out"
    return Dataset(images[train], digits.target[train], images[held_out], digits.target[held_out], 10, provenance)


# Datasets that come with a dependency: no preparation, no cache.
_BUNDLED = {"digits": load_digits}


def saturation_at_hand(config: ConfigDict) -> float | None:
    """`Dataset.saturation` of a config's named dataset if it is already prepared; None for others."""
    if config.data.source:
        return None
    if config.data.name in _BUNDLED:
        return _BUNDLED[config.data.name]().saturation
    folder = cached_folder(config) if DATASETS[config.data.name].builder else None
    return _saturation(np.load(folder / "train.npy", mmap_mode="r")) if folder and is_ready(folder) else None


def load_dataset(config: ConfigDict) -> Dataset:
    """The dataset of a checked config, prepared first if it is not in the cache; cached images are memory-mapped.

    Raises:
      UserError: as `cache.prepare_dataset` and `cache.check_hashes`.
    """
    folder = prepare_dataset(config)
    if folder is None:
        return _BUNDLED[config.data.name]()
    entry = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    check_hashes(folder, entry)
    train, held_out = (np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS)
    train_labels, held_out_labels = (np.load(folder / f"{split}_labels.npy") for split in SPLITS)
    digest, labels_digest = (entry["files"][f"train{kind}.npy"]["sha256"] for kind in ("", "_labels"))
    num_classes = entry.get("num_classes", len(entry["classes"]))
    version = f" {entry['version']}" if entry["version"] else ""
    provenance = (
        f"{entry['source']}{version}, {entry['size']}×{entry['size']}×{entry['channels']}, crop "
        f"{entry['crop']}, {entry['resize']}, {len(train):,} for training, {len(held_out):,} held out, "
        f"{len(entry['skipped'])} skipped, sha256 {digest[:16]}"
    )
    hashes, split = (digest, labels_digest), entry.get("description", "")
    return Dataset(train, train_labels, held_out, held_out_labels, num_classes, provenance, *hashes, split)
