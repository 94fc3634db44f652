"""Progress and time left of long work: a bar on a terminal, elsewhere a line every ten seconds."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

Job = TypeVar("Job")


@contextlib.contextmanager
def progress_bar(
    total: int | None, unit: str, *, done: int = 0, shown: bool = True, delay: float = 0.0
) -> Iterator[Callable[[int], object]]:
    """Tells on stderr, until the end of the block, how much is done and how long the rest will take.

    Args:
      total: units in all; None where it is not known, nor then the time left.
      unit: what is counted, in the plural.
      done: units done before.
      shown: False for telling nothing.
      delay: seconds without a bar at first, for work that is quick as a rule.

    Yields:
      A function to call with the number of units that are done since the last call.
    """
    if not shown or sys.stderr.isatty():
        with tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            dynamic_ncols=True,
            leave=False,
            disable=not shown,
            delay=delay,
        ) as bar:
            yield bar.update
        return
    began = told = time.monotonic()
    count = done

    def advance(more: int) -> None:
        nonlocal told, count
        count += more
        now = time.monotonic()
        if now - told < SECONDS_BETWEEN_LINES or count == total:
            return
        told = now
        line = f"{count:,} {unit}"
        if total is not None:
            left = _time_left(now - began, count - done, total - count)
            line = f"{count:,}/{total:,} {unit}  {left} left"
        print(line, file=sys.stderr, flush=True)

    yield advance


def iterate_with_eta(jobs: Sequence[Job], costs: Sequence[float]) -> Iterator[Job]:
    """The jobs; before each that costs something, prints which of those it is and how long the rest may take.

    Args:
      jobs: in the order in which they are done.
      costs: of each, in any unit; 0 for what was done before.
    """
    began, count, spent = time.monotonic(), 0, 0.0
    for job, cost in zip(jobs, costs, strict=True):
        if cost:
            left = _time_left(time.monotonic() - began, spent, sum(costs) - spent) if spent else ""
            count, spent = count + 1, spent + cost
            of = f"{count} of {sum(map(bool, costs))}"
            print(f"{of}, about {left} left" if left else of, flush=True)
        yield job


def _time_left(seconds: float, done: float, left: float) -> str:
    return tqdm.format_interval(seconds / done * left)
