"""Locks on files, which the kernel releases when their process ends."""

import fcntl
from pathlib import Path
from typing import TextIO

from s2dm_jax.common.errors import UserError


def acquire(file: TextIO, *, fix: str, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file against other processes; False if one of them holds the lock.

    Args:
      fix: what to do if the file system has no locks, for the error.
      shared: whether others may hold a shared lock at the same time.
      wait: whether to wait for the others.

    Raises:
      UserError: for a file system without locks: ENOSYS, ENOLCK, EOPNOTSUPP and the like.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"the file system of {Path(file.name).parent} has no file locks ({error.strerror}), so two processes could "
            f"write there at once; {fix}"
        ) from error
    return True
