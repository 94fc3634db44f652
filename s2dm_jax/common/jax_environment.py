"""Checks, before JAX is imported, the environment variables with which it would abort."""

import importlib.util
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

from s2dm_jax.common.errors import UserError

# In the names of flags that take a number, and of those that take true or false.
_NUMBER = re.compile(r"level|count|size|bytes|limit|threshold|threads|parallelism|seed")
_SWITCH = re.compile(r"enable|disable|use|allow|deterministic")

# Variables that are a path or a list of platforms, which `import jax` takes as they are.
_ANY_TEXT = ("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS", "JAX_PLATFORM_NAME")
_REASON = re.compile(
    r"Unknown flags? in XLA_FLAGS: .*|Couldn't interpret value .*|Could not open file .*|RuntimeError: .*", re.MULTILINE
)


def check_jax_environment() -> None:
    """Checks the variables of the environment that JAX reads, before it is imported.

    Raises:
      UserError: for a value with which JAX would abort; names the variable.
    """
    check_xla_flags()
    count = os.environ.get("JAX_NUM_CPU_DEVICES", "-1")
    if not re.fullmatch(r"-1|0*[1-9]\d*", count):
        raise UserError(f"JAX_NUM_CPU_DEVICES={count} is not a number of devices of at least 1; correct or unset it")
    given = {name: value for name, value in os.environ.items() if name.startswith("JAX_") and name not in _ANY_TEXT}
    if not given or "jax" in sys.modules:
        return
    try:
        # It reads them all, and is needed anyway.
        importlib.import_module("jax")
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        named = [name for name in given if name.lower() in reason.lower().replace(".", "_")]
        wrong = named or [name for name, value in given.items() if repr(value) in reason]
        settings = " ".join(f"{name}={given[name]}" for name in wrong or given)
        raise UserError(f"{settings} is not a value that JAX accepts ({reason}); correct or unset it") from error


def check_platforms() -> None:
    """Raises a `UserError` if JAX does not start with the platforms in JAX_PLATFORMS; tries it in a process of its own,
    to be called before work of which JAX has no part.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    names = {name for name in platforms.split(",") if name}
    # Of a TPU, only one process can be there.
    if names <= {"cpu"} or "tpu" in names:
        if names == {"tpu"} and importlib.util.find_spec("libtpu") is None:
            raise unusable_platform(platforms, "its plugin is not installed")
        return
    if reason := _refusal({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}):
        raise unusable_platform(platforms, reason)


def unusable_platform(platforms: str, reason: str) -> UserError:
    """The error for a JAX_PLATFORMS that JAX does not start with."""
    reason = reason.partition("(set JAX_PLATFORMS")[0].strip()
    # Where the plugin of CUDA is missing, jax asserts that it is not.
    reason = "its plugin is not installed" if reason in ("", "AssertionError") else reason
    return UserError(
        f"JAX_PLATFORMS={platforms} names a platform that cannot be used here ({reason}); unset it, or set "
        "JAX_PLATFORMS=cpu"
    )


def xla_flags() -> list[str]:
    """The flags in XLA_FLAGS, or in the file that it names.

    Raises:
      UserError: for a file that cannot be read.
    """
    value = os.environ.get("XLA_FLAGS", "").strip()
    if not value or value.startswith("--"):
        return value.split()
    try:
        return Path(value).read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(
            f"XLA_FLAGS={value} does not start with --, so it names a file of flags, which cannot be read ({reason}); "
            "give flags such as --xla_backend_optimization_level=3, or a file"
        ) from error


def check_xla_flags() -> None:
    """Raises a `UserError` for flags in XLA_FLAGS that jaxlib does not have, and for values that it does not take."""
    # Only what jaxlib itself refuses counts: it is asked where a flag looks wrong.
    if any(_is_suspicious(flag) for flag in xla_flags()) and (refused := _refusal({"JAX_PLATFORMS": "cpu"})):
        value = os.environ["XLA_FLAGS"]
        unknown = re.match("Unknown flags? in XLA_FLAGS: (.*)", refused)
        fault = f"flags that this jaxlib does not have: {unknown[1]}" if unknown else f"a wrong value: {refused}"
        raise UserError(f"XLA_FLAGS={value} has {fault}; correct them, or remove them from XLA_FLAGS")


def _is_suspicious(flag: str) -> bool:
    """Whether jaxlib might refuse a flag: an unknown name, or a value that is not as the name says."""
    match = re.fullmatch(r"--([^\s=]+)=(.+)", flag)
    if match is None or not _in_jaxlib(match[1]):
        return True
    name, value = match.groups()
    if name.endswith("device_count"):
        return not re.fullmatch("[1-9][0-9]*", value)
    if re.fullmatch("true|false", value, re.IGNORECASE):
        return bool(_NUMBER.search(name))
    return value not in ("0", "1") and not (value.isdecimal() and not _SWITCH.search(name))


def _in_jaxlib(name: str) -> bool:
    """Whether a flag's name is one of the strings in jaxlib's library; takes milliseconds."""
    spec = importlib.util.find_spec("jaxlib")
    libraries = Path(spec.origin).parent.glob("libjax_common*") if spec and spec.origin else ()
    for library in libraries:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(f"\0{name}\0".encode()) >= 0:
                return True
    return False


def _refusal(changes: dict[str, str]) -> str:
    """Why JAX does not start in a process of its own, whose environment has these changes; "" if it does."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    # Without what would be said of other settings.
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_") or name in _ANY_TEXT}
    done = subprocess.run(command, env=own | changes, capture_output=True, encoding="utf-8", errors="replace")
    if not done.returncode:
        return ""
    reasons = _REASON.findall(done.stderr)
    last = done.stderr.strip().rpartition("\n")[2] or f"it ends with status {done.returncode}"
    return (reasons[0] if reasons else last).removeprefix("RuntimeError: ").strip()[:300]
