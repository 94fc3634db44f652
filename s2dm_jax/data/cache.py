"""The cache of prepared datasets: one uint8 .npy per split; entries are complete or absent.

A complete entry appears by one rename. A file lock lets one process prepare while the others, on all hosts that share
the cache, wait; a killed process leaves a temporary folder, which the next one removes. Imports no jax.
"""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import data_cache_dir, flush_to_disk, user_path, write_atomic
from s2dm_jax.common.hashing import digest_of_file, sha256_of_json
from s2dm_jax.common.locks import acquire
from s2dm_jax.common.signals import removed_on_signal, signal_advice
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import dataset_name, image_shape
from s2dm_jax.data.import_images import SPLITS, import_images
from s2dm_jax.data.sources import check_source, fingerprint
from s2dm_jax.data.tfds_builder import existing_builder, manual_folder, run_tfds
from s2dm_jax.data.transforms import ImageTransform

PROVENANCE = "provenance.json"

# What a complete entry has.
_FILES = tuple(f"{split}{kind}.npy" for split in SPLITS for kind in ("", "_labels"))
_ENTRY = {"source", "version", "size", "channels", "crop", "resize", "splits", "classes", "skipped", "files"}

# Part of an entry's name: another number makes new entries. Your own images, and tensorflow-datasets'.
_SOURCE_FORMAT, _FORMAT = 3, 1


def transform_of(config: ConfigDict) -> ImageTransform:
    """The transform that the config applies to every image."""
    size, channels = image_shape(config)
    crop = config.data.crop
    if crop == "auto":
        crop = "center" if config.data.source else DATASETS[config.data.name].crop
    return ImageTransform(size, channels, crop, config.data.resize)


def prepare_dataset(config: ConfigDict, check: Callable[[], None] | None = None) -> Path | None:
    """Prepares a checked config's images unless they are in the cache; may take minutes and use the network.

    Args:
      check: is called before images are prepared, to find what would stop the work that follows.

    Returns:
      The folder with train.npy, train_labels.npy, held_out.npy, held_out_labels.npy and provenance.json; None for the
      digits, which need no preparation.

    Raises:
      UserError: as `check_preparable`, or if too many images are invalid, or the cache cannot be used.
    """
    folder = cached_folder(config)
    if folder is None or is_ready(folder):
        return folder
    check_preparable(config)
    if check is not None:
        check()
    name = dataset_name(config)
    # One lock for all crops of a dataset: they share the downloads of tensorflow-datasets.
    lock = folder.name if config.data.source else name
    with _locked(data_cache_dir() / f"{lock}.lock", name):
        if is_ready(folder):
            return folder
        temporary = folder.with_name(f".{folder.name}.tmp")
        for leftover in (temporary, folder):
            if leftover.exists():
                _remove(leftover)
        temporary.mkdir()
        stopped = f"{name} was not prepared; run the same command to start over"
        with removed_on_signal(temporary), signal_advice(stopped):
            _prepare(config, name, temporary, folder)
    return folder


