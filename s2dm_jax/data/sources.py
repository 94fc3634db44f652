"""Users' images: a folder, a zip or tar of one, or an array, read in place; no path in them is ever written to."""

import contextlib
import hashlib
import itertools
import math
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.data.transforms import SUFFIXES

_SOURCE_SUFFIXES = {
    "zip": (".zip",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
    "array": (".npy", ".npz"),
}

_MAX_BYTES = 2**28
_NO_FILE = "a link that cannot be followed or a device, not a file"

_HELD_OUT_FRACTION = 0.1
_HELD_OUT_NAMES = {"test", "val", "valid", "validation"}


def check_source(source: str) -> str:
    """What kind of source a path is: "folder", "zip", "tar" or "array"; a `UserError` for anything else."""
    path, name = Path(source), source.lower()
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise UserError(f"config.data.source={source}: there is no such file or folder")
    for kind, suffixes in _SOURCE_SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    known = ", ".join(itertools.chain(*_SOURCE_SUFFIXES.values()))
    raise UserError(f"config.data.source={source} is no folder of images, and its suffix none of {known}")


def fingerprint(source: str) -> str:
    """A hash of the paths, sizes and modification times of the source's files; contents are not read."""
    path = Path(source).expanduser().resolve()
    digest = hashlib.sha256(str(path).encode())
    for name in sorted(_walk(path)) if path.is_dir() else [""]:
        file = path / name
        stat = file.stat() if file.exists() else file.lstat()
        digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def list_images(source: str) -> tuple[list[str], Counter, Iterator[tuple[int, bytes | Exception]]]:
    """The image files of a folder, zip or tar.

    Returns:
      Relative paths with "/"; how many other files there are of each suffix, or "hidden"; an iterator of (index of the
      path, the file's bytes or the error that reading it met).
    """
    kind, path = check_source(source), Path(source)
    with _as_user_error(source):
        if kind == "folder":
            names, read_files = sorted(_walk(path)), _read_folder
        elif kind == "zip":
            with zipfile.ZipFile(path) as archive:
                names = [member.filename.replace("\\", "/") for member in _zip_files(archive)]
            read_files = _read_zip
        else:
            names, read_files = [member.name for _, member in _tar_files(path)], _read_tar
    visible = [index for index, name in enumerate(names) if not _hidden(name)]
    selected = [index for index in visible if names[index].lower().endswith(SUFFIXES)]
    position = {index: i for i, index in enumerate(selected)}
    others = Counter(os.path.splitext(names[i])[1].lower() or "no suffix" for i in visible if i not in position)
    if len(visible) < len(names):
        others["hidden"] = len(names) - len(visible)

    def read():
        with _as_user_error(source):
            for index, data in read_files(source, names, position):
                yield position[index], data

    return [names[index] for index in selected], others, read()


def split_and_label(names: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Split and label of every image, from its relative path with "/".

    Folders that all images share do not count. Where the rest starts with train/ and with test/, val/, valid/ or
    validation/ alone, those are the splits; else a tenth of all, drawn with seed 0 from the sorted names, is held out.
    The folders below are the labels, in sorted order.

    Returns:
      held_out: bool [N]; labels: int64 [N]; classes: name of each label, "." for no folder.
    """
    parents = [[p for p in name.split("/")[:-1] if p not in ("", ".", "..")] for name in names]
    while all(parents) and len({parent[0] for parent in parents}) == 1:
        parents = [parent[1:] for parent in parents]
    tops = {parent[0].lower() if parent else "" for parent in parents}
    if "train" in tops and len(tops) > 1 and tops <= {"train", *_HELD_OUT_NAMES}:
        held_out = np.array([parent[0].lower() != "train" for parent in parents])
        parents = [parent[1:] for parent in parents]
    else:
        held_out = np.empty(len(names), bool)
        held_out[np.argsort(np.array(names, object), kind="stable")] = held_out_mask(len(names))
    folders = np.array(["/".join(parent) or "." for parent in parents], object)
    classes, labels = np.unique(folders, return_inverse=True)
    return held_out, labels, classes.tolist()


def held_out_mask(count: int) -> np.ndarray:
    """Which images are held out where the source has no split: bool [count], a tenth, drawn with seed 0."""
    mask = np.zeros(count, bool)
    mask[np.random.default_rng(0).permutation(count)[: max(1, round(_HELD_OUT_FRACTION * count))]] = True
    return mask


def open_array(source: str) -> tuple[int, Iterator[tuple[int, np.ndarray]], np.ndarray]:
    """The images of an .npy, or of an .npz with the array `images` (or a single one) and perhaps `labels`.

    Returns:
      Number of images N; an iterator of (index, uint8 [H, W, C]) that reads one at a time; labels, int64 [N].
    """
    try:
        with _array_file(source) as (file, labels):
            shape, fortran_order, dtype = _array_header(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"config.data.source={source} cannot be read as an array ({error})") from error
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape or fortran_order:
        raise UserError(
            f"config.data.source={source} holds {dtype} {list(shape)}{', in Fortran order' * fortran_order}; "
            "it must be uint8 [N, H, W] or [N, H, W, C] with values from 0 to 255"
        )
    count, *image_shape = (*shape, 1) if len(shape) == 3 else shape
    image_bytes = math.prod(image_shape)
    if image_shape[2] not in (1, 3, 4) or image_bytes > _MAX_BYTES:
        raise UserError(
            f"config.data.source={source} holds images {image_shape}; they must be [H, W, C] with 1, 3 or 4 "
            f"channels and at most {_MAX_BYTES:,} values"
        )
    labels = np.zeros(count, np.int64) if labels is None else labels
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(
            f"config.data.source={source} has labels {labels.dtype} {list(labels.shape)}; they must be "
            f"integers from 0, [{count}]"
        )

    def read():
        with _as_user_error(source), _array_file(source) as (file, _):
            _array_header(file)
            for index in range(count):
                data = file.read(image_bytes)
                if len(data) < image_bytes:
                    raise EOFError(f"{index} of {count} images")
                yield index, np.frombuffer(data, np.uint8).reshape(image_shape)

    return count, read(), labels.astype(np.int64)


@contextlib.contextmanager
def _array_file(source):
    """The file of the images' array, open at its start, and the labels or None."""
    if not zipfile.is_zipfile(source):
        with Path(source).open("rb") as file:
            yield file, None
        return
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        name = names[0] if len(names) == 1 else "images.npy"
        if name not in names:
            raise ValueError(f"no array named images among {', '.join(names) or 'none'}")
        labels = None
        if "labels.npy" in names:
            with archive.open("labels.npy") as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
        with archive.open(name) as file:
            yield file, labels


def _array_header(file):
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _walk(path: Path) -> Iterator[str]:
    for folder, _, files in os.walk(path):
        relative = os.path.relpath(folder, path).replace(os.sep, "/")
        for name in files:
            yield name if relative == "." else f"{relative}/{name}"


def _hidden(name: str) -> bool:
    """Whether a path lies in what macOS and others leave behind: names with a leading dot, __MACOSX."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _read_folder(source, names, selected):
    for index in selected:
        try:
            path = Path(source, names[index])
            if not path.is_file():
                yield index, ValueError(_NO_FILE)
            elif path.stat().st_size > _MAX_BYTES:
                yield index, _too_large(path.stat().st_size)
            else:
                yield index, path.read_bytes()
        except OSError as error:
            yield index, error


def _zip_files(archive):
    return [member for member in archive.infolist() if not member.is_dir()]


def _read_zip(source, names, selected):
    with zipfile.ZipFile(source) as archive:
        members = _zip_files(archive)
        for index in selected:
            if members[index].file_size > _MAX_BYTES:
                yield index, _too_large(members[index].file_size)
                continue
            try:
                # The size that a member claims need not be what it opens into.
                with archive.open(members[index]) as file:
                    yield index, file.read(_MAX_BYTES)
            except Exception as error:
                # A wrong checksum, a password, an unknown compression: each has its own error.
                yield index, error


class _StrictTarInfo(tarfile.TarInfo):
    """A header of which damage ends the reading with an error; tarfile itself takes it for the end."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from error


def _tar_files(path):
    with tarfile.open(path, "r:*", tarinfo=_StrictTarInfo) as archive:
        for member in archive:
            # tarfile keeps every header that it has met.
            archive.members = []  # type: ignore[attr-defined]
            if not member.isdir():
                yield archive, member


def _read_tar(source, names, selected):
    for index, (archive, member) in enumerate(_tar_files(source)):
        if index not in selected:
            continue
        if not member.isreg():
            yield index, ValueError(_NO_FILE)
        elif member.size > _MAX_BYTES:
            yield index, _too_large(member.size)
        else:
            yield index, archive.extractfile(member).read()


def _too_large(size: int) -> ValueError:
    return ValueError(f"a file of {size:,} bytes, more than {_MAX_BYTES:,}")


@contextlib.contextmanager
def _as_user_error(source):
    """An archive that cannot be read through becomes a `UserError`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"config.data.source={source} cannot be read: permission denied") from error
    except Exception as error:
        # Each kind of compression has its own error.
        raise UserError(f"config.data.source={source} is damaged or cut short ({error}); get it again") from error
