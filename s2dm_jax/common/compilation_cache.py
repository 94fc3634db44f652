"""Where JAX caches compiled programs; must be set before JAX is imported."""

import functools
import os
import re
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from s2dm_jax.common.files import why_not_writable

_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def set_compilation_cache() -> None:
    """Makes JAX cache compiled programs in ~/.cache/s2dm_jax, or the folder that the user names, if it is writable.

    JAX's read and write errors there become one note, not a warning for every program; damaged entries are replaced.
    """
    name = "JAX_COMPILATION_CACHE_DIR"
    written = os.environ.get(name, "~/.cache/s2dm_jax")
    if not written or "://" in written:
        return
    folder = os.environ[name] = os.path.expanduser(written)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if reason := "HOME is not set" if folder.startswith("~") else why_not_writable(folder):
        print(
            f"note: compiled programs are not cached in {folder} ({reason}); {name}=DIR selects another folder",
            file=sys.stderr,
        )
        if os.path.isdir(folder):
            # Those that are there are used, and none is added.
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
        else:
            del os.environ[name]
            return
    warnings.showwarning = functools.partial(_show_warning, Path(folder), set(), warnings.showwarning)


def _show_warning(
    folder: Path, noted: set[str], show: Callable[..., None], message: Warning | str, *arguments: Any
) -> None:
    """`warnings.showwarning`, but for JAX's two on the cache in `folder`, whose damaged entries are removed."""
    found = re.match("Error (reading|writing) persistent compilation cache entry for '(.*?)': (.*)", str(message))
    if not found:
        show(message, *arguments)
        return
    action, program, reason = found.groups()
    # JAX writes no entry where one is, and would leave the damaged one for every start to come.
    damaged = [path for path in folder.iterdir() if path.name.startswith(f"{program}-") and _is_damaged(path)]
    for path in damaged:
        path.unlink(missing_ok=True)
    if action == "reading" and damaged:
        note = f"{len(damaged)} compiled programs in {folder} are truncated or corrupt and will be compiled again"
        print(f"note: {note}", file=sys.stderr, flush=True)
    elif action not in noted:
        noted.add(action)
        print(f"note: {action} compiled programs in {folder} failed ({reason})", file=sys.stderr, flush=True)


def _is_damaged(entry: Path) -> bool:
    """Whether a cached program can be read but not decompressed; without the package zstandard JAX uses zlib."""
    try:
        content = entry.read_bytes()
        if not content.startswith(_ZSTANDARD):
            zlib.decompress(content)
    except zlib.error:
        return os.access(entry.parent, os.W_OK)
    except OSError:
        return False
    return False
