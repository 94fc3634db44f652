"""New files and folders that are whole or not there, and never take the place of others."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from s2dm_jax.config import UserError


@contextlib.contextmanager
def new_files(*paths: Path) -> Iterator[list[Path]]:
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
