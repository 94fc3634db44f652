"""What the command lines share: help, a missing matplotlib, running other commands."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from s2dm_jax.common.errors import UserError


class Parser(argparse.ArgumentParser):
    """Shows description and examples as they are written; what argparse objects to is a `UserError`."""

    def __init__(self, description: str, examples: str):
        super().__init__(
            description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def check_matplotlib(wanted: str) -> None:
    """Checks that matplotlib can be had, before work that would be lost without it.

    Args:
      wanted: what it is for, as "the page".

    Raises:
      UserError: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{wanted} needs matplotlib; install it with pip install 's2dm_jax[plot]'")


def run_command(command: Sequence[str]) -> int:
    """Runs another command of ours so that its progress is seen; returns its exit status.

    On a terminal that is its bar, and what else it says is left out; elsewhere there is no bar, and all that
    it says goes to stderr.
    """
    out = subprocess.DEVNULL if sys.stderr.isatty() else sys.stderr
    return subprocess.run(command, stdout=out).returncode
