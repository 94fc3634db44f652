"""The errors of a command: user errors, and file system errors while writing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A user error, described in one sentence; `main` prints it and exits with status 2."""


class WriteError(OSError):
    """A file system error while writing a file; it carries the file's name."""


class AbruptEnd(UserError):
    """An error after which the process must exit at once, because its threads may wait forever."""


class UnfinishedWrite(AbruptEnd):
    """A checkpoint that could not be written, for which Orbax's threads may wait."""


class LostProcess(AbruptEnd):
    """Another process of the run has ended, and JAX would wait for it."""


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns an `OSError` without a file name, or for `temporary`, into a `WriteError` with the name of the file
    written.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.errno is not None and error.filename is None
        if unnamed or (error.filename and temporary and Path(error.filename).is_relative_to(temporary)):
            raise WriteError(error.errno, error.strerror, str(path)) from error
        raise
