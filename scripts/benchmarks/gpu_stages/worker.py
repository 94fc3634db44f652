"""The process that runs parts of a stage: `python -m gpu_stages.worker MODULE PARTS SETTINGS DESCRIPTOR`.

It writes a JSON line to the file descriptor when the devices are found, and when a part starts and ends. A part that
raises ends the process, because a device may be unusable after an error; `supervise` starts another for the rest.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import traceback
from typing import Any, TextIO

from gpu_stages.parts import Settings, Skip, read_settings
from s2dm_jax.common.errors import UserError

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "triton")


def main() -> None:
    module, names, settings, descriptor = sys.argv[1:]
    status = 0
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as records:
        try:
            _run(module, names.split(","), read_settings(settings), records)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        # The traceback is the last of the output: threads of a part that failed may print more at an orderly end, or
        # never let it come.
        os._exit(status)


def _run(module: str, names: list[str], settings: Settings, records: TextIO) -> None:
    def write(event: str, **values: Any) -> None:
        records.write(json.dumps({"event": event, **values}, default=_plain) + "\n")
        records.flush()

    if reason := _no_device(settings.device):
        write("no device", reason=reason)
        return
    write("machine", machine=describe_machine())
    parts = importlib.import_module(module).PARTS
    for name in names:
        write("start", part=name)
        try:
            result = parts[name].run(settings)
        except Skip as skip:
            write("skip", part=name, reason=str(skip))
        except UserError as error:
            write("refused", part=name, reason=str(error))
        else:
            if not isinstance(result, dict) or not isinstance(result.get("summary"), str):
                raise TypeError(f"part {name} returns no dict with a summary: {result!r:.500}")
            write("end", part=name, result=result)


def _no_device(wanted: str) -> str:
    """Why JAX does not use the device, or ""."""
    import jax

    try:
        found = jax.default_backend()
    # JAX raises many kinds, an AssertionError too.
    except Exception as error:
        return f"JAX {jax.__version__} finds no device ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    if found == wanted:
        return ""
    return f"JAX {jax.__version__} finds only {found} devices; install JAX for it, or see --help"


def _plain(value: Any) -> Any:
    """NumPy's and JAX's arrays and scalars as JSON has them; anything else as text, rather than lose a result."""
    try:
        return value.tolist()
    except Exception:
        return str(value)


def describe_machine() -> dict[str, Any]:
    """The devices, what drives them, and the versions of the packages, as plain data."""
    import jax

    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "driver": _driver(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    main()
