"""JAX's environment, before it is imported: flags that it would abort on, the cache of compiled programs."""

import importlib.util
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import why_not_writable


def check_xla_flags() -> None:
    """Raises a `UserError` for flags in XLA_FLAGS that jaxlib does not have."""
    value = os.environ.get("XLA_FLAGS", "")
    suspects = [name for name in re.findall(r"--([^\s=]+)", value) if not _in_jaxlib(name)]
    # Names that are not found may be there all the same: only what jaxlib itself refuses counts.
    if suspects and (refused := _refused_flags()):
        raise UserError(
            f"XLA_FLAGS={value} has flags that this jaxlib does not have: {refused}; remove them from XLA_FLAGS"
        )


def _in_jaxlib(name: str) -> bool:
    """Whether a flag's name is one of the strings in jaxlib's library; takes milliseconds."""
    spec = importlib.util.find_spec("jaxlib")
    libraries = Path(spec.origin).parent.glob("libjax_common*") if spec and spec.origin else ()
    for library in libraries:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(f"\0{name}\0".encode()) >= 0:
                return True
    return False


def _refused_flags() -> str:
    """The flags that JAX aborts on, in a process of its own; "" if it does not."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    refused = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", done.stderr)
    return refused[1].strip() if done.returncode and refused else ""


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
