"""Standard output and error whose reader may leave: a log that nobody reads must not end the work."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# A pipe without a reader (`| head`), a terminal that was closed.
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)


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
            if error.errno not in (*_GONE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # What is in the buffer goes there too, at the latest when Python ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if error.errno not in _GONE and self._stream is not sys.__stderr__:
                print(f"the output cannot be written ({error.strerror}) and is dropped from here on", file=sys.stderr)


@contextlib.contextmanager
def droppable_output() -> Iterator[None]:
    """For the block, what cannot be written to stdout or stderr, as after `| head`, is dropped without an error."""
    output, error = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Droppable(output), _Droppable(error)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = output, error
