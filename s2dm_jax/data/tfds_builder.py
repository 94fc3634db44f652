"""The child process that prepares a dataset with tensorflow-datasets, the only one to import TensorFlow.

`python -m s2dm_jax.data.tfds_builder REQUEST`, where REQUEST is a JSON list: name, transform, path of the
result, folder of tensorflow-datasets. The arrays are written beside the result, which is
{"error": one sentence} or what goes into the provenance.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import data_cache_dir
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.data.import_images import NpyWriter
from s2dm_jax.data.sources import held_out_rows
from s2dm_jax.data.transforms import ImageTransform, decode

RESULT = "result.json"


def run_tfds(name: str, transform: ImageTransform, temporary: Path) -> dict:
    """Lets tensorflow-datasets download and prepare in a child process, the only one to import tensorflow.

    The child ends when its standard input closes: with this process, however that ends.
    """
    print(f"preparing {name} with tensorflow-datasets in {data_cache_dir()}", flush=True)
    request = json.dumps([name, transform, str(temporary / RESULT), str(data_cache_dir() / "tfds" / name)])
    child = subprocess.Popen(
        tfds_command(request),
        stdin=subprocess.PIPE,
        close_fds=False,
        # Without the GPU's memory, and without remarks on how TensorFlow was built.
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            # Its bars, in a log.
            **({} if sys.stderr.isatty() else {"TQDM_MININTERVAL": "10"}),
        },
    )
    try:
        status = child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise
    finally:
        if child.stdin:
            child.stdin.close()
    try:
        description = json.loads((temporary / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"preparing {name} failed with status {status}; what went wrong is printed above") from error
    if "error" in description:
        raise UserError(f"preparing {name} failed: {description['error']}")
    return description


def tfds_command(request: str) -> list[str]:
    """The command line of the child process."""
    return [sys.executable, "-m", "s2dm_jax.data.tfds_builder", request]


def manual_folder() -> Path:
    """Where tensorflow-datasets looks for files got by hand: its own default place."""
    root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser() / "downloads" / "manual"


def build(name: str, folder: Path) -> Any:
    """The dataset's builder, prepared: that of tensorflow-datasets' own folder, or one made in `folder`."""
    import tensorflow_datasets as tfds

    existing = tfds.builder(DATASETS[name].builder)
    if existing.data_path.exists():
        return existing
    # Left by an interrupted download, extraction or preparation; the caller holds this dataset's lock.
    for leftover in [*folder.rglob("incomplete.*"), *folder.glob("downloads/**/*.tmp.*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    builder = tfds.builder(DATASETS[name].builder, data_dir=folder)
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(manual_dir=manual_folder()),
    )
    return builder


def label_of(name: str, example: dict) -> int:
    """The example's class, or 0 where there are none; CelebA: 1 for male + 2 for smiling."""
    attributes = DATASETS[name].binary_attributes
    if attributes:
        return sum(int(example["attributes"][attribute]) << bit for bit, attribute in enumerate(attributes))
    return int(example.get("label", 0))


def classes_of(name: str, features: Any) -> list[str]:
    """The names of the labels; one class where there are none."""
    if DATASETS[name].classes:
        return list(DATASETS[name].classes)
    return features["label"].names if "label" in features else ["."]


def encoded_examples(builder: Any, split: str) -> Iterable[dict]:
    """The examples of a split with their images as they are stored, PNG or JPEG."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":
        return builder.as_data_source(split=split, decoders=decoders)
    return tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))


def write_split(
    name: str,
    examples: Iterable[dict],
    count: int,
    held_out: np.ndarray,
    transform: ImageTransform,
    folder: Path,
) -> dict[str, int]:
    """Writes the examples to train.npy and held_out.npy, as bool [count] says; returns the counts."""
    counts = {}
    parts = {"train": ~held_out, "held_out": held_out}
    row = np.empty(count, np.int64)
    files, labels = {}, {}
    for part, mask in parts.items():
        if mask.any():
            counts[part] = int(mask.sum())
            row[mask] = np.arange(counts[part])
            files[part] = NpyWriter(folder / f"{part}.npy", counts[part], transform)
            labels[part] = np.zeros(counts[part], np.int64)
    with progress_bar(count, "images") as advance:
        for index, example in enumerate(examples):
            part = "held_out" if held_out[index] else "train"
            files[part].write(int(row[index]), decode(example["image"], transform))
            labels[part][row[index]] = label_of(name, example)
            advance(1)
    for part, file in files.items():
        file.close()
        np.save(folder / f"{part}_labels.npy", labels[part])
    return counts


def run(name: str, transform: ImageTransform, folder: Path, tfds_folder: Path) -> dict:
    """Prepares the dataset and writes its arrays into `folder`; returns entries of the provenance."""
    builder = build(name, tfds_folder)
    splits = builder.info.splits
    count = splits["train"].num_examples
    held_out = np.zeros(count, bool)
    if "test" in splits:
        tests = splits["test"].num_examples
        counts = write_split(name, encoded_examples(builder, "test"), tests, np.ones(tests, bool), transform, folder)
    else:
        counts = {}
        held_out[held_out_rows(count)] = True
    counts |= write_split(name, encoded_examples(builder, "train"), count, held_out, transform, folder)
    return {
        "source": f"{DATASETS[name].title} of tensorflow-datasets",
        "version": str(builder.version),
        "splits": {part: {"count": n} for part, n in sorted(counts.items())},
        "classes": classes_of(name, builder.info.features),
        "skipped": [],
    }


def main() -> None:
    name, transform, result, tfds_folder = json.loads(sys.argv[1])
    # The parent holds the other end: it closes when the parent dies, however that is.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    try:
        description = run(name, ImageTransform(*transform), Path(result).parent, Path(tfds_folder))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # Downloads, checksums and builders each have errors of their own.
        reason, files = " ".join(str(error).split())[:300], DATASETS[name].manual_files
        description = {
            "error": f"{type(error).__name__}: {reason}; if the download is what fails, get {files} by hand, "
            f"put it into {manual_folder()} and run the same command again"
        }
    Path(result).write_text(json.dumps(description), encoding="utf-8")


if __name__ == "__main__":
    main()
