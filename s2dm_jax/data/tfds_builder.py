"""The child process that prepares a dataset with tensorflow-datasets, the only one to import TensorFlow.

`python -m s2dm_jax.data.tfds_builder REQUEST`, where REQUEST is a JSON list: name, transform, path of the result,
folder of tensorflow-datasets. The arrays are written beside the result: entries of the provenance, or {"error": …}.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import data_cache_dir, environment_path
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.data.import_images import SplitWriter
from s2dm_jax.data.splits import held_out_mask
from s2dm_jax.data.transforms import ImageTransform, decode

RESULT = "result.json"


def run_tfds(name: str, transform: ImageTransform, temporary: Path) -> dict:
    """Runs `main` in a child process that ends with this one; returns entries of the provenance."""
    print(f"preparing {name} with tensorflow-datasets in {data_cache_dir()}", flush=True)
    request = json.dumps([name, transform, str(temporary / RESULT), str(data_cache_dir() / "tfds" / name)])
    # Without the GPU's memory, and without remarks on how TensorFlow was built.
    quiet = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    if not sys.stderr.isatty():
        # Its progress bars would fill a log.
        quiet["TQDM_MININTERVAL"] = "10"
    # The child inherits the cache's lock, and ends when its standard input closes: with this process, in any way.
    command, environment = tfds_command(request), {**os.environ, **quiet}
    with subprocess.Popen(command, stdin=subprocess.PIPE, close_fds=False, env=environment) as child:
        try:
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
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
    """Where tensorflow-datasets looks for manually downloaded files: its own default place."""
    return environment_path("TFDS_DATA_DIR", "~/tensorflow_datasets") / "downloads" / "manual"


def build(name: str, folder: Path) -> Any:
    """The dataset's builder, prepared: that of tensorflow-datasets' own folder, or one made in `folder`."""
    import tensorflow_datasets as tfds

    existing = tfds.builder(DATASETS[name].builder)
    label_feature(name, existing.info.features)
    if existing.data_path.exists():
        return existing
    # Left by an interrupted download, extraction or preparation; the caller holds this dataset's lock.
    for leftover in [*folder.rglob("incomplete.*"), *folder.glob("downloads/**/*.tmp.*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    builder = tfds.builder(DATASETS[name].builder, data_dir=folder)
    config = tfds.download.DownloadConfig(manual_dir=manual_folder())
    builder.download_and_prepare(file_format="array_record", download_config=config)
    return builder


def encoded_examples(builder: Any, split: str) -> Iterable[dict]:
    """The examples of a split, their images as the stored bytes of a PNG or JPEG."""
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":
        return builder.as_data_source(split=split, decoders=decoders)
    return tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))


def label_feature(name: str, features: Mapping[str, Any]) -> str:
    """The feature of a builder that is the class; "" where there are none, or attributes make them.

    Raises:
      UserError: where the entry in `DATASETS` does not say which of the features it is, or names one that is no class.
    """
    label = DATASETS[name].label
    classes = [key for key, feature in features.items() if hasattr(feature, "names")]
    if DATASETS[name].binary_attributes or not label or label in classes:
        return label if label in classes else ""
    if classes or label in features:
        raise UserError(
            f"{label!r} is no class among the features of {DATASETS[name].builder}, {', '.join(features)}; name one of "
            f"{', '.join(classes) or 'none'} as `label` of {name} in s2dm_jax/config/datasets.py, or '' for no labels"
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


def main() -> None:
    name, transform, result, tfds_folder = json.loads(sys.argv[1])
    # The parent holds the other end, which closes when the parent ends in any way.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    try:
        description = run(name, ImageTransform(*transform), Path(result).parent, Path(tfds_folder))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        description = {"error": str(error)}
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
