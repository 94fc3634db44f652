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
from s2dm_jax.data.folders import walk_folder
from s2dm_jax.data.transforms import SUFFIXES

_SOURCE_SUFFIXES = {
    "zip": (".zip",),
    "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
    "array": (".npy", ".npz"),
}

_MAX_BYTES = 2**28
_NO_FILE = "a link that cannot be followed or a device, not a file"


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
    for name in sorted(walk_folder(path).files) if path.is_dir() else [""]:
        file = path / name
        stat = file.stat() if file.exists() else file.lstat()
        digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


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
    left_out: list[str] = []
    read_files: Callable[..., Iterator[tuple[int, bytes | Exception]]]
    with _as_user_error(source):
        if kind == "folder":
            tree = walk_folder(path)
            if "" in tree.unreadable:
                raise tree.unreadable[""]
            names, read_files = sorted(tree.files), functools.partial(_read_folder, tree.unreadable)
            names += [f"{folder}/" for folder in tree.unreadable]
            if tree.repeated:
                links = ", ".join(map(repr, tree.repeated[:3]))
                left_out.append(f"{len(tree.repeated):,} link(s) to folders that are read already, such as {links}")
        elif kind == "zip":
            _check_zip_start(path)
            with zipfile.ZipFile(path) as archive:
                names = [member.filename.replace("\\", "/") for member in _zip_files(archive)]
            read_files = _read_zip
        else:
            names, read_files = [member.name for _, member in _tar_files(path)], _read_tar
    visible = [index for index, name in enumerate(names) if not _hidden(name)]
    selected = [index for index in visible if names[index].lower().endswith((*SUFFIXES, "/"))]
    last = {posixpath.normpath(names[index]): index for index in selected}
    if replaced := len(selected) - len(last):
        left_out.append(f"{replaced:,} file(s) that a later one of the same name in the archive replaces")
        selected = sorted(last.values())
    position = {index: i for i, index in enumerate(selected)}
    suffixes = Counter(
        os.path.splitext(names[i])[1].lower() or "no suffix"
        for i in visible
        if not names[i].lower().endswith((*SUFFIXES, "/"))
    )
    if len(visible) < len(names):
        suffixes["hidden"] = len(names) - len(visible)
    if suffixes:
        kinds = ", ".join(f"{n:,} × {suffix!r}" for suffix, n in suffixes.most_common(5))
        left_out.append(f"for their suffix or as hidden: {kinds}")

    def read():
        with _as_user_error(source):
            for index, data in read_files(source, names, position):
                yield position[index], data

    return ImageList([names[index] for index in selected], left_out, read())


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
            f"config.data.source={source} cannot be read as an array ({reason}); give what numpy's save or savez wrote"
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
    if image_shape[2] not in (1, 3, 4) or image_bytes > _MAX_BYTES:
        raise UserError(
            f"config.data.source={source} holds images {image_shape}; they must be [H, W, C] with 1, 3 or 4 "
            f"channels and at most {_MAX_BYTES:,} values"
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
                yield index, ValueError(_NO_FILE)
            elif path.stat().st_size > _MAX_BYTES:
                yield index, _too_large(path.stat().st_size)
            else:
                yield index, path.read_bytes()
        except OSError as error:
            yield index, error


def _check_zip_start(path: Path) -> None:
    """Raises a ValueError if something that is an archive too comes before the first file of a zip."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        first = min((member.header_offset for member in archive.infolist()), default=0)
        if first and file.read(4) == b"PK\x03\x04":
            raise ValueError(
                f"its first {first:,} bytes are files that its table of contents does not have, as where archives are "
                "concatenated: unpack them into one folder"
            )


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
        _check_tar_end(archive)


def _check_tar_end(archive):
    """Raises a ValueError if more than padding follows the end of a tar."""
    archive.fileobj.seek(archive.offset)
    while block := archive.fileobj.read(2**20):
        if any(block):
            raise ValueError("more follows its end, as where archives are concatenated: unpack them into one folder")


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
        reason = _reason(source, error)
        raise UserError(f"config.data.source={source} is damaged or cut short ({reason}); get it again") from error


def _reason(source: str, error: Exception) -> str:
    """Why a source cannot be read, without the words of zipfile, tarfile and numpy that say nothing of it."""
    text = str(error).strip()
    if os.path.isfile(source) and (kind := kind_of_file(source)):
        return kind
    if isinstance(error, zipfile.BadZipFile) and not zipfile.is_zipfile(source):
        return "it is no zip file"
    if isinstance(error, tarfile.ReadError) and "\n" in text:
        # tarfile lists what each kind of compression objects to.
        return "it is no tar file, or compressed in another way"
    if "magic string" in text or text.startswith("EOF"):
        return "an array in it is cut short, or is none of numpy"
    if "allow_pickle" in text:
        return "an array in it holds Python objects"
    return text.partition("\n")[0]
