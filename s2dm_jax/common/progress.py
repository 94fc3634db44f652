"""Progress and remaining time of long work: a bar on a terminal, a line every ten seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Job = TypeVar("Job")


class ProgressDisplay:
    """A bar if the stream is a terminal, else lines; the only place that decides between the two.

    Args:
      total: units of work, `done` included; None if unknown, in which case so is the time left.
      done: units done before.
      shown: False to write nothing.
      **bar_options: of `tqdm.tqdm`.
    """

    def __init__(self, stream: TextIO, total: int | None, done: int = 0, *, shown: bool = True, **bar_options: Any):
        self._stream, self._total, self._start = stream, total, done
        self._began = self._last_line = time.monotonic()
        self._has_bar = shown and stream.isatty()
        self._has_lines = shown and not stream.isatty()
        self._bar = tqdm(
            total=total, initial=done, file=stream, disable=not self._has_bar, dynamic_ncols=True, **bar_options
        )

    def update(self, done: int, line: str, *, postfix: str = "", due: bool = False) -> None:
        """Shows a bar with `postfix`, or `line` and the time left: every ten seconds before the end, and when `due`."""
        if self._has_bar:
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(done - self._bar.n)
        now = time.monotonic()
        waited = now - self._last_line >= SECONDS_BETWEEN_LINES and done != self._total
        if self._has_lines and (due or waited):
            self._last_line = now
            left = "" if self._total is None else f"  {tqdm.format_interval(self.seconds_left(done))} left"
            print(f"{line}{left}", file=self._stream, flush=True)

    def seconds_left(self, done: int) -> float:
        """Seconds that the rest will take at the mean speed so far."""
        assert self._total is not None
        seconds = time.monotonic() - self._began
        return seconds / max(done - self._start, 1) * (self._total - done)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


@contextlib.contextmanager
def progress_bar(
    total: int | None, unit: str, *, done: int = 0, shown: bool = True, delay: float = 0.0
) -> Iterator[Callable[[int], object]]:
    """A `ProgressDisplay` on stderr for a block; yields a function of the number of units done since its last call.

    Args:
      unit: what is counted, in the plural.
      delay: seconds without a bar at first, for work that is usually quick.
    """
    count = done
    of_total = "" if total is None else f"/{total:,}"

    def advance(more: int) -> None:
        nonlocal count
        count += more
        display.update(count, f"{count:,}{of_total} {unit}")

    display = ProgressDisplay(sys.stderr, total, done, shown=shown, unit=f" {unit}", leave=False, delay=delay)
    with contextlib.closing(display):
        yield advance


def iterate_with_eta(jobs: Sequence[Job], costs: Sequence[float]) -> Iterator[Job]:
    """Yields the jobs; before each prints its number and the time left, unless its cost is 0 (already done)."""
    began, count, spent = time.monotonic(), 0, 0.0
    for job, cost in zip(jobs, costs, strict=True):
        if cost:
            count += 1
            left = ""
            if spent:
                seconds = (time.monotonic() - began) / spent * (sum(costs) - spent)
                left = f", about {tqdm.format_interval(seconds)} left"
            print(f"{count} of {sum(map(bool, costs))}{left}", flush=True)
            spent += cost
        yield job
