"""The processes that do train steps for a timing, `train.py` and `torch_worker.py`, and what they are started with."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

SCRIPTS = Path(__file__).resolve().parent
# What only improved-diffusion's UNet has.
_IMPROVED = ("num_heads", "scale_shift_norm", "t_offset")


class WorkerFailed(Exception):
    """A worker that ended or did not answer in time; it runs no more.

    Attributes:
      worker: which.
    """

    def __init__(self, worker: "Worker", reason: str):
        super().__init__(reason)
        self.worker = worker


class Worker:
    """A process that reports when it is ready and then runs as many steps as requested.

    Attributes:
      peak_bytes: the most memory of the device that its last steps used; None where it is unknown.
    """

    def __init__(
        self,
        python: str,
        script: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        errors: IO[str] | None = None,
    ):
        """Starts `script` of this folder with the settings; `errors` is a file for its stderr, else it has ours."""
        own = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(environment or {})}
        # Another interpreter does not import our packages.
        ours = [os.environ["PYTHONPATH"]] if python == sys.executable and os.environ.get("PYTHONPATH") else []
        own["PYTHONPATH"] = os.pathsep.join([str(SCRIPTS.parents[1]), *ours])
        if settings["device"] == "cpu":
            own["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            [python, str(SCRIPTS / script), json.dumps(settings)],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            errors="replace",
        )
        self._errors = errors
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._report: dict[str, Any] | None = None
        self.peak_bytes: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def ready(self, timeout: float | None = None) -> dict[str, Any]:
        """What the worker reports of itself, once it can run steps."""
        if self._report is None:
            self._report = self._answer(timeout)
        return self._report

    @property
    def is_preparing(self) -> bool:
        """Whether `ready` would wait."""
        return self._report is None and self._lines.empty()

    def run(self, steps: int, timeout: float | None = None) -> float:
        """Runs steps and returns the seconds that they took."""
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except OSError:  # It has ended; the answer says why.
            pass
        answer = self._answer(timeout)
        self.peak_bytes = answer.get("peak_bytes")
        return answer["seconds"]

    def stop(self) -> None:
        """Ends the process: on its own after the steps that it is doing, after ten seconds by force."""
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self):
        for line in self._process.stdout:
            # Libraries may print other lines.
            if line.startswith("{"):
                with contextlib.suppress(ValueError):
                    self._lines.put(json.loads(line))
        self._lines.put(None)

    def _answer(self, timeout):
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._process.kill()
            raise WorkerFailed(self, f"no answer within {timeout:.0f} s") from None
        if line is None:
            self._lines.put(None)  # So that the next question fails as well.
            self._process.wait()
            raise WorkerFailed(self, self._last_error() or f"it ended with status {self._process.returncode}")
        return line

    def _last_error(self):
        if self._errors is None:
            return ""
        lines = Path(self._errors.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def torch_settings(config: Any, device: str, *, channels_last: bool, compile: bool) -> dict[str, Any]:
    """Settings of `torch_worker.py` for the train step of a checked config."""
    from s2dm_jax.config.build import network_of
    from s2dm_jax.config.defaults import image_shape

    resolution, channels = image_shape(config)
    network = network_of(config, "float32")
    model, loss, train = config.model, config.loss, config.train
    return {
        "device": device,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "channels_last": channels_last,
        "compile": compile,
        "dtype": ("float32" if device == "cpu" else "bfloat16") if model.dtype == "auto" else model.dtype,
        "resolution": resolution,
        "channels": channels,
        **{name: model[name] for name in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout")},
        "network": model.name,
        **{name: getattr(network, name) for name in _IMPROVED if hasattr(network, name)},
        "K": loss.K,
        "lam": loss.lam,
        "skip": loss.skip,
        "tau": loss.tau,
        "batch": train.batch_size,
        "lr": train.lr,
        "grad_clip": train.grad_clip,
        "ema_decay": train.ema_decay,
        "random_flip": config.data.random_flip,
    }
