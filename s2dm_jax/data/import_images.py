"""Imports users' images into arrays: a few threads decode them; invalid files are reported, counted and skipped."""

import collections
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.data.sources import check_source, list_images, open_array
from s2dm_jax.data.splits import split_and_label, split_array
from s2dm_jax.data.transforms import ImageTransform, decode, to_array

SPLITS = ("train", "held_out")

_MAX_REPORTED = 10
_MAX_CLASSES = 1000
_BATCH_BYTES = 2**16

# (index of the image, the image [H, W, C] or the bytes of its file, or the error that reading it met)
Job = tuple[int, np.ndarray | bytes | Exception]


class NpyWriter:
    """Writes a .npy of uint8 images row by row, in any order, without an array in memory."""

    def __init__(self, path: Path, count: int, transform: ImageTransform):
        self._shape = (transform.size, transform.size, transform.channels)
        self._row_bytes = math.prod(self._shape)
        self._file = path.open("w+b")  # Read back where rows move up.
        self._start = self._write_header(count)
        self._written = np.zeros(count, bool)

    def _write_header(self, count: int) -> int:
        self._file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self._shape)}
        # numpy leaves room for the first axis to change: the length stays.
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def _seek(self, row: int) -> None:
        self._file.seek(self._start + row * self._row_bytes)

    def write(self, row: int, image: np.ndarray) -> None:
        """Puts an image, uint8 [size, size, channels], in its row."""
        self._seek(row)
        self._file.write(np.ascontiguousarray(image).data)
        self._written[row] = True

    def close(self) -> np.ndarray:
        """Removes the rows that were never written; returns bool [count], which rows were."""
        written = np.flatnonzero(self._written).tolist()
        for row, old in enumerate(written):
            if row != old:
                self._seek(old)
                image = self._file.read(self._row_bytes)
                self._seek(row)
                self._file.write(image)
        self._file.truncate(self._start + len(written) * self._row_bytes)
        self._write_header(len(written))
        self._file.close()
        return self._written


class SplitWriter:
    """Writes images and labels of train and held_out, in any order; a split without images gets no files."""

    def __init__(self, folder: Path, transform: ImageTransform, held_out: np.ndarray, order: np.ndarray):
        """`held_out`, bool [N], says which images are held out; `order`, int [N], how each split is ordered."""
        members = {"train": order[~held_out[order]], "held_out": order[held_out[order]]}
        self._folder, self._held_out = folder, held_out
        self._members = {split: indices for split, indices in members.items() if indices.size}
        self._row = np.empty(len(held_out), np.int64)
        for indices in self._members.values():
            self._row[indices] = np.arange(len(indices))
        self._files = {
            split: NpyWriter(folder / f"{split}.npy", len(indices), transform)
            for split, indices in self._members.items()
        }

    def write(self, index: int, image: np.ndarray) -> None:
        """Writes image `index`, uint8 [size, size, channels]."""
        self._files["held_out" if self._held_out[index] else "train"].write(int(self._row[index]), image)

    def close(self, labels: np.ndarray) -> dict[str, int]:
        """Saves the labels, int64 [N], of the images that were written; returns the number of images per split."""
        counts = {}
        for split, indices in self._members.items():
            written = self._files[split].close()
            np.save(self._folder / f"{split}_labels.npy", labels[indices][written])
            counts[split] = int(written.sum())
        return counts


