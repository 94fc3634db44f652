"""`UserError`: an error of the user's, reported in one sentence."""

import contextlib
import sys
from collections.abc import Iterator

from s2dm_jax.common.process import set_up_process


class UserError(Exception):
    """An error of the user's, described in one sentence; `main` prints it and exits with status 2."""


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Turns a `UserError` into one sentence on stderr and exit status 2; sets up the process (`set_up_process`)."""
    set_up_process()
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
