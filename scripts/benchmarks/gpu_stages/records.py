"""What `gpu.py` leaves in its folder: a JSON file per stage and a summary in Markdown, rewritten after every part."""

import contextlib
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_table import section

from s2dm_jax.common.files import write_atomic

SUMMARY = "summary.md"


class Records:
    """The records of all stages, written to the folder as they come, from any thread.

    Files that an earlier run left there are renamed, to STAGE.1.json and so on. A disk that becomes full ends no run:
    what cannot be written is printed, and written with the next record.
    """

    def __init__(self, folder: Path, stages: Mapping[str, Sequence[str]], run: Mapping[str, Any]):
        """`stages` has the names of each stage's parts, `run` what is known before the first of them.

        Raises:
          OSError: if nothing can be written into the folder.
        """
        parts = [_unfinished(folder, stage, name) for stage, names in stages.items() for name in names]
        for path in [folder / SUMMARY, *(folder / f"{stage}.json" for stage in stages), *parts]:
            if path.exists():
                path.rename(free_name(path))
        self._folder, self._stages, self._lock = folder, stages, threading.Lock()
        self.machine: dict[str, Any] = dict(run)
        self.parts: dict[str, dict[str, dict[str, Any]]] = {stage: {} for stage in stages}
        write_atomic(folder / SUMMARY, summary(self.machine, self.parts, stages))

    def add(self, stage: str, name: str, record: dict[str, Any]) -> None:
        """Adds a part's record, or the "machine", and writes both files."""
        with self._lock:
            if name == "machine":
                self.machine |= record
                return
            self.parts[stage][name] = record
            say(f"== {stage}.{name}: {_line(record)}\n")
            try:
                self._write(stage, name, record)
            except OSError as error:
                say(f"{self._folder} cannot be written ({error.strerror}); the record is {json.dumps(record)}\n")

    def _write(self, stage: str, name: str, record: dict[str, Any]) -> None:
        path = _unfinished(self._folder, stage, name)
        if "log" in record and path.exists():
            # Few files should be left, and the stage's has room.
            record["unfinished"] = path.read_text(encoding="utf-8", errors="replace")
            with contextlib.suppress(ValueError):
                record["unfinished"] = json.loads(record["unfinished"])
        # In the order of the stage, also where several ran at once.
        ordered = {name: self.parts[stage][name] for name in self._stages[stage] if name in self.parts[stage]}
        content = {"stage": stage, "machine": self.machine, "parts": ordered}
        write_atomic(self._folder / f"{stage}.json", json.dumps(content, indent=1) + "\n")
        if "unfinished" in record:
            path.unlink(missing_ok=True)
        write_atomic(self._folder / SUMMARY, summary(self.machine, self.parts, self._stages))

    def append_tables(self) -> None:
        """Adds the tables of `gpu_table.py` to the summary; a fault in them is printed."""
        stages = {stage: {"machine": self.machine, "parts": parts} for stage, parts in self.parts.items() if parts}
        if not stages or "device" not in self.machine:
            return
        try:
            text = summary(self.machine, self.parts, self._stages) + f"\n{section(stages, self.machine)}"
            write_atomic(self._folder / SUMMARY, text)
        except Exception:
            say(f"{self._folder / SUMMARY} is without tables:\n{traceback.format_exc()}")

    def failures(self) -> list[str]:
        """The parts that were wrong, failed or timed out, as "stage.part"."""
        bad = ("wrong", "failed", "timed out")
        return [f"{s}.{n}" for s, parts in self.parts.items() for n, r in parts.items() if r["status"] in bad]


def say(text: str) -> None:
    """Prints text that nobody need read: a pipe that is closed, as by `head`, ends no run."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # What is printed from now on goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        # A log on a full disk, or characters that it cannot have.
        pass


def _unfinished(folder: Path, stage: str, part: str) -> Path:
    """Where a part may leave what it has so far, in case its process ends."""
    return folder / f"{stage}_{part}.json"


def free_name(path: Path) -> Path:
    """STEM.1.SUFFIX, or the first number that no file has."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def summary(
    machine: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Mapping[str, Any]]],
    order: Mapping[str, Sequence[str]],
) -> str:
    """The Markdown of a run: a line for each part, and the last lines of those that did not end well."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"# {machine.get('devices', '?')} × {machine.get('device', 'unknown device')}, {machine.get('date', '')}",
        "",
        f"Commit {machine.get('commit') or 'unknown'}; {versions}; driver: {machine.get('driver') or 'none'}.",
    ]
    if machine.get("tiny"):
        lines += ["", "A rehearsal with small networks: none of these figures mean anything."]
    logs = []
    for stage, names in order.items():
        if not stages.get(stage):
            continue
        lines += ["", f"## {stage.capitalize()}", ""]
        for name in names:
            if record := stages[stage].get(name):
                lines.append(f"- {name}: {_line(record)}")
                if record.get("log"):
                    logs += ["", f"## The last lines of {stage}.{name}", "", "```text", *record["log"], "```"]
    return "\n".join([*lines, *logs]) + "\n"


def _line(record: Mapping[str, Any]) -> str:
    status, seconds = record["status"], f"{record['seconds']:.0f} s"
    if status == "done":
        return f"{record['summary']} ({seconds})"
    if status == "wrong":
        return f"**WRONG**: {record['summary']} ({seconds})"
    if "log" in record:
        return f"**{status}** after {seconds}"
    return f"{status}: {record['reason']}"
