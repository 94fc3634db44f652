"""Users' images into arrays: decoded by a few threads; invalid files are reported, counted and skipped."""

import collections
import math
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.data.sources import ARRAYS, held_out_rows, list_images, open_array, split_and_label
from s2dm_jax.data.transforms import ImageTransform, decode, to_array

_MAX_REPORTED = 10

_BATCH_BYTES = 2**16


class NpyWriter:
    """Writes a .npy of uint8 images row by row, in any order, without an array in memory."""

    def __init__(self, path: Path, count: int, transform: ImageTransform):
        self._shape = (transform.size, transform.size, transform.channels)
        self._row = math.prod(self._shape)
        # Read back where rows move up.
        self._file = path.open("w+b")
        self._start = self._write_header(count)
        self._written = np.zeros(count, bool)

    def _write_header(self, count: int) -> int:
        self._file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self._shape)}
        # numpy leaves room for the first axis to change: the length stays.
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def write(self, row: int, image: np.ndarray) -> None:
        """Puts an image, uint8 [size, size, channels], in its row."""
        self._file.seek(self._start + row * self._row)
        self._file.write(np.ascontiguousarray(image).data)
        self._written[row] = True

    def close(self) -> np.ndarray:
        """Removes the rows that were never written; returns bool [count], which rows were."""
        written = np.flatnonzero(self._written)
        for row, old in enumerate(written):
            if row != old:
                self._file.seek(self._start + int(old) * self._row)
                image = self._file.read(self._row)
                self._file.seek(self._start + row * self._row)
                self._file.write(image)
        self._file.truncate(self._start + len(written) * self._row)
        self._write_header(len(written))
        self._file.close()
        return self._written


def import_images(source: str, transform: ImageTransform, max_invalid_fraction: float, folder: Path) -> dict:
    """Writes the arrays of a folder, zip, tar or array of images into `folder`.

    Args:
      source: path, checked.
      transform: applied to every image.
      max_invalid_fraction: of the images that may be skipped, rounded up to an integer.
      folder: empty folder.

    Returns:
      For the provenance: source, splits, classes, skipped.

    Raises:
      UserError: if the source holds no images, is an unreadable archive, or more than the limit is invalid.
    """
    is_array = source.lower().endswith(ARRAYS) and not os.path.isdir(source)
    print(f"reading the {'array' if is_array else 'list of images'} of {source} …", flush=True)
    jobs: Iterator[tuple[int, np.ndarray | bytes | Exception]]
    if is_array:
        count, jobs, labels = open_array(source)
        names = [f"image {i}" for i in range(count)]
        held_out = np.zeros(len(names), bool)
        held_out[held_out_rows(len(names))] = True
        classes = [str(i) for i in range(int(labels.max(initial=0)) + 1)]
        order = np.arange(len(names))
    else:
        members = list_images(source)
        names, jobs = members.names, members.read()
        if members.others:
            kinds = ", ".join(f"{n:,} × {kind!r}" for kind, n in members.others.most_common(5))
            print(f"left out, for their suffix or as hidden: {kinds}", flush=True)
        held_out, labels, classes = split_and_label(names)
        order = np.argsort(np.array(names, object), kind="stable")
    if len(names) < 2:
        raise UserError(
            f"config.data.source={source} holds {len(names)} images; it must hold at least 2 PNG, JPEG or WebP files"
        )
    skipped = _write_splits(source, names, jobs, order, held_out, labels, transform, max_invalid_fraction, folder)
    splits = {
        name: {"count": int(np.load(folder / f"{name}_labels.npy", mmap_mode="r").size)}
        for name in ("train", "held_out")
    }
    return {
        "source": os.path.abspath(source),
        "version": None,
        "splits": splits,
        "classes": classes,
        "skipped": skipped,
    }


def _write_splits(source, names, jobs, order, held_out, labels, transform, max_invalid_fraction, folder):
    """Decodes every job into its row: names in sorted order within each split. Returns what was skipped."""
    max_invalid = math.ceil(max_invalid_fraction * len(names))
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    needed = len(names) * transform.size**2 * transform.channels
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free:,} bytes left, and the images of {source} need {needed:,}; set "
            "S2DM_JAX_DATA to a folder with more space"
        )
    row = np.empty(len(names), np.int64)
    parts = {"train": order[~held_out[order]], "held_out": order[held_out[order]]}
    for part in parts.values():
        row[part] = np.arange(len(part))
    files = {name: NpyWriter(folder / f"{name}.npy", len(part), transform) for name, part in parts.items()}
    skipped = []
    for index, result in _decoded(jobs, transform, len(names)):
        if isinstance(result, Exception):
            reason = str(result) or type(result).__name__
            skipped.append([names[index], reason])
            if len(skipped) <= _MAX_REPORTED:
                tqdm.write(f"skipped {names[index]!r}: {reason}", file=sys.stderr)
            if len(skipped) > max_invalid:
                raise UserError(
                    f"config.data.source={source}: {len(skipped)} of {len(names)} images are damaged or "
                    f"unfit, the last {names[index]!r} ({reason}); "
                    f"config.data.max_invalid_fraction={max_invalid_fraction:g} allows {max_invalid}: mend "
                    "or remove them, or allow more"
                )
        else:
            files["held_out" if held_out[index] else "train"].write(row[index], result)
    for name, part in parts.items():
        written = files[name].close()
        if not written.any():
            raise UserError(f"config.data.source={source} leaves no image for the split {name}; give more images")
        np.save(folder / f"{name}_labels.npy", labels[part][written])
    if len(skipped) > _MAX_REPORTED:
        print(f"… and {len(skipped) - _MAX_REPORTED} more, all listed in provenance.json", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(names)} images skipped; at most {max_invalid} may be", file=sys.stderr)
    return skipped


def _decoded(
    jobs: Iterator[tuple[int, np.ndarray | bytes | Exception]], transform: ImageTransform, count: int
) -> Iterator[tuple[int, np.ndarray | Exception]]:
    """Every job's image or the error that it met, in the jobs' order, decoded by one thread a core."""

    def decoded(data):
        try:
            if isinstance(data, Exception):
                return data
            return decode(data, transform) if isinstance(data, bytes) else _convert(data, transform)
        except Exception as error:
            # Whatever Pillow raises for a damaged file makes this one unfit, and no other.
            return error

    def decoded_all(jobs):
        return [(index, decoded(data)) for index, data in jobs]

    threads = os.cpu_count() or 1
    waiting: collections.deque[Future] = collections.deque()
    with (
        progress_bar(count, "images") as advance,
        ThreadPoolExecutor(threads) as pool,
        warnings.catch_warnings(),
    ):
        # Pillow warns of files that open into very many pixels.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for batch in _batched_jobs(jobs):
            waiting.append(pool.submit(decoded_all, batch))
            if len(waiting) > 2 * threads:
                yield from _advancing(advance, waiting.popleft().result())
        while waiting:
            yield from _advancing(advance, waiting.popleft().result())


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


def _advancing(advance, results):
    for result in results:
        yield result
        advance(1)


def _convert(array: np.ndarray, transform: ImageTransform) -> np.ndarray:
    """One uint8 image [H, W, C] as `to_array` leaves it."""
    shape = (transform.size, transform.size, transform.channels)
    if array.shape == shape and transform.crop in ("none", "center"):
        return array
    return to_array(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), transform)
