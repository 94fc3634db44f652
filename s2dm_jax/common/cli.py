"""Parts that all command lines share: help, the matplotlib check, running other commands."""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TextIO

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.common.signals import deferred

# Those that a command wrote before it ended are read in less.
_SECONDS_OF_LAST_LINES = 5.0


class Parser(argparse.ArgumentParser):
    """Prints its description and examples verbatim; argparse's errors become a `UserError`."""

    def __init__(self, description: str, examples: str):
        super().__init__(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def path_argument(name: str) -> Callable[[str], str]:
    """The `type=` of a path argument, read by `files.user_path`; `name` appears in its errors."""
    return lambda text: str(user_path(text, name)) if text else ""


def check_matplotlib(purpose: str) -> None:
    """Raises a `UserError` unless matplotlib is installed; `purpose` names what needs it, such as "the page"."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{purpose} needs matplotlib; install it with pip install 's2dm_jax[plot]'")


def run_command(
    command: Sequence[str],
    output: TextIO | None = None,
    *,
    log: str | os.PathLike | None = None,
    inherited: Sequence[int] = (),
) -> int:
    """Runs another command of s2dm_jax and returns its exit status; its output goes to `output`, or stderr.

    Args:
      log: a file to which the output is appended as well.
      inherited: file descriptors that stay open in the command, such as a lock's, so that it holds the lock too.

    Raises:
      SystemExit: after a signal, once the command, which receives it too, has saved and exited.
    """
    with contextlib.ExitStack() as stack:
        child = stack.enter_context(_started(command, output or sys.stderr, log, inherited))
        received = stack.enter_context(
            deferred(lambda: "waiting for the command above to finish; interrupt again to stop at once", child)
        )
        status = child.wait()
    if received:
        raise SystemExit(128 + received[0])
    return status


@contextlib.contextmanager
def _started(
    command: Sequence[str], stream: TextIO, log: str | os.PathLike | None, inherited: Sequence[int]
) -> Iterator[subprocess.Popen]:
    """For the block, a command whose output goes to the stream and, line by line, to the file `log`."""
    if log is None:
        with subprocess.Popen(command, stdout=stream, pass_fds=inherited) as unlogged:
            yield unlogged
        return
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:replace"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            pass_fds=inherited,
        )
        reader = threading.Thread(target=_copy_lines, args=(child.stdout, (stream, file)), daemon=True)
        reader.start()
        try:
            yield child
        finally:
            # A process that the command left behind may hold the pipe open.
            reader.join(_SECONDS_OF_LAST_LINES)


def _copy_lines(source: Iterable[str], targets: Sequence[TextIO]) -> None:
    for line in source:
        for target in targets:
            # The file is closed before what a process left behind still writes.
            with contextlib.suppress(ValueError):
                target.write(line)
                target.flush()
