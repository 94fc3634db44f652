"""Files that are complete or absent: atomic writes, new outputs, cache folders."""

import contextlib
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from s2dm_jax.common.errors import UserError


def data_cache_dir() -> Path:
    """Where prepared data sets are kept: $S2DM_JAX_DATA, or ~/.cache/s2dm_jax/data."""
    return Path(os.environ.get("S2DM_JAX_DATA") or "~/.cache/s2dm_jax/data").expanduser()


def write_atomic(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or, if the process or the disk gives out, as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def cache_dir() -> Path:
    """Where weights and statistics of data sets are kept: $S2DM_JAX_CACHE, or ~/.cache/s2dm_jax."""
    return Path(os.environ.get("S2DM_JAX_CACHE") or "~/.cache/s2dm_jax").expanduser()


# What a zip file that is cut short or has flipped bits makes zipfile raise.
ZIP_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@contextlib.contextmanager
def atomic_outputs(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names to write to, files or folders, that are renamed to `paths` once all are written.

    Args:
      *paths: none of which is there; the folder that they go to is created.

    Yields:
      One name for each, in the folder of its path, with the same suffix.

    Raises:
      UserError: if one of the paths is there already, or cannot be written.
    """
    for path in paths:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(
                f"{path} is there already and would be overwritten; give another name, or remove it"
            )
    temporary = [path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # What the files belong to comes last: who finds it finds the others.
        for name, path in reversed(list(zip(temporary, paths, strict=True))):
            os.replace(name, path)
    except OSError as error:
        raise UserError(
            f"{paths[0]} cannot be written ({error.strerror or error}); give another path"
        ) from error
    finally:
        for name in temporary:
            if name.is_dir():
                shutil.rmtree(name)
            name.unlink(missing_ok=True)
