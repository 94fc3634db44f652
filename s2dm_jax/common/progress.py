"""Progress and time left of long work: a bar on a terminal, elsewhere a line every ten seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Job = TypeVar("Job")


class ProgressDisplay:
    """Work done and time left: a bar where the stream is a terminal, elsewhere at most a line every ten
    seconds.

    The one place that decides between the two.
    """

    def __init__(self, stream: TextIO, total: int | None, done: int = 0, *, shown: bool = True, **bar_options: Any):
        """Starts the clock.

        Args:
          stream: that bar or lines are written to.
          total: units of work, those done before included; None where unknown, and then the time left is,
            too.
          done: units done before.
          shown: False to write nothing.
          **bar_options: of `tqdm.tqdm`.
        """
        self._stream, self._total, self._start = stream, total, done
        self._began = self._last_line = time.monotonic()
        self._has_bar = shown and stream.isatty()
        self._has_lines = shown and not stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            file=stream,
            disable=not self._has_bar,
            dynamic_ncols=True,
            **bar_options,
        )

    def update(self, done: int, line: str, *, postfix: str = "", due: bool = False) -> None:
        """Shows that `done` units are done.

        Args:
          line: what a line says, to which the time left is added.
          postfix: what the bar says besides.
          due: True for a line now; otherwise there is one every ten seconds, and none at the end.
        """
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
    """Shows on stderr, until the end of the block, how much is done and how long the rest will take.

    Args:
      total: units in all; None where unknown.
      unit: what is counted, in the plural.
      done: units done before.
      shown: False to show nothing.
      delay: seconds without a bar at first, for work that is usually quick.

    Yields:
      A function to call with the number of units done since the last call.
    """
    count = done

    def advance(more: int) -> None:
        nonlocal count
        count += more
        of_total = "" if total is None else f"/{total:,}"
        display.update(count, f"{count:,}{of_total} {unit}")

    display = ProgressDisplay(sys.stderr, total, done, shown=shown, unit=f" {unit}", leave=False, delay=delay)
    with contextlib.closing(display):
        yield advance


def iterate_with_eta(jobs: Sequence[Job], costs: Sequence[float]) -> Iterator[Job]:
    """Yields the jobs; before each with a cost prints its number and an estimate of the time left.

    Args:
      jobs: in the order in which they are done.
      costs: of each, in any unit; 0 for those done before.
    """
    began, count, spent = time.monotonic(), 0, 0.0
    for job, cost in zip(jobs, costs, strict=True):
        if cost:
            seconds = time.monotonic() - began
            left = tqdm.format_interval(seconds / spent * (sum(costs) - spent)) if spent else ""
            count, spent = count + 1, spent + cost
            of = f"{count} of {sum(map(bool, costs))}"
            print(f"{of}, about {left} left" if left else of, flush=True)
        yield job
