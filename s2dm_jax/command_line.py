"""What the commands share: help, mistakes in one sentence, configs, a missing matplotlib, running others."""

import argparse
import contextlib
import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from ml_collections import ConfigDict

from s2dm_jax.config import UserError, config_path


class Parser(argparse.ArgumentParser):
    """Shows description and examples as they are written; what argparse objects to is a `UserError`."""

    def __init__(self, description: str, examples: str):
        super().__init__(
            description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


@contextlib.contextmanager
def mistakes_told() -> Iterator[None]:
    """Turns a `UserError` into one sentence on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def load_config(name: str) -> ConfigDict:
    """The config that FILE[:METHOD] names, as --config of the main command line does.

    Raises:
      UserError: where there is no such file, and for whatever the file raises.
    """
    path, _, method = config_path(name).partition(":")
    try:
        return runpy.run_path(path)["get_config"](*([method] if method else []))
    except Exception as error:
        # Whatever the user's own file raises while it runs.
        raise UserError(f"--config={name} failed with {type(error).__name__}: {error}") from error


def check_matplotlib(wanted: str) -> None:
    """Checks that matplotlib can be had, before work that would be lost without it.

    Args:
      wanted: what it is for, as "the page".

    Raises:
      UserError: if it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{wanted} needs matplotlib; install it with pip install 's2dm_jax[plot]'")


def run_shown(command: Sequence[str]) -> int:
    """Runs another command of ours so that its progress is seen; returns its exit status.

    On a terminal that is its bar, and what else it says is left out; elsewhere there is no bar, and all that
    it says goes to stderr.
    """
    out = subprocess.DEVNULL if sys.stderr.isatty() else sys.stderr
    return subprocess.run(command, stdout=out).returncode
