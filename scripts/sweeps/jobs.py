"""Runs the jobs of a sweep one after another; several processes share them, each job in one of them."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from run_once import RunFailed, run_commands, why_unmeasured

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import read_json, write_atomic
from s2dm_jax.common.locks import acquire
from s2dm_jax.common.progress import iterate_with_eta

_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")


class Job(NamedTuple):
    """Commands of `s2dm_jax.main` that train and evaluate a run.

    Attributes:
      name: unique; of its log and of the record of its failure.
      lock: name of what one process at a time may use: jobs of one folder, or that need one another, share it.
      workdir: folder of the run.
      result_path: where its results are stored.
      commands: run one after another; each resumes what is there.
    """

    name: str
    lock: str
    workdir: Path
    result_path: Path
    commands: list[list[str]]


class Outcome(NamedTuple):
    """The outcome of jobs: results, reasons of failures, and the jobs left to another process or another call."""

    results: dict[str, dict]
    failures: dict[str, str]
    left: list[str]


class Task(NamedTuple):
    """The share of the jobs of a process: `number`, from 0, of `count`; `source` names the flags or variables."""

    number: int
    count: int
    source: str

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """Every `count`-th lock's jobs, from `number` on."""
        locks = list(dict.fromkeys(job.lock for job in jobs))
        own = set(locks[self.number :: self.count])
        return [job for job in jobs if job.lock in own]


def task_of(number: int | None, count: int | None, environment: Mapping[str, str]) -> Task | None:
    """The task that --task and --num-tasks name, else that of a Slurm array, else None.

    Raises:
      UserError: for one without the other, a number that is out of range, and an array whose indices have gaps.
    """
    if (number is None) != (count is None):
        missing = "--task" if number is None else "--num-tasks"
        raise UserError(f"{missing} is missing: --task=I and --num-tasks=N must be given together")
    if number is not None and count is not None:
        if not 0 <= number < count:
            raise UserError(
                f"--task={number} is out of range: with --num-tasks={count} it must be from 0 to {count - 1}; for a "
                f"Slurm array use sbatch --array=0-{count - 1}"
            )
        return Task(number, count, f"--task={number} --num-tasks={count}")
    if _ARRAY[0] not in environment:
        return None
    values = {name: environment.get(name, default) for name, default in zip(_ARRAY, ("", "1", "0", "1"), strict=True)}
    if not all(value.isdecimal() for value in values.values()):
        raise UserError(f"{_ARRAY[0]}={values[_ARRAY[0]]} is not a task of an array; give --task and --num-tasks")
    index, count, first, step = map(int, values.values())
    number, rest = divmod(index - first, max(step, 1))
    if rest or not 0 <= number < count:
        raise UserError(
            f"{_ARRAY[0]}={index} is not one of {count} consecutive indices from {first}; submit an array such as "
            f"--array=0-{count - 1}, or give --task and --num-tasks"
        )
    return Task(number, count, f"{_ARRAY[0]}={index} of {_ARRAY[1]}={count}")


def renamed(path: Path, before: Path) -> Path:
    """A path, or the one where an earlier version has stored what belongs there."""
    return before if before.exists() and not path.exists() else path


def run_jobs(jobs: Sequence[Job], out: Path, stored: Callable[[Job], dict | None]) -> Outcome:
    """Runs the jobs whose results are not stored; one that fails is recorded, and the others are run.

    Args:
      out: folder of the sweep, with logs/, locks/ and failures/.
      stored: the results of a job that need not be run again, or None.

    Raises:
      SystemExit: after a signal, once the run under way is saved.
    """
    for job in iterate_with_eta(jobs, [stored(job) is None for job in jobs]):
        run_job(job, out, stored)
    return outcome_of(jobs, out, stored)


def run_in_another_process(job: Job, log: Path, lock: TextIO) -> None:
    """Runs the commands of a job, which hold its lock too, for they may outlive this process."""
    run_commands(job.result_path, job.workdir, job.commands, log=log, inherited=(lock.fileno(),))


def run_job(
    job: Job,
    out: Path,
    stored: Callable[[Job], dict | None],
    run: Callable[[Job, Path, TextIO], None] = run_in_another_process,
) -> None:
    """Runs a job unless its results are stored or another process runs it; why it failed is recorded.

    Args:
      out, stored: of `run_jobs`.
      run: makes and stores the results of a job, given the path of its log and its locked file; raises `RunFailed`.

    Raises:
      SystemExit: after a signal, once the run is saved.
    """
    for name in ("logs", "locks", "failures"):
        (out / name).mkdir(parents=True, exist_ok=True)
    if stored(job) is not None:
        return
    with _locked(out, job) as lock:
        if lock is None:
            print(f"{job.name} is running in another process and is skipped", flush=True)
        elif stored(job) is None:
            _run_locked(job, out, stored, functools.partial(run, job, out / "logs" / f"{job.name}.log", lock))


def outcome_of(jobs: Sequence[Job], out: Path, stored: Callable[[Job], dict | None]) -> Outcome:
    """What is stored of the jobs so far."""
    outcome = Outcome({}, {}, [])
    for job in jobs:
        if (results := stored(job)) is not None:
            outcome.results[job.name] = results
        elif failure := read_json(_failure_path(out, job), ("reason",), "the run is retried"):
            outcome.failures[job.name] = failure["reason"]
        else:
            outcome.left.append(job.name)
    return outcome


def print_incomplete(outcome: Outcome) -> None:
    """Prints which jobs failed, and why, and which are left."""
    for name, reason in outcome.failures.items():
        print(f"{name} failed: {reason}; the same command retries it", file=sys.stderr)
    if outcome.left:
        print(
            f"{', '.join(outcome.left)}: running in another process; rerun the same command afterwards to see the "
            "results"
        )


def is_under_way(job: Job, out: Path) -> bool:
    """Whether a process runs this job or another one of its lock."""
    if not _lock_path(out, job).exists():
        return False
    with _locked(out, job) as lock:
        return lock is None


def _run_locked(job: Job, out: Path, stored: Callable[[Job], dict | None], run: Callable[[], None]) -> None:
    log, failure = out / "logs" / f"{job.name}.log", _failure_path(out, job)
    try:
        run()
        if stored(job) is None:
            # Those of an earlier evaluation.
            raise RunFailed(f"{job.workdir} has no results of its last command", why_unmeasured(log))
    except RunFailed as error:
        write_atomic(failure, json.dumps({"reason": error.reason, "log": str(log)}, indent=1) + "\n")
        print(f"{job.name} failed: {error.reason} (see {log})", file=sys.stderr, flush=True)
    except SystemExit:
        print(f"stopped in {job.name}; the same command resumes it", file=sys.stderr, flush=True)
        raise
    else:
        failure.unlink(missing_ok=True)


def _failure_path(out: Path, job: Job) -> Path:
    return out / "failures" / f"{job.name}.json"


def _lock_path(out: Path, job: Job) -> Path:
    return out / "locks" / f"{job.lock}.lock"


@contextlib.contextmanager
def _locked(out: Path, job: Job) -> Iterator[TextIO | None]:
    """For the block, the locked file of a job; None where another process has it."""
    with _lock_path(out, job).open("a", encoding="utf-8") as file:
        yield file if acquire(file, fix="give a folder on another file system") else None
