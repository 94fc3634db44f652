"""What `gpu.py` and its stages share: the settings that a part gets, and the record that it leaves."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """What every part of a stage gets.

    Attributes:
      device: "gpu" or "cpu".
      tiny: whether to rehearse with small networks and few steps, whose figures mean nothing.
      out: the folder of the results; a part may leave further files there.
      scratch: a folder for runs, traces and the compilation cache, deleted when all stages are done.
      resume: the folder of an earlier run's results, `out` itself unless the user names another.
      images: archive or folder of the CIFAR-10 training images, or None.
      deadline: `time.time()` at which the stage ends.
    """

    device: str
    tiny: bool
    out: Path
    scratch: Path
    resume: Path
    images: Path | None
    deadline: float


def write_settings(settings: Settings) -> str:
    """The settings as JSON."""
    return json.dumps(settings._asdict(), default=str)


def read_settings(text: str) -> Settings:
    """The settings that `write_settings` wrote."""
    values = json.loads(text)
    for name in ("out", "scratch", "resume", "images"):
        values[name] = values[name] and Path(values[name])
    return Settings(**values)


# Trying which kernels are fastest takes most of a compilation on a GPU, and a stage may compile a dozen programs at
# once. Programs that are timed are tuned.
UNTUNED = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}


class Part(NamedTuple):
    """One measurement or check of a stage.

    Attributes:
      run: a function of the settings. It returns plain data for the stage's JSON, with "summary", a line of Markdown,
        and, of a check, "passed". It imports jax when called. An exception is a failure; `Skip` gives the reason why
        there is nothing to do.
      seconds: its time box.
      environment: variables of its process. Consecutive parts with the same ones share a process.
    """

    run: Callable[[Settings], dict[str, Any]]
    seconds: float
    environment: Mapping[str, str] = {}


class Skip(Exception):
    """A part that does not apply here: no PyTorch, no images; the message is the reason."""


def result_of(folder: Path, stage: str, part: str) -> dict[str, Any] | None:
    """What a part of an earlier stage found, from the stage's JSON in `folder`; None if it is not there.

    The file is {"stage", "machine", "parts": {PART: {"status", "seconds", "summary", "result"}}}.
    """
    try:
        parts = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))["parts"]
        return parts[part].get("result") if part in parts else None
    # Also a file that somebody else wrote.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
