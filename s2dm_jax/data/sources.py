"""Users' images: a folder, a zip or tar of one, or an array, read in place; no path in them is ever written to."""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import posixpath
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.file_kinds import kind_of_file
from s2dm_jax.data.archives import MAX_BYTES, NO_FILE, follow_links, list_tar, list_zip, read_tar, read_zip, too_large
from s2dm_jax.data.folders import walk_folder
from s2dm_jax.data.splits import is_split
from s2dm_jax.data.transforms import SUFFIXES

# The source of images that nobody has named; sampling needs none.
UNKNOWN = "unknown"

_SOURCE_SUFFIXES = {
    "zip": (".zip",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
    "array": (".npy", ".npz"),
}


def check_source(source: str) -> str:
    """What kind of source a path is: "folder", "zip", "tar" or "array"; a `UserError` for anything else."""
    path, name = Path(source), source.lower()
    if path.is_dir():
        return "folder"
    if not path.exists() and name == UNKNOWN:
        raise UserError(
            f"config.data.source={UNKNOWN}: the weights do not record what they were trained on; give its images, "
            "--config.data.source=PATH, or convert the weights again with --data=NAME"
        )
    if not path.exists():
        raise UserError(f"config.data.source={source}: no such file or folder")
    if not path.is_file():
        raise UserError(f"config.data.source={source} is a device or a pipe, not a file or a folder")
    for kind, suffixes in _SOURCE_SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    known = ", ".join(itertools.chain(*_SOURCE_SUFFIXES.values()))
    raise UserError(f"config.data.source={source} is not a folder of images, and its suffix is not one of {known}")


def fingerprint(source: str) -> str:
    """A hash of the paths, sizes and modification times of the source's files; contents are not read."""
    path = Path(source).expanduser().resolve()
    digest = hashlib.sha256(str(path).encode())
    for name in sorted(walk_folder(path).files) if path.is_dir() else [""]:
        digest.update(f"\0{name}{_size_and_time(path / name)}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size_and_time(file: Path) -> str:
    """Size and modification time of a file, of a link that cannot be followed its own; "" if they cannot be read."""
    for read in (file.stat, file.lstat):
        with contextlib.suppress(OSError):
            stat = read()
            return f"\0{stat.st_size}\0{stat.st_mtime_ns}"
    return ""


class ImageList(NamedTuple):
    """The image files of a source.

    Attributes:
      names: relative paths with "/"; a folder that cannot be read is among them, with a "/" at its end.
      left_out: what is not among them, a sentence each.
      files: an iterator of (index of the name, the file's bytes or the error that reading it met).
    """

    names: list[str]
    left_out: list[str]
    files: Iterator[tuple[int, bytes | Exception]]


def list_images(source: str) -> ImageList:
    """The image files of a folder, zip or tar, also behind links to folders; of files of one name in an archive the
    last.

    Raises:
      UserError: for a source that is damaged, cut short or cannot be read.
    """
    kind, path = check_source(source), Path(source)
    data_of: dict[int, int] = {}
    read_files: Callable[..., Iterator[tuple[int, bytes | Exception]]]
    with _as_user_error(source):
        if kind == "folder":
            tree = walk_folder(path, is_split)
            if "" in tree.unreadable:
                raise tree.unreadable[""]
            names, repeated = sorted(tree.files), tree.repeated
            names += [f"{folder}/" for folder in tree.unreadable]
            read_files = functools.partial(_read_folder, tree.unreadable)
        else:
            names, data_of, repeated = follow_links((list_zip if kind == "zip" else list_tar)(path), is_split)
            read_files = read_zip if kind == "zip" else read_tar
    selected, left_out = _select(names, repeated)
    # Of a link in an archive, the file that it leads to is read.
    positions: dict[int, list[int]] = {}
    for position, index in enumerate(selected):
        positions.setdefault(data_of.get(index, index), []).append(position)

    def read():
        with _as_user_error(source):
            for index, data in read_files(source, names, positions):
                for position in positions[index]:
                    yield position, data

    return ImageList([names[index] for index in selected], left_out, read())


def _select(names: list[str], repeated: list[str]) -> tuple[list[int], list[str]]:
    """The indices of the images among the names of files, of which "" is none, and what is left out, in sentences."""
    left_out = []
    if repeated:
        links = ", ".join(map(repr, repeated[:3]))
        left_out.append(f"{len(repeated):,} link(s) to folders that are read already, such as {links}")
    visible = [index for index, name in enumerate(names) if name and not _hidden(name)]
    selected = [index for index in visible if names[index].lower().endswith((*SUFFIXES, "/"))]
    last = {posixpath.normpath(names[index]): index for index in selected}
    if replaced := len(selected) - len(last):
        left_out.append(f"{replaced:,} file(s) that a later one of the same name in the archive overrides")
        selected = sorted(last.values())
    suffixes = Counter(
        os.path.splitext(names[i])[1].lower() or "no suffix"
        for i in visible
        if not names[i].lower().endswith((*SUFFIXES, "/"))
    )
    if hidden := sum(map(bool, names)) - len(visible):
        suffixes["hidden"] = hidden
    if suffixes:
        kinds = ", ".join(f"{n:,} × {suffix!r}" for suffix, n in suffixes.most_common(5))
        left_out.append(f"because of their suffix or as hidden files: {kinds}")
    return selected, left_out


def open_array(source: str) -> tuple[int, Iterator[tuple[int, np.ndarray]], np.ndarray]:
    """The images of an .npy, or of an .npz with the array `images` (or a single one) and perhaps `labels`.

    Returns:
      Number of images N; an iterator of (index, uint8 [H, W, C]) that reads one at a time; labels, integers [N].
    """
    try:
        with _array_file(source) as (file, labels):
            shape, fortran_order, dtype = _array_header(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = _reason(source, error)
        raise UserError(
            f"config.data.source={source} cannot be read as an array ({reason}); give a file written by numpy's save "
            "or savez"
        ) from error
    if dtype != np.uint8 or len(shape) not in (3, 4) or 0 in shape or fortran_order:
        raise UserError(
            f"config.data.source={source} holds {dtype} {list(shape)}{', in Fortran order' * fortran_order}; "
            "it must be uint8 [N, H, W] or [N, H, W, C] with values from 0 to 255"
        )
    if len(shape) == 3 and shape[2] in (3, 4):
        raise UserError(
            f"config.data.source={source} holds {list(shape)}, which is one image [H, W, C] or {shape[0]} grey ones of "
            f"{shape[1]}×{shape[2]} pixels; give [N, H, W, C]"
        )
    count, *image_shape = (*shape, 1) if len(shape) == 3 else shape
    image_bytes = math.prod(image_shape)
    if image_shape[2] not in (1, 3, 4) or image_bytes > MAX_BYTES:
        raise UserError(
            f"config.data.source={source} holds images {image_shape}; they must be [H, W, C] with 1, 3 or 4 "
            f"channels and at most {MAX_BYTES:,} values"
            + ("; move the channels to the end" if image_shape[0] in (1, 3, 4) else "")
        )
    labels = np.zeros(count, np.int64) if labels is None else labels
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"config.data.source={source} has labels {labels.dtype} {list(labels.shape)}; they must be integers, "
            f"[{count}]"
        )

    def read():
        with _as_user_error(source), _array_file(source) as (file, _):
            _array_header(file)
            for index in range(count):
                data = file.read(image_bytes)
                if len(data) < image_bytes:
                    raise EOFError(f"{index} of {count} images")
                yield index, np.frombuffer(data, np.uint8).reshape(image_shape)

    return count, read(), labels


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


def _hidden(name: str) -> bool:
    """Whether a path lies in what macOS and others leave behind: names with a leading dot, __MACOSX."""
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _read_folder(unreadable, source, names, selected):
    for index in selected:
        if names[index].endswith("/"):
            error = unreadable[names[index][:-1]]
            yield index, ValueError(f"{error.strerror or error}; images in this folder are left out")
            continue
        try:
            path = Path(source, names[index])
            if not path.is_file():
                yield index, ValueError(NO_FILE)
            elif path.stat().st_size > MAX_BYTES:
                yield index, too_large(path.stat().st_size)
            else:
                yield index, path.read_bytes()
        except OSError as error:
            yield index, error


@contextlib.contextmanager
def _as_user_error(source):
    """An archive that cannot be read through becomes a `UserError`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"config.data.source={source} cannot be read: permission denied") from error
    except Exception as error:
        # Each kind of compression has its own error.
        reason = _reason(source, error)
        raise UserError(f"config.data.source={source} is damaged or cut short ({reason}); get it again") from error


def _reason(source: str, error: Exception) -> str:
    """Why a source cannot be read, without the words of zipfile, tarfile and numpy that say nothing of it."""
    text = str(error).strip()
    if os.path.isfile(source) and (kind := kind_of_file(source)):
        return kind
    if isinstance(error, zipfile.BadZipFile) and not zipfile.is_zipfile(source):
        return "it is not a zip file"
    if isinstance(error, tarfile.ReadError) and "\n" in text:
        # tarfile lists what each kind of compression objects to.
        return "it is not a tar file, or its compression is not supported"
    if "magic string" in text or text.startswith("EOF"):
        return "an array in it is cut short or not in numpy's format"
    if "allow_pickle" in text:
        return "an array in it holds Python objects"
    return text.partition("\n")[0]
