"""A profiler trace reduced to figures: the costliest kernels, the time by class, the idle gaps.

All but `record` and `read_events` works on plain events, so that tests need no device.
"""

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kernel_costs import Kernel

OUTSIDE = "not in the program"
_LONGEST_NAME = 100


class Event(NamedTuple):
    """Something that ran on the device.

    Attributes:
      name: of the kernel.
      start_ns, end_ns: on the device's clock.
      hlo_op: the instruction of the program, or "".
    """

    name: str
    start_ns: float
    end_ns: float
    hlo_op: str


class Window(NamedTuple):
    """The events of some steps.

    Attributes:
      events: in the order of their starts.
      starts: of the steps, and the end of the last one; empty where steps cannot be distinguished.
      steps: how many.
    """

    events: list[Event]
    starts: list[float]
    steps: int


def record(run: Callable[[], Any], folder: Path) -> list[Event]:
    """The events of `run`; the trace itself, which may be large, is deleted."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        return [event for path in sorted(folder.rglob("*.xplane.pb")) for event in read_events(path)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_events(path: Path) -> list[Event]:
    """What ran on the GPU's streams; where there is none, what ran of a program on the CPU."""
    from jax.profiler import ProfileData

    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    lines = [line for plane in devices or planes for line in plane.lines]
    # Lines that a profiler derives from the streams' would count everything twice.
    streams = [line for line in lines if line.name.startswith("Stream")] if devices else []
    events = []
    for line in streams or lines:
        for event in line.events:
            stats = {name: value for name, value in event.stats if name == "hlo_op"}
            if devices or stats:
                end = event.start_ns + event.duration_ns
                events.append(Event(event.name, event.start_ns, end, str(stats.get("hlo_op", ""))))
    return events


def resolved(events: Iterable[Event], kernels: Mapping[str, Kernel]) -> list[Event]:
    """Events of a command buffer with the instruction that their kernel was made for, where it is named after one.

    A command buffer stands for many kernels. XLA names those that it generates itself after their instruction, with an
    underscore for each sign that is not allowed in a kernel's name; a library's, such as cuBLAS's, stay as they are.
    """
    made_for = {re.sub(r"\W", "_", name): name for name in kernels}
    return [
        event if event.hlo_op in kernels else event._replace(hlo_op=made_for.get(event.name, event.hlo_op))
        for event in events
    ]


def known_share(window: Window, kernels: Mapping[str, Kernel]) -> float:
    """Share of the device time whose instruction is in the program."""
    events = window.events
    total = sum(e.end_ns - e.start_ns for e in events)
    return sum(e.end_ns - e.start_ns for e in events if e.hlo_op in kernels) / total if total else 0.0


def cut(events: Iterable[Event], chunk: int, most: int) -> Window:
    """The events of the middle steps, at most `most`, of a chunk of steps.

    A step begins with the first instruction, or kernel, that runs just once in each of them.
    """
    events = sorted(events, key=lambda e: e.start_ns)
    counts = Counter(e.hlo_op or e.name for e in events)
    first = next((e.hlo_op or e.name for e in events if counts[e.hlo_op or e.name] == chunk), None)
    if first is None or chunk < 2:
        return Window(events, [], chunk)
    starts = [e.start_ns for e in events if (e.hlo_op or e.name) == first]
    # Of the last step the end is not marked.
    steps = min(most, chunk - 1)
    begin = (chunk - steps) // 2
    starts = starts[begin : begin + steps + 1]
    return Window([e for e in events if starts[0] <= e.start_ns < starts[-1]], starts, steps)


def costliest(window: Window, kernels: Mapping[str, Kernel], count: int = 20) -> list[dict[str, Any]]:
    """The instructions, or kernels without one, that take most time.

    Bytes, FLOPs and what is achieved are of the program's costs (`kernel_costs.py`); `calls` are kernels in a step: a
    library's call may start several.
    """
    nanoseconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    names: dict[str, str] = {}
    for event in window.events:
        key = event.hlo_op or event.name
        nanoseconds[key] += event.end_ns - event.start_ns
        calls[key] += 1
        names.setdefault(key, event.name)
    total = sum(nanoseconds.values())
    rows = []
    for key in sorted(nanoseconds, key=lambda k: -nanoseconds[k])[:count]:
        row = {
            "op": key[:_LONGEST_NAME],
            "kernel": names[key][:_LONGEST_NAME],
            "class": kernels[key].kind if key in kernels else OUTSIDE,
            "share": nanoseconds[key] / total,
            "ms_per_step": nanoseconds[key] / window.steps / 1e6,
            "calls_per_step": calls[key] / window.steps,
        }
        rows.append({**row, **_achieved(kernels.get(key), nanoseconds[key] / window.steps / 1e9)})
    return rows


def _achieved(kernel: Kernel | None, seconds: float) -> dict[str, Any]:
    """Bytes and FLOPs of a step, and what was achieved."""
    if kernel is None:
        return {"bytes": None, "flops": None, "tb_per_s": None, "tflops": None}
    moved, flops = kernel.times * kernel.bytes, kernel.times * kernel.flops
    seconds = max(seconds, 1e-12)
    return {"bytes": moved, "flops": flops, "tb_per_s": moved / seconds / 1e12, "tflops": flops / seconds / 1e12}


def classes(window: Window, kernels: Mapping[str, Kernel]) -> dict[str, dict[str, float]]:
    """Measured milliseconds, share and kernels of a step by class, the costliest first."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in window.events:
        of_class = sums[kernels[event.hlo_op].kind if event.hlo_op in kernels else OUTSIDE]
        of_class[0] += event.end_ns - event.start_ns
        of_class[1] += 1
    total = sum(nanoseconds for nanoseconds, _ in sums.values())
    return {
        kind: {"ms": ns / window.steps / 1e6, "share": ns / total if total else 0.0, "kernels": count / window.steps}
        for kind, (ns, count) in sorted(sums.items(), key=lambda item: -item[1][0])
    }


def gaps(window: Window, count: int = 10) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The largest gaps in which no stream had work, and how busy the device was.

    Returns:
      Gaps {"us", "at_ms" in its step (in the trace, where steps cannot be distinguished), "before", "after"}; and
      {"span_ms", "busy_ms", "busy_share", "gaps"}, the first two and the number of gaps of a step.
    """
    found = []
    # The latest end so far: a gap begins where nothing that started earlier still runs.
    last = window.events[0]
    for event in window.events[1:]:
        if event.start_ns > last.end_ns:
            found.append((event.start_ns - last.end_ns, last, event))
        if event.end_ns > last.end_ns:
            last = event
    begin, end = window.events[0].start_ns, window.starts[-1] if window.starts else last.end_ns
    idle = sum(gap for gap, _, _ in found) + max(0.0, end - last.end_ns)
    rows = [
        {
            "us": gap / 1e3,
            "at_ms": (before.end_ns - max((s for s in window.starts if s <= before.end_ns), default=begin)) / 1e6,
            "before": (before.hlo_op or before.name)[:_LONGEST_NAME],
            "after": (after.hlo_op or after.name)[:_LONGEST_NAME],
        }
        for gap, before, after in sorted(found, key=lambda g: -g[0])[:count]
    ]
    span = max(end - begin, 1.0)
    per_step = 1e6 * window.steps
    busy = {"span_ms": span / per_step, "busy_ms": (span - idle) / per_step, "busy_share": 1 - idle / span}
    return rows, {**busy, "gaps": len(found) / window.steps}