def _remove(folder: Path) -> None:
    """Removes what is left of an entry."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # `rmtree` names a file without its folder.
        raise UserError(
            f"{folder} is incomplete and cannot be removed ({error.strerror}); remove it, or set S2DM_JAX_DATA to "
            "another folder"
        ) from error


def _prepare(config: ConfigDict, name: str, temporary: Path, folder: Path) -> None:
    transform = transform_of(config)
    try:
        if config.data.source:
            source = str(user_path(config.data.source, "config.data.source"))
            description = import_images(source, transform, config.data.max_invalid_fraction, temporary)
        else:
            description = run_tfds(name, transform, temporary)
        _finish(temporary, folder, description, transform)
    except OSError as error:
        raise UserError(
            f"preparing {name} in {data_cache_dir()} failed ({error.strerror or error}); set S2DM_JAX_DATA to a "
            "folder with enough space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_preparable(config: ConfigDict) -> None:
    """Raises a `UserError` if the source or a manually downloaded file is missing, or what tensorflow-datasets has
    prepared cannot be read; fast, writes nothing.
    """
    folder, name = cached_folder(config), config.data.name
    if folder is None or config.data.source or is_ready(folder):
        return
    if existing_builder(name) is not None:
        return
    spec = DATASETS[name]
    path, prepared = manual_folder() / spec.manual_files, data_cache_dir() / "tfds" / name / spec.builder
    if not spec.downloadable and not path.exists() and not prepared.exists():
        raise UserError(
            f"{spec.title} cannot be downloaded: make {spec.manual_files} by hand and put it at {path}, or give its "
            "images as config.data.source (see docs/data.md)"
        )


def cached_folder(config: ConfigDict) -> Path | None:
    """The cache entry of the config's images, named by source and transform; None if nothing is prepared.

    Raises:
      UserError: if the images are missing: `check_source`, or a dataset whose images only come from `data.source`.
    """
    source = config.data.source and str(user_path(config.data.source, "config.data.source"))
    if source:
        check_source(source)
    elif DATASETS[config.data.name].bundled:
        return None
    elif not DATASETS[config.data.name].builder:
        raise UserError(
            f"config.data.source is missing: {DATASETS[config.data.name].title} is not downloaded; give a folder, zip "
            "or tar of its images, --config.data.source=PATH (see docs/data.md)"
        )
    transform = transform_of(config)
    name = Path(source).resolve().name if source else config.data.name
    identity = [_SOURCE_FORMAT if source else _FORMAT, fingerprint(source) if source else name, *transform]
    return data_cache_dir() / f"{name}-{transform.size}-{sha256_of_json(identity, digits=12)}"


def is_ready(folder: Path) -> bool:
    """Whether a cache entry holds all files of a dataset, at the sizes that its provenance names.

    Raises:
      UserError: if it cannot be read for lack of permission.
    """
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        files = provenance["files"]
        return provenance.keys() >= _ENTRY and all(
            (folder / name).stat().st_size == files[name]["bytes"] and "sha256" in files[name] for name in _FILES
        )
    except PermissionError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); get permission to read it, or set S2DM_JAX_DATA to "
            "another folder"
        ) from error
    # Whatever a damaged file holds in place of the provenance.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_hashes(folder: Path, provenance: dict) -> None:
    """Raises a `UserError` if a file of a cache entry is not what was prepared; reads all of them."""
    for name in _FILES:
        facts = provenance["files"][name]
        found = digest_of_file(folder / name)
        if found != facts["sha256"]:
            raise UserError(
                f"{folder / name} has changed since it was prepared (SHA-256 {found[:16]}…, not "
                f"{facts['sha256'][:16]}…); remove the folder {folder} to have the images prepared again"
            )


def _finish(temporary: Path, folder: Path, description: dict, transform: ImageTransform) -> None:
    """Adds the provenance, flushes everything to the disk, and renames the folder to its final name."""
    files = {}
    for path in sorted(temporary.glob("*.npy")):
        files[path.name] = {"sha256": digest_of_file(path), "bytes": path.stat().st_size}
        flush_to_disk(path)
    prepared = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    provenance = {**description, **transform._asdict(), "files": files, "prepared": prepared}
    write_atomic(temporary / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
    os.rename(temporary, folder)
    flush_to_disk(folder.parent)
    for split, facts in provenance["splits"].items():
        print(f"{split}: {facts['count']:,} images, {folder / split}.npy", flush=True)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Holds the lock of a dataset, waiting for other processes; the system frees it when a process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the cache of prepared data {path.parent} cannot be used ({error.strerror}); set S2DM_JAX_DATA to another "
            "folder"
        ) from error
    with file:
        fix = "set S2DM_JAX_DATA to another folder"
        if not acquire(file, fix=fix):
            print(f"another process is preparing {name}; waiting for it …", flush=True)
            acquire(file, fix=fix, wait=True)
        yield
