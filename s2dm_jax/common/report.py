"""Error reporting of a command: one sentence for a `UserError` or a full disk, none if the output has no reader."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from s2dm_jax.common.errors import AbruptEnd, UserError, WriteError
from s2dm_jax.common.process import set_up_process

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# A file where a folder should be, and the other way round; a name that no file can have.
_UNUSABLE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
# A pipe without a reader (`| head`), a terminal that was closed.
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Turns a `UserError`, an `OSError` for a full disk or missing permissions, and a lack of memory into a sentence
    and exit status 2.

    Sets up the process first (`set_up_process`).
    """
    set_up_process()
    with _droppable_output():
        try:
            yield
        except UserError as error:
            _exit_with(error)
        except OSError as error:
            sentence = _sentence(error)
            if not sentence:
                raise
            _exit_with(UserError(sentence))
        except (RuntimeError, MemoryError) as error:
            # jax raises this as a RuntimeError; it is not imported here.
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).strip().partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ") or "out of memory"
            _exit_with(
                UserError(
                    f"not enough memory ({reason[:200].rstrip('.')}); use a smaller batch_size, fewer images at once, "
                    "or a smaller network"
                )
            )


def _exit_with(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    if isinstance(error, AbruptEnd):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def _sentence(error: OSError) -> str:
    """The sentence for an error of a file system; "" for any other, which is a fault of the program."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in _FULL:
        return (
            f"writing failed{where} ({error.strerror}); what was written before is untouched; free some space, and run "
            "the same command again"
        )
    if isinstance(error, WriteError):
        return f"writing failed{where} ({error.strerror}); fix that, and run the same command again"
    if error.errno in _UNUSABLE and error.filename:
        return f"{error.filename} cannot be used ({error.strerror}); fix that, or give another path"
    if error.errno in _FORBIDDEN and error.filename:
        return (
            f"{error.filename} cannot be read or written ({error.strerror}); change its permissions, or give another "
            "path"
        )
    return ""


class _Droppable:
    """A text stream; once its reader is gone, what is written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (*_GONE, *_FULL):
                raise
            # What is in the buffer goes there too, at the latest when Python ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if error.errno not in _GONE and self._stream is not sys.__stderr__:
                print(f"the output cannot be written ({error.strerror}) and is dropped from here on", file=sys.stderr)


@contextlib.contextmanager
def _droppable_output() -> Iterator[None]:
    """For the block, what cannot be written to stdout or stderr, such as after `| head`, is dropped silently."""
    output, error = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Droppable(output), _Droppable(error)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = output, error
