"""Shared by the command lines: help, the check for matplotlib, running other commands."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.common.signals import deferred


class Parser(argparse.ArgumentParser):
    """Prints description and examples as they are written; errors of argparse become a `UserError`."""

    def __init__(self, description: str, examples: str):
        super().__init__(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def path_argument(name: str) -> Callable[[str], str]:
    """The `type=` of an argument that is a path: as `files.user_path` reads it; `name` is for its errors."""
    return lambda text: str(user_path(text, name)) if text else ""


def check_matplotlib(purpose: str) -> None:
    """Raises a `UserError` unless matplotlib is installed; `purpose` is what needs it, as "the page"."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{purpose} needs matplotlib; install it with pip install 's2dm_jax[plot]'")


def run_command(command: Sequence[str], output: TextIO | None = None) -> int:
    """Runs another command of s2dm_jax and returns its exit status; its output goes to `output`, or stderr.

    Raises:
      SystemExit: after a signal, which the command receives too, once the command has saved and ended.
    """
    child = subprocess.Popen(command, stdout=output or sys.stderr)
    with child, deferred(lambda: "waiting until the command above has ended; again to stop at once", child) as received:
        status = child.wait()
    if received:
        raise SystemExit(128 + received[0])
    return status
