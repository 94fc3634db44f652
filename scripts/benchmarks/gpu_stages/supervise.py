"""Runs the parts of a stage in worker processes: time boxes, failures, the last lines of their output."""

import collections
import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from gpu_stages.parts import Part, Settings, write_settings
from s2dm_jax.common.errors import UserError

_BENCHMARKS = Path(__file__).resolve().parents[1]
_TAIL_LINES = 40
# A process has as long to import JAX and to find the devices, and as long to end by itself.
_STARTUP_SECONDS, _EXIT_SECONDS = 60.0, 5.0
# An interruption of `gpu.py` is noticed within this time.
_POLL_SECONDS = 0.5


class Job(NamedTuple):
    """The parts of a stage that are to be run.

    Attributes:
      module: the one that has the parts, in its table PARTS.
      parts: by name.
      settings: what every part gets.
      report: called with the name of a part and its record as soon as it has ended. The record is {"status", "seconds",
        and "summary" and "result", or "reason", or "log"}; the status is "done", "wrong" (a check whose "passed" is
        false), "skipped", "failed", "timed out" or "not run". The name "machine" comes with the machine's description.
      time_scale: a factor on the parts' time boxes.
      stopping: set by an interruption.
    """

    module: str
    parts: Mapping[str, Part]
    settings: Settings
    report: Callable[[str, dict[str, Any]], None]
    time_scale: float
    stopping: threading.Event


class _Worker(NamedTuple):
    process: subprocess.Popen
    records: queue.Queue
    tail: collections.deque
    reader: threading.Thread


def run_job(job: Job, processes: int = 1) -> None:
    """Runs the parts, with `processes` above 1 as many at once, each in a process of its own.

    Raises:
      UserError: if JAX does not find the device.
    """
    if processes > 1:
        groups = [[name] for name in job.parts]
    else:
        same_environment = itertools.groupby(job.parts, lambda name: dict(job.parts[name].environment))
        groups = [list(names) for _, names in same_environment]

    def run_group(names: list[str]) -> None:
        while names and not job.stopping.is_set():
            names = _run_process(job, names)

    with ThreadPoolExecutor(processes) as pool:
        try:
            for _ in pool.map(run_group, groups):
                pass
        except BaseException:
            job.stopping.set()
            raise


def _run_process(job: Job, names: list[str]) -> list[str]:
    """Runs parts in one process until one does not end well, and returns the names of those that are left."""
    if time.time() >= job.settings.deadline:
        for name in names:
            job.report(name, {"status": "not run", "seconds": 0.0, "reason": "no time was left"})
        return []
    worker, left = _start(job, names), list(names)
    try:
        status, seconds = _follow(job, worker, left)
    finally:
        _stop(worker)
    if left and status:
        job.report(left.pop(0), {"status": status, "seconds": seconds, "log": list(worker.tail)})
    return left


def _follow(job: Job, worker: _Worker, left: list[str]) -> tuple[str, float]:
    """Reports the parts that end, and takes them off `left`, until the process ends or is too late.

    Returns how the first of those that are left ended, "" if it did not, and its seconds.
    """
    began, limit = time.time(), time.time() + _STARTUP_SECONDS
    while not job.stopping.is_set():
        try:
            record = worker.records.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if time.time() > min(limit, job.settings.deadline):
                return "timed out", time.time() - began
            continue
        if record is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Its traceback may still be on its way.
                worker.process.wait(_EXIT_SECONDS)
            return "failed" if left else "", time.time() - began
        event = record["event"]
        if event == "no device":
            raise UserError(f"--device={job.settings.device}: {record['reason']}; install JAX for it, or see --help")
        if event == "machine":
            job.report("machine", record["machine"])
        elif event == "start":
            began = time.time()
            limit = began + job.time_scale * job.parts[record["part"]].seconds
        else:
            job.report(left.pop(0), _record(record, time.time() - began))
            began, limit = time.time(), time.time() + _STARTUP_SECONDS
    return "", 0.0


def _record(event: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    if event["event"] == "skip":
        return {"status": "skipped", "seconds": seconds, "reason": event["reason"]}
    result = event["result"]
    status = "done" if result.get("passed", True) else "wrong"
    return {"status": status, "seconds": seconds, "summary": result["summary"], "result": result}


def _start(job: Job, names: Sequence[str]) -> _Worker:
    reading, writing = os.pipe()
    arguments = [job.module, ",".join(names), write_settings(job.settings), str(writing)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_stages.worker", *arguments],
        env=_environment(job.settings, job.parts[names[0]].environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[writing],
        # A group of its own, so that its children, such as PyTorch's workers, end with it.
        start_new_session=True,
    )
    os.close(writing)
    records: queue.Queue = queue.Queue()
    tail: collections.deque = collections.deque(maxlen=_TAIL_LINES)
    threading.Thread(target=_read_records, args=(os.fdopen(reading, encoding="utf-8"), records), daemon=True).start()
    reader = threading.Thread(target=_echo, args=(process.stdout, tail), daemon=True)
    reader.start()
    return _Worker(process, records, tail, reader)


def _environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    path = [str(_BENCHMARKS), str(_BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        # PyTorch's workers use the same device.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(settings.scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "S2DM_JAX_DATA": str(settings.scratch / "data"),
    }
    flags = [os.environ.get("XLA_FLAGS", ""), environment.get("XLA_FLAGS", "")]
    if settings.device == "cpu":
        own["JAX_PLATFORMS"] = "cpu"
    if settings.tiny:
        flags.append("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    return {**os.environ, **own, **environment, "XLA_FLAGS": " ".join(filter(None, flags))}


def _read_records(stream: TextIO, records: queue.Queue) -> None:
    with stream:
        for line in stream:
            # A process that is killed can leave half a line.
            with contextlib.suppress(json.JSONDecodeError):
                records.put(json.loads(line))
    records.put(None)


def _echo(stream: TextIO, tail: collections.deque) -> None:
    for line in stream:
        tail.append(line.rstrip("\n"))
        print(line, end="", flush=True)


def _stop(worker: _Worker) -> None:
    """Ends the process and its children, and waits for the last of its output."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(worker.process.pid, number)
            worker.process.wait(_EXIT_SECONDS)
    worker.process.wait()
    worker.reader.join(_EXIT_SECONDS)
