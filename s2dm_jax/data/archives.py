"""Zips and tars, read in place: their files, links among them, damage."""

import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

MAX_BYTES = 2**28
NO_FILE = "a link that cannot be followed or a device, not a file"
_MAX_TARGET = 4096
# Links to links to …
_MAX_LINKS = 40


class Member(NamedTuple):
    """A file or link in an archive.

    Attributes:
      name: its path with "/", as it is written.
      target: the path in the archive that a link leads to; "" for a file.
    """

    name: str
    target: str = ""


def list_zip(path: Path) -> list[Member]:
    """The files and links of a zip, as `read_zip` counts them.

    Raises:
      ValueError: if something that is an archive too comes before the first file.
    """
    _check_zip_start(path)
    with zipfile.ZipFile(path) as archive:
        members = []
        for member in _zip_files(archive):
            name = member.filename.replace("\\", "/")
            # The content of a link is its target.
            link = archive.read(member).decode(errors="surrogateescape") if _is_link(member) else ""
            members.append(Member(name, _beside(name, link)))
        return members


def list_tar(path: Path) -> list[Member]:
    """The files and links of a tar, as `read_tar` counts them."""
    members = []
    for _, member in _tar_files(path):
        # A hard link names its target from the root of the archive.
        hard = posixpath.normpath(member.linkname) if member.islnk() else ""
        members.append(Member(member.name, _beside(member.name, member.linkname) if member.issym() else hard))
    return members


def _beside(name: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) if link else ""


def follow_links(
    members: list[Member], preferred: Callable[[str], bool]
) -> tuple[list[str], dict[int, int], list[str]]:
    """What the links of an archive lead to inside it.

    Returns:
      The name of each member, "" for a link to a folder, with a "/" at the end for a link without a suffix that leads
      nowhere: it may have been one. The member whose data a link to a file stands for, by its index. The links to
      folders whose files have names already; a link whose name is `preferred` names them again.
    """
    names = [member.name for member in members]
    data_of: dict[int, int] = {}
    repeated: list[str] = []
    links = [index for index, member in enumerate(members) if member.target]
    if not links:
        return names, data_of, repeated
    paths = [posixpath.normpath(name) for name in names]
    files = {path: index for index, path in enumerate(paths)}
    folders = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "/"}
    for index in links:
        target = members[index].target
        for _ in range(_MAX_LINKS):
            if target not in files or not members[files[target]].target:
                break
            target = members[files[target]].target
        found = files.get(target, index)
        if not members[found].target:
            data_of[index] = found
        elif target in folders or target == ".":
            names[index] = ""
            if preferred(posixpath.basename(paths[index])) and target in folders and not preferred(target):
                names = [_renamed(name, target, paths[index]) for name in names]
            else:
                repeated.append(paths[index])
        elif not posixpath.splitext(paths[index])[1]:
            names[index] += "/"
    return names, data_of, repeated


def _renamed(name: str, folder: str, new: str) -> str:
    path = posixpath.normpath(name) if name else ""
    return new + path[len(folder) :] if path.startswith(f"{folder}/") else name


def _check_zip_start(path: Path) -> None:
    """Raises a ValueError if something that is an archive too comes before the first file of a zip."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        first = min((member.header_offset for member in archive.infolist()), default=0)
        if first and file.read(4) == b"PK\x03\x04":
            raise ValueError(
                f"its first {first:,} bytes are files that its table of contents lacks, as in concatenated archives: "
                "unpack them into one folder"
            )


def _zip_files(archive):
    return [member for member in archive.infolist() if not member.is_dir()]


def _is_link(member: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(member.external_attr >> 16) and member.file_size < _MAX_TARGET


def read_zip(source: str, names: list[str], selected: Container[int]) -> Iterator[tuple[int, bytes | Exception]]:
    """Index and bytes, or the error that reading them met, of the selected files of a zip."""
    with zipfile.ZipFile(source) as archive:
        for index, member in enumerate(_zip_files(archive)):
            if index not in selected:
                continue
            if _is_link(member):
                yield index, ValueError(NO_FILE)
                continue
            if member.file_size > MAX_BYTES:
                yield index, too_large(member.file_size)
                continue
            try:
                # The size that a member claims need not be what it opens into.
                with archive.open(member) as file:
                    yield index, file.read(MAX_BYTES)
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
            raise ValueError("data follows its end, as in concatenated archives: unpack them into one folder")


def read_tar(source: str, names: list[str], selected: Container[int]) -> Iterator[tuple[int, bytes | Exception]]:
    """As `read_zip`, of a tar."""
    for index, (archive, member) in enumerate(_tar_files(source)):
        if index not in selected:
            continue
        if not member.isreg():
            yield index, ValueError(NO_FILE)
        elif member.size > MAX_BYTES:
            yield index, too_large(member.size)
        else:
            yield index, archive.extractfile(member).read()


def too_large(size: int) -> ValueError:
    """The error for a file that is too large to be an image."""
    return ValueError(f"a file of {size:,} bytes, more than {MAX_BYTES:,}")
