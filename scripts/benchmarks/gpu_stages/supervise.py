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
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from gpu_stages.parts import Part, Settings, write_settings
from gpu_stages.records import say
from s2dm_jax.common.errors import UserError

_BENCHMARKS = Path(__file__).resolve().parents[1]
_TAIL_LINES, _LONGEST_LINE = 40, 2000
# What is shown of a process's output: a log of the whole run should stay below 16 MiB.
_SHOWN_CHARACTERS = 200_000
# A process has as long to import JAX and to find the devices, and as long to end by itself.
_STARTUP_SECONDS, _EXIT_SECONDS = 60.0, 5.0
# A process that does not find the device is started again: one of several that start at once may fail by chance.
_STARTS = 2
# An interruption of `gpu.py` is noticed within this time.
_POLL_SECONDS = 0.5
# The children of a process that is killed are waited for: not longer, since nobody may collect them in a container.
_CHILDREN_SECONDS = 2.0


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
      found: set once a process of any stage has found the device.
    """

    module: str
    parts: Mapping[str, Part]
    settings: Settings
    report: Callable[[str, dict[str, Any]], None]
    time_scale: float
    stopping: threading.Event
    found: threading.Event


class _NoDevice(Exception):
    """A process did not find the device; the message is the reason."""


class _Worker(NamedTuple):
    process: subprocess.Popen
    records: queue.Queue
    tail: collections.deque
    reader: threading.Thread


def run_job(job: Job, processes: int = 1) -> None:
    """Runs the parts, with `processes` above 1 as many at once, each in a process of its own.

    Raises:
      UserError: if none of the processes finds the device.
    """
    if processes > 1:
        groups = [[name] for name in job.parts]
    else:
        same_environment = itertools.groupby(job.parts, lambda name: dict(job.parts[name].environment))
        groups = [list(names) for _, names in same_environment]
    # Groups that are run at once, and the reasons of those that did not find the device.
    running, lost = min(processes, len(groups)), []

    def give_up(name: str, reason: str) -> None:
        lost.append(reason)
        while not job.found.wait(_POLL_SECONDS) and time.time() < job.settings.deadline:
            if len(lost) >= running:
                # No other thread starts with a further group.
                job.stopping.set()
                raise UserError(f"--device={job.settings.device}: {reason}")
            if job.stopping.is_set():
                return
        job.report(name, {"status": "failed", "seconds": 0.0, "log": [reason]})

    def run_group(names: list[str]) -> None:
        starts = 0
        while names and not job.stopping.is_set():
            try:
                names, starts = _run_process(job, names), 0
            except _NoDevice as error:
                starts += 1
                if starts == _STARTS:
                    give_up(names[0], str(error))
                    names, starts = names[1:], 0
            except Exception:
                # No fault of this program may cost the parts that follow.
                log = traceback.format_exc().splitlines()[-_TAIL_LINES:]
                for name in names[:1]:
                    job.report(name, {"status": "failed", "seconds": 0.0, "log": log})
                names, starts = names[1:], 0

    with ThreadPoolExecutor(processes) as pool:
        try:
            for _ in pool.map(run_group, groups):
                pass
        except BaseException:
            job.stopping.set()
            raise


def _run_process(job: Job, names: list[str]) -> list[str]:
    """Runs parts in one process until one does not end well, and returns the names of those that are left.

    Those that are reported are taken off `names` at once: they are not run again, whatever happens.
    """
    if time.time() >= job.settings.deadline:
        for name in names:
            job.report(name, {"status": "not run", "seconds": 0.0, "reason": "no time was left"})
        return []
    worker = _start(job, names)
    try:
        status, seconds = _follow(job, worker, names)
    finally:
        _stop(worker)
    if names and status:
        job.report(names[0], {"status": status, "seconds": seconds, "log": list(worker.tail)})
        del names[0]
    return names


def _follow(job: Job, worker: _Worker, left: list[str]) -> tuple[str, float]:
    """Reports the parts that end, and takes them off `left`, until none is left or the process ends or is too late.

    Returns how the first of those that are left ended, "" if it did not, and its seconds.

    Raises:
      _NoDevice: if the process ends or is too late before it has found the device.
    """
    began, limit, found = time.time(), time.time() + _STARTUP_SECONDS, False
    while left and not job.stopping.is_set():
        record = _next_record(worker)
        if record is _NONE_YET:
            if time.time() <= min(limit, job.settings.deadline):
                continue
            if not found and time.time() > limit:
                raise _NoDevice(f"JAX has not found a device after {_STARTUP_SECONDS:.0f} s")
            return "timed out", time.time() - began
        if record is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Its traceback may still be on its way.
                worker.process.wait(_EXIT_SECONDS)
            if not found:
                worker.reader.join(_EXIT_SECONDS)
                last = worker.tail[-1] if worker.tail else f"status {worker.process.returncode}"
                raise _NoDevice(f"the process that looks for it ends with: {last}")
            return "failed", time.time() - began
        event = record["event"]
        if event == "no device":
            raise _NoDevice(record["reason"])
        if event == "machine":
            found = True
            job.found.set()
            job.report("machine", record["machine"])
        elif event == "start":
            began = time.time()
            limit = began + job.time_scale * job.parts[record["part"]].seconds
        else:
            job.report(left[0], _record(record, time.time() - began))
            del left[0]
            began, limit = time.time(), time.time() + _STARTUP_SECONDS
    # One that has nothing left to do is not waited for: threads of XLA that still compile can hold it.
    return "", 0.0


_NONE_YET: dict[str, Any] = {}


def _next_record(worker: _Worker) -> dict[str, Any] | None:
    """What the process has written, `_NONE_YET`, or None if it has ended, also where a child keeps its pipe open."""
    ended = worker.process.poll() is not None
    try:
        return worker.records.get(timeout=_POLL_SECONDS)
    except queue.Empty:
        return None if ended else _NONE_YET


def _record(event: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    if event["event"] == "skip":
        return {"status": "skipped", "seconds": seconds, "reason": event["reason"]}
    if event["event"] == "refused":
        return {"status": "failed", "seconds": seconds, "log": [event["reason"]]}
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
        encoding="utf-8",
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
    shown = 0
    # A longer line comes in pieces; what comes after the last line is read when the process ends.
    while line := stream.readline(_LONGEST_LINE):
        tail.append(line.rstrip("\n"))
        if shown <= _SHOWN_CHARACTERS:
            shown += len(line)
            say(line if shown <= _SHOWN_CHARACTERS else "… what else this process prints is not shown\n")


def _stop(worker: _Worker) -> None:
    """Ends the process and its children, and waits for the last of its output."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(worker.process.pid, number)
            worker.process.wait(_EXIT_SECONDS)
    worker.process.wait()
    # Children that are killed take a moment to return the device's memory, which the next process may need.
    until = time.monotonic() + _CHILDREN_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(worker.process.pid, 0)
            time.sleep(0.02)
    worker.reader.join(_EXIT_SECONDS)
