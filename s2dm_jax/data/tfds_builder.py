"""Converts what tensorflow-datasets has prepared elsewhere, or prepares here, to the arrays of the cache."""

import contextlib
import dataclasses
import io
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import data_cache_dir, environment_path
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.data.fetch import RemoteFile, fetch_files, mirrored
from s2dm_jax.data.import_images import SplitWriter
from s2dm_jax.data.splits import held_out_mask
from s2dm_jax.data.transforms import ImageTransform, decode


def run_tfds(name: str, transform: ImageTransform, temporary: Path) -> dict:
    """Prepares a dataset in the cache and writes its arrays into `temporary`; returns entries of the provenance.

    Raises:
      UserError: if it cannot be downloaded or prepared.
    """
    print(f"preparing {name} with tensorflow-datasets in {data_cache_dir()}", flush=True)
    folder = data_cache_dir() / "tfds" / name
    with _as_user_error(name, folder):
        return run(name, transform, temporary, folder)


def tfds_folder() -> Path:
    """Where tensorflow-datasets prepares by itself: its own default place."""
    return environment_path("TFDS_DATA_DIR", "~/tensorflow_datasets")


def manual_folder() -> Path:
    """Where tensorflow-datasets looks for manually downloaded files."""
    return tfds_folder() / "downloads" / "manual"


def existing_builder(name: str) -> Any:
    """The builder of a dataset that tensorflow-datasets has prepared in its own folder; None if there is none.

    Raises:
      UserError: if its format is not array_record.
    """
    folder = tfds_folder() / DATASETS[name].builder
    if not folder.exists():
        return None
    with _as_user_error(name, folder):
        builder = _make_builder(name, tfds_folder())
        if not builder.data_path.exists():
            return None
        if (found := builder.info.file_format.value) != "array_record":
            raise UserError(
                f"{builder.data_path} is in the format {found}, which only TensorFlow reads: set TFDS_DATA_DIR to "
                f"another folder to have {name} prepared again, or prepare it there with file_format='array_record'"
            )
        return builder


def _make_builder(name: str, folder: Path) -> Any:
    import tensorflow_datasets as tfds

    from s2dm_jax.data.builders import BUILDERS

    # Its bars would fill a log.
    tfds.display_progress_bar(sys.stderr.isatty())
    builder, _, config = DATASETS[name].builder.partition("/")
    if builder in BUILDERS:
        return BUILDERS[builder](config=config or None, data_dir=folder)
    return tfds.builder(DATASETS[name].builder, data_dir=folder)


def build(name: str, folder: Path) -> Any:
    """The dataset's builder, prepared: that of tensorflow-datasets' own folder, or one made in `folder`."""
    import tensorflow_datasets as tfds

    if (existing := existing_builder(name)) is not None:
        return existing
    # Left by an interrupted preparation; the caller holds this dataset's lock.
    for leftover in folder.rglob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    builder = _make_builder(name, folder)
    label_feature(name, builder.info.features)
    if builder.data_path.exists():
        return builder
    downloads = manual_folder()
    if files := _remote_files(builder):
        downloads = folder / "downloads"
        fetch_files(DATASETS[name].title, files, downloads, manual_folder())
    config = tfds.download.DownloadConfig(manual_dir=downloads, try_download_gcs=False)
    # tensorflow-datasets prints sizes, which it does not know.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record", download_config=config)
    return builder


def _remote_files(builder: Any) -> list[RemoteFile]:
    """The published files of one of our builders, or a mirror's; also those that tensorflow-datasets will check."""
    infos = getattr(builder, "published_files", {})
    if not infos:
        return []
    files = mirrored([RemoteFile(info.filename, url, int(info.size), info.checksum) for url, info in infos.items()])
    builder.url_infos = {
        url: dataclasses.replace(info, size=file.size, checksum=file.sha256)
        for (url, info), file in zip(infos.items(), files, strict=True)
    }
    return files


@contextlib.contextmanager
def _as_user_error(name: str, folder: Path) -> Iterator[None]:
    """For the block, what builders and damaged files raise, each in its own way, becomes a `UserError`."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        reason, files = " ".join(str(error).split())[:300], DATASETS[name].manual_files
        raise UserError(
            f"preparing {name} failed with {type(error).__name__}: {reason}; download {files} again if they are in "
            f"{manual_folder()}, remove {folder}, and run the same command again"
        ) from error


def encoded_examples(builder: Any, split: str) -> Iterable[dict]:
    """The examples of a split, their images as the stored bytes of a PNG or JPEG."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    return builder.as_data_source(split=split, decoders=decoders)


def label_feature(name: str, features: Mapping[str, Any]) -> str:
    """The feature of a builder that is the class; "" if there are none, or attributes make them.

    Raises:
      UserError: if the entry in `DATASETS` does not say which of the features it is, or names one that is not a class.
    """
    label = DATASETS[name].label
    classes = [key for key, feature in features.items() if hasattr(feature, "names")]
    if DATASETS[name].binary_attributes or not label or label in classes:
        return label if label in classes else ""
    if classes or label in features:
        raise UserError(
            f"{label!r} is not a class among the features of {DATASETS[name].builder}, {', '.join(features)}; name one "
            f"of {', '.join(classes) or 'none'} as `label` of {name} in s2dm_jax/config/datasets.py, or '' for no "
            "labels"
        )
    return ""


def _label(name: str, feature: str, example: dict) -> int:
    """The example's class, or 0 where there are none; CelebA: 1 for male + 2 for smiling."""
    attributes = DATASETS[name].binary_attributes
    if attributes:
        return sum(int(example["attributes"][attribute]) << bit for bit, attribute in enumerate(attributes))
    return int(example[feature]) if feature else 0


def run(name: str, transform: ImageTransform, folder: Path, tfds_folder: Path) -> dict:
    """Prepares the dataset and writes its arrays into `folder`; returns entries of the provenance."""
    builder = build(name, tfds_folder)
    splits, features = builder.info.splits, builder.info.features
    label = label_feature(name, features)
    count = splits["train"].num_examples
    if "test" in splits:
        held_out = {"test": np.ones(splits["test"].num_examples, bool), "train": np.zeros(count, bool)}
    else:
        held_out = {"train": held_out_mask(count)}
    counts: dict[str, int] = {}
    for split, mask in held_out.items():
        writer = SplitWriter(folder, transform, mask, np.arange(len(mask)))
        labels = np.zeros(len(mask), np.int64)
        with progress_bar(len(mask), "images") as advance:
            for index, example in enumerate(encoded_examples(builder, split)):
                writer.write(index, decode(example["image"], transform))
                labels[index] = _label(name, label, example)
                advance(1)
        counts |= writer.close(labels)
    return {
        "source": f"{DATASETS[name].title} of tensorflow-datasets",
        "version": str(builder.version),
        "splits": {split: {"count": n} for split, n in sorted(counts.items())},
        "classes": list(DATASETS[name].classes) or (features[label].names if label else ["."]),
        "skipped": [],
    }
