"""Files that are complete or absent: atomic writes, new outputs, cache folders."""

import contextlib
import json
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from s2dm_jax.common.errors import UserError, naming
from s2dm_jax.common.signals import removed_on_signal

# Bytes of a file's name on Linux and macOS.
_MAX_NAME = 255

# What zipfile raises for a file that is cut short or has flipped bits.
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def cache_dir() -> Path:
    """The cache of Inception weights and dataset statistics: $S2DM_JAX_CACHE, or ~/.cache/s2dm_jax."""
    return user_path(environment_path("S2DM_JAX_CACHE", "~/.cache/s2dm_jax"), "S2DM_JAX_CACHE")


def data_cache_dir() -> Path:
    """The cache of prepared datasets: $S2DM_JAX_DATA, or ~/.cache/s2dm_jax/data."""
    return user_path(environment_path("S2DM_JAX_DATA", "~/.cache/s2dm_jax/data"), "S2DM_JAX_DATA")


def environment_path(variable: str, default: str) -> Path:
    """The folder in an environment variable, or the default, with `~` for the home folder.

    Raises:
      UserError: if there is no home folder, such as for a container's user without a passwd entry and HOME.
    """
    expanded = os.path.expanduser(os.environ.get(variable) or default)
    if expanded.startswith("~"):
        raise UserError(f"{expanded} cannot be found: HOME is not set; set HOME, or {variable} to a folder")
    return Path(expanded)


def user_path(path: str | os.PathLike, name: str) -> Path:
    """A path that a user wrote, with `~` for the home folder and without `..`; `name` is its flag, field or variable.

    Raises:
      UserError: for a URL such as gs://bucket/run, for the home folder of an unknown user, and for a name that is not
        UTF-8, which checkpoints cannot have.
    """
    written = os.fspath(path)
    # pathlib makes one slash of two.
    if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", written):
        raise UserError(
            f"{name}={written} is a URL ({url[1]}:), which is not supported; give a path, such as the folder where the "
            "bucket is mounted"
        )
    expanded = os.path.expanduser(written)
    if expanded.startswith("~"):
        raise UserError(f"{name}={written} names the home folder of an unknown user; give the path in full")
    try:
        os.path.abspath(expanded).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}={written} is not UTF-8, or the locale is not: give a path in UTF-8, and set PYTHONUTF8=1 or "
            "LC_ALL=C.UTF-8"
        ) from error
    if max(len(part.encode()) for part in os.path.abspath(expanded).split("/")) > _MAX_NAME:
        raise UserError(f"{name}={written[:60]}… is too long for a path; give a shorter one")
    # Checkpoints cannot be written through `..`; a path without it is shown as it was written.
    return Path(os.path.realpath(expanded)) if ".." in Path(expanded).parts else Path(expanded)


def why_not_writable(place: str | os.PathLike, *, is_file: bool = False) -> str:
    """Why a file cannot be created in a folder (which may not exist yet), or appended to; "" if it can.

    Tries it and leaves nothing behind: a folder's mode does not show that its file system is read-only.
    """
    path = Path(place).absolute()
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    try:
        if existing == path and is_file:
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=existing).close()
    except NotADirectoryError:
        return f"{existing} is not a folder"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def why_not_replaceable(file: str | os.PathLike) -> str:
    """Why `atomic_path` cannot write a file, or a folder as a whole; "" if it can."""
    path = Path(file).absolute()
    if os.path.lexists(path):
        owner, folder = path.lstat().st_uid, path.parent.stat()
        # As in /tmp: what others own can be written to, but not renamed or removed.
        if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, owner, folder.st_uid):
            return f"another user's, in a folder with the sticky bit, {path.parent}"
    return why_not_writable(path.parent)


def check_writable(
    folders: Iterable[str | os.PathLike],
    advice: str,
    *,
    files: Iterable[str | os.PathLike] = (),
    replaced: Iterable[str | os.PathLike] = (),
) -> None:
    """Raises a `UserError` that ends in `advice` if one of the folders, or of the `files` to append to, fails
    `why_not_writable`, or one of those that are `replaced` fails `why_not_replaceable`.
    """
    found = [*((place, why_not_writable(place)) for place in folders)]
    found += [(place, why_not_writable(place, is_file=True)) for place in files]
    found += [(place, why_not_replaceable(place)) for place in replaced]
    for place, reason in found:
        if reason:
            raise UserError(f"{place} cannot be written to ({reason}); {advice}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, fsync: bool = True) -> Iterator[Path]:
    """A temporary name to write to, a file or a folder, that replaces `path` at the end of the block.

    At any moment, also after a crash, `path` is complete: what it was before, or what was written. After an exception,
    or a signal that ends a command, the temporary file is gone. The name is hidden, in the folder of `path`, which
    exists, with the same suffix.

    Args:
      fsync: whether to wait for the disk, without which a power failure can leave an empty file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with naming(path, temporary), removed_on_signal(temporary):
        try:
            yield temporary
            if fsync:
                for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
                    flush_to_disk(file)
            os.replace(temporary, path)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    # Unlike `open`, this opens folders too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file as UTF-8 through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, keys: Sequence[str], consequence: str) -> dict | None:
    """The dict in a JSON file that can be regenerated; None if it is missing, empty, truncated or without `keys`.

    All but a missing file are reported with their `consequence`, as is a file without read permission.
    """
    content, fault = None, "is empty or damaged"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        fault = f"cannot be read ({error.strerror})"
    except ValueError:
        pass
    if isinstance(content, dict) and set(keys) <= content.keys():
        return content
    print(f"{path} {fault}; {consequence}", file=sys.stderr)
    return None


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a JSON log, without any that a crash truncated."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def atomic_outputs(*paths: Path) -> Iterator[list[Path]]:
    """`atomic_path` for several outputs of a command, none of which may exist; creates the folders they are in.

    Raises:
      UserError: if one of the paths exists (an empty folder may), or cannot be written.
    """
    for path in paths:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} already exists and would be overwritten; give another name, or remove it")
    try:
        with contextlib.ExitStack() as stack:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            # The last is renamed first: whoever finds the main output finds the files that describe it.
            yield [stack.enter_context(atomic_path(path)) for path in paths]
    except OSError as error:
        raise UserError(f"{paths[0]} cannot be written ({error.strerror or error}); give another path") from error
