"""Shared by the command lines: help, the check for matplotlib, running other commands."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path


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


def run_command(command: Sequence[str]) -> int:
    """Runs another command of s2dm_jax, all its output on stderr, and returns its exit status."""
    return subprocess.run(command, stdout=sys.stderr).returncode
