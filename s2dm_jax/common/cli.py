"""Shared by the command lines: help, the check for matplotlib, running other commands."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from s2dm_jax.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """Prints description and examples as they are written; errors of argparse become a `UserError`."""

    def __init__(self, description: str, examples: str):
        super().__init__(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def check_matplotlib(purpose: str) -> None:
    """Checks that matplotlib is installed, before work that would be lost without it.

    Args:
      purpose: what it is for, as "the page".

    Raises:
      UserError: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{purpose} needs matplotlib; install it with pip install 's2dm_jax[plot]'")


def run_command(command: Sequence[str]) -> int:
    """Runs another command of s2dm_jax and returns its exit status; all its output goes to stderr.

    Its progress is a bar where stderr is a terminal, and lines elsewhere.
    """
    return subprocess.run(command, stdout=sys.stderr).returncode
