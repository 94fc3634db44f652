"""Where JAX caches compiled programs; to be set before it is imported."""

import os
import sys

from s2dm_jax.common.files import why_not_writable


def set_compilation_cache() -> None:
    """Makes JAX cache compiled programs in ~/.cache/s2dm_jax, or where the user says, if that can be written to."""
    name = "JAX_COMPILATION_CACHE_DIR"
    written = os.environ.get(name, "~/.cache/s2dm_jax")
    if not written or "://" in written:
        return
    folder = os.environ[name] = os.path.expanduser(written)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if reason := "HOME is not set" if folder.startswith("~") else why_not_writable(folder):
        print(
            f"note: compiled programs are not cached in {folder} ({reason}); {name}=DIR names another", file=sys.stderr
        )
        if os.path.isdir(folder):
            # Those that are there are used, and none is added.
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
        else:
            del os.environ[name]
