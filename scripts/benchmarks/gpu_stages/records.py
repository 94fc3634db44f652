"""What `gpu.py` leaves in its folder: a JSON file per stage and a summary in Markdown, rewritten after every part."""

import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_table import section

from s2dm_jax.common.files import write_atomic

SUMMARY = "summary.md"


class Records:
    """The records of all stages, written to the folder as they come, from any thread.

    Files that an earlier run left there are renamed, to STAGE.1.json and so on.
    """

    def __init__(self, folder: Path, stages: Mapping[str, Sequence[str]], run: Mapping[str, Any]):
        """`stages` has the names of each stage's parts, `run` what is known before the first of them."""
        for path in [folder / SUMMARY, *(folder / f"{stage}.json" for stage in stages)]:
            if path.exists():
                path.rename(_free_name(path))
        self._folder, self._stages, self._lock = folder, stages, threading.Lock()
        self.machine: dict[str, Any] = dict(run)
        self.parts: dict[str, dict[str, dict[str, Any]]] = {stage: {} for stage in stages}

    def add(self, stage: str, name: str, record: dict[str, Any]) -> None:
        """Adds a part's record, or the "machine", and writes both files."""
        with self._lock:
            if name == "machine":
                self.machine |= record
                return
            self.parts[stage][name] = record
            # In the order of the stage, also where several ran at once.
            ordered = {name: self.parts[stage][name] for name in self._stages[stage] if name in self.parts[stage]}
            content = {"stage": stage, "machine": self.machine, "parts": ordered}
            write_atomic(self._folder / f"{stage}.json", json.dumps(content, indent=1) + "\n")
            write_atomic(self._folder / SUMMARY, summary(self.machine, self.parts, self._stages))
            print(f"== {stage}.{name}: {_line(record)}", flush=True)

    def append_tables(self) -> None:
        """Adds the tables of `gpu_table.py` to the summary."""
        stages = {stage: {"machine": self.machine, "parts": parts} for stage, parts in self.parts.items() if parts}
        text = summary(self.machine, self.parts, self._stages)
        if stages and "device" in self.machine:
            text += f"\n{section(stages, self.machine)}"
        write_atomic(self._folder / SUMMARY, text)

    def failures(self) -> list[str]:
        """The parts that were wrong, failed or timed out, as "stage.part"."""
        bad = ("wrong", "failed", "timed out")
        return [f"{s}.{n}" for s, parts in self.parts.items() for n, r in parts.items() if r["status"] in bad]


def _free_name(path: Path) -> Path:
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