def import_images(source: str, transform: ImageTransform, max_invalid_fraction: float, folder: Path) -> dict:
    """Writes the arrays of a folder, zip, tar or array of images into an empty folder; returns provenance entries.

    `max_invalid_fraction` is the fraction of the images that may be skipped, rounded up to an integer.
    """
    is_array = check_source(source) == "array"
    print(f"reading the {'array' if is_array else 'list of images'} of {source} …", flush=True)
    jobs: Iterator[Job]
    if is_array:
        count, jobs, values = open_array(source)
        names = [f"image {i}" for i in range(count)]
        splits, order = split_array(values), np.arange(count)
    else:
        listed = list_images(source)
        names, jobs = listed.names, listed.files
        for sentence in listed.left_out:
            print(f"left out, {sentence}", flush=True)
        splits = split_and_label(names)
        order = np.argsort(np.array(names, object), kind="stable")
    used, held_out, labels, classes, description = splits
    if used.sum() < 2:
        kinds = "images" if is_array else "PNG, JPEG or WebP files"
        raise UserError(
            f"config.data.source={source} holds {used.sum()} image{'' if used.sum() == 1 else 's'}; it must hold at "
            f"least 2 {kinds}"
        )
    print(description, flush=True)
    order, jobs = order[used[order]], ((index, data) for index, data in jobs if used[index])
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    needed = int(used.sum()) * transform.size**2 * transform.channels
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free:,} bytes left, and the images of {source} need {needed:,}; set "
            "S2DM_JAX_DATA to a folder with more space"
        )
    writer = SplitWriter(folder, transform, held_out, order)
    skipped = _write_images(source, names, int(used.sum()), jobs, transform, max_invalid_fraction, writer)
    counts = writer.close(labels)
    for split, n in counts.items():
        if not n:
            fix = "all of its images are corrupt or unsupported: fix them" if skipped else "give more images"
            raise UserError(f"config.data.source={source} leaves no image for the split {split}; {fix}")
    return {
        "source": os.path.abspath(source),
        "version": None,
        "splits": {split: {"count": n} for split, n in counts.items()},
        "description": description,
        # Labels that name every image would make a file of names.
        "classes": classes[:_MAX_CLASSES],
        "num_classes": len(classes),
        "skipped": skipped,
    }


def _write_images(source, names, count, jobs, transform, max_invalid_fraction, writer):
    """Decodes and writes `count` images; returns name and reason of each that was skipped."""
    max_invalid = math.ceil(max_invalid_fraction * count)
    skipped = []
    with progress_bar(count, "images") as advance:
        for index, result in _decoded(jobs, transform):
            if isinstance(result, Exception):
                reason = _reason(result)
                skipped.append([names[index], reason])
                if len(skipped) <= _MAX_REPORTED:
                    tqdm.write(f"skipped {names[index]!r}: {reason}", file=sys.stderr)
                if len(skipped) > max_invalid:
                    raise UserError(
                        f"config.data.source={source}: {len(skipped)} of {count} images are corrupt or unsupported, "
                        f"the last {names[index]!r} ({reason}); "
                        f"config.data.max_invalid_fraction={max_invalid_fraction:g} allows {max_invalid}: fix or "
                        "remove them, or raise the limit"
                    )
            else:
                writer.write(index, result)
            advance(1)
    if len(skipped) > _MAX_REPORTED:
        print(f"… and {len(skipped) - _MAX_REPORTED} more, all listed in provenance.json", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {count} images skipped; at most {max_invalid} may be", file=sys.stderr)
    return skipped


def _reason(error: Exception) -> str:
    """Why an image could not be read, without the objects that libraries print."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not a PNG, JPEG or WebP file"
    if isinstance(error, zipfile.BadZipFile):
        return "it is damaged in the archive"
    if "password required" in str(error):
        return "it is encrypted"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _decoded(jobs: Iterator[Job], transform: ImageTransform) -> Iterator[tuple[int, np.ndarray | Exception]]:
    """Every job's image or error, in the jobs' order, decoded by one thread a core."""

    def decoded(data):
        try:
            if isinstance(data, Exception):
                return data
            if isinstance(data, bytes):
                return decode(data, transform)
            return to_array(Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data), transform)
        except Exception as error:
            # Whatever Pillow raises for a damaged file makes only this one invalid.
            return error

    def decoded_batch(jobs):
        return [(index, decoded(data)) for index, data in jobs]

    threads = os.cpu_count() or 1
    waiting: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(threads) as pool, warnings.catch_warnings():
        # Pillow warns of files that open into very many pixels.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # What Pillow warns of, as a damaged EXIF block, is no reason to refuse a picture.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        for batch in _batched_jobs(jobs):
            waiting.append(pool.submit(decoded_batch, batch))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _batched_jobs(jobs):
    """Lists of jobs of about 64 KiB: handing thumbnails over one by one costs more than decoding them."""
    batch, size = [], 0
    for index, data in jobs:
        batch.append((index, data))
        size += 0 if isinstance(data, Exception) else memoryview(data).nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
