"""The errors of a command: the user's, and those of the file system where something is written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """An error of the user's, described in one sentence; `main` prints it and exits with status 2."""


class WriteError(OSError):
    """An error of the file system at a file that was being written, whose name it has."""


class AbruptEnd(UserError):
    """An error after which the process ends at once: its threads may wait for what never comes."""


class UnfinishedWrite(AbruptEnd):
    """A checkpoint that could not be written, for which Orbax's threads may wait."""


class LostProcess(AbruptEnd):
    """Another process of the run has ended, and JAX would wait for it."""


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes an `OSError` that names no file, or one at `temporary`, a `WriteError` with the name of what is written."""
    try:
        yield
    except OSError as error:
        unnamed = error.errno is not None and error.filename is None
        if unnamed or (error.filename and temporary and Path(error.filename).is_relative_to(temporary)):
            raise WriteError(error.errno, error.strerror, str(path)) from error
        raise
