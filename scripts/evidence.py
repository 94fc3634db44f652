"""Tests the claims of both papers with small trainings; docs/evidence.md has the results."""

import argparse
import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from findings import pieces, work
from findings.pieces import Piece, Request
from findings.presets import PRESETS
from findings.report import headline, write_report
from findings.table import FINDINGS
from sweeps.plan import split_fields

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import deferred, end_on_signal
from s2dm_jax.workdir.metadata import git_commit

_DESCRIPTION = """\
Trains, evaluates and reports. Each finding is a claim of a paper, the trainings that test it, and their differences
seed by seed; scripts/findings/table.py lists the findings. The most valuable ones run first, seed by seed, so that
stopping at any time leaves complete pairs. Rerun the same command to resume: finished runs are skipped, an
interrupted training continues, and failed runs are retried. Any flag --config.GROUP.FIELD=VALUE is passed to all
trainings.

Writes to OUT: report.md, report.json, figures/FINDING.png, results/ with all numbers (device and commit in each),
runs/ with the trained networks, logs/. OUT/results and OUT/plan.json are enough for --report on another machine.
The exit status is 0 on success, 1 if a run failed, 2 for an error on the command line, 128 + signal after a signal."""
_EXAMPLE = """\
examples:
  python scripts/evidence.py --out=runs/evidence --processes=2      # digits, 2 to 4 hours on two CPU cores
  python scripts/evidence.py --out=runs/evidence --processes=2 --seconds=480     # the first eight minutes of it
  python scripts/evidence.py --out=runs/evidence --report           # the results so far
  python scripts/evidence.py --out=runs/skip --only=skip,released --seeds=2
  python scripts/evidence.py --out=runs/cifar10 --preset=cifar10 --config.data.source=cifar10.tar"""

_SECONDS_BETWEEN_LOOKS = 0.2
# To save a training that is under way, before its process is killed.
_SECONDS_TO_SAVE = 45.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; `fields` are the flags of the config.

    Raises:
      UserError: for a value that is wrong by itself.
    """
    fields, rest = split_fields(argv)
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--out", default="runs/evidence", type=path_argument("--out"), help="folder, new or to resume (%(default)s)")
    add(
        "--preset",
        choices=PRESETS,
        help="digits; cifar10: own images, on a GPU; tiny: a rehearsal",
    )
    add("--config", default="", help="config file in place of the preset's")
    add("--steps", type=int, help="train steps of the shortest trainings, in place of the preset's")
    add("--only", default="", help="findings to run, comma-separated: " + ", ".join(FINDINGS))
    add("--seeds", type=int, help="maximum number of seeds (each finding has its own number)")
    add(
        "--processes",
        type=int,
        default=1,
        help="processes that train at once, each with its share of the cores (1); a GPU: 1 to 3",
    )
    add("--seconds", type=float, default=math.inf, help="stop after this many seconds; the same command resumes")
    add("--commit", help="commit of this code, if there is no git repository")
    add("--list", action="store_true", help="print each run with its state, and train nothing")
    add("--report", action="store_true", help="write the report of the finished runs, and train nothing")
    add("--worker", type=int, help="run as process I of --processes, from 0, without a report (used internally)")
    args = parser.parse_args(rest)
    args.fields, args.only = fields, [name.strip() for name in args.only.split(",") if name.strip()]
    if not args.out:
        raise UserError("--out is empty; give a folder, such as --out=runs/evidence")
    for name, least in (("steps", 1), ("seeds", 1), ("processes", 1), ("seconds", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value} is out of range: it must be at least {least}")
    if args.worker is not None and not 0 <= args.worker < args.processes:
        raise UserError(
            f"--worker={args.worker} is out of range: with --processes={args.processes} it must be below that"
        )
    return args


def request_of(args: argparse.Namespace) -> Request:
    """What to make: that of the folder, which the command line may only repeat.

    Raises:
      UserError: for a finding that the preset does not have.
    """
    out, is_given = Path(args.out), bool(args.preset or args.config or args.steps or args.fields)
    if args.report or ((out / pieces.PLAN).exists() and not is_given):
        request = pieces.read_plan(out)
    else:
        named = [name for name, preset in PRESETS.items() if preset.config == args.config]
        request = Request(args.preset or (named or ["digits"])[0], args.config, args.steps or 0, args.fields)
    for name in args.only:
        if name not in request.size.findings:
            raise UserError(
                f"--only={name} is not a finding of --preset={request.preset}; choose from "
                f"{', '.join(request.size.findings)}"
            )
    return request


def prepare(args: argparse.Namespace, request: Request) -> list[Piece]:
    """The pieces that are to be made, all of them checked, in a folder with their request."""
    out, found = Path(args.out), pieces.plan(request, args.only, args.seeds)
    if request.preset == "cifar10" and not any("data.source=" in flag for flag in request.fields):
        raise UserError("--preset=cifar10 needs its images; give their folder or archive as --config.data.source=PATH")
    check_writable([out], "give another --out")
    pieces.check(request, found, out)
    if not args.list:
        pieces.write_plan(out, request)
    return found


def make_in_processes(argv: Sequence[str], processes: int, seconds: float) -> int:
    """Runs as many workers of this command; returns 0, 1 where one ended early, or 128 + the signal that ended them.

    Those that are still at work after `seconds` are stopped, and save what they train.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *argv]
    ends = time.monotonic() + seconds
    with deferred(
        lambda: "stopping after the running trainings are saved; repeat the signal to stop at once"
    ) as received:
        workers = [subprocess.Popen([*command, f"--worker={number}"]) for number in range(processes)]
        stopping = None
        while any(worker.poll() is None for worker in workers):
            now = time.monotonic()
            if stopping is None and (received or now > ends):
                stopping = now
                for worker in workers:
                    worker.terminate()
            if stopping is not None and now - stopping > _SECONDS_TO_SAVE:
                for worker in workers:
                    worker.kill()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    failed = [worker.returncode for worker in workers if worker.returncode and stopping is None]
    if failed:
        print(f"{len(failed)} processes ended early (status {failed[0]}); the same command resumes", file=sys.stderr)
    return 128 + received[0] if received else int(bool(failed))


def report(args: argparse.Namespace, request: Request) -> int:
    """Writes the report of all that is made, and returns the exit status."""
    out, everything = Path(args.out), pieces.plan(request)
    results, failures, _ = work.outcome(everything, out)
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if not has_matplotlib:
        print("note: no figures because matplotlib is not installed; install it with pip install 's2dm_jax[plot]'")
    write_report(out, request, everything, results, failures, has_matplotlib)
    print(f"{headline(results, everything)}\nreport: {out / 'report.md'}, report.json, figures/")
    for name, reason in failures.items():
        print(f"{name} failed: {reason}; the same command retries it", file=sys.stderr)
    return int(bool(failures))


def print_list(found: Sequence[Piece], out: Path) -> None:
    """Prints each piece with its state."""
    for piece in found:
        record = pieces.stored(piece, out)
        print(f"{piece.name}: {work.line_of(record) if record else 'to do'}")
    print(f"{len(found)} runs and evaluations, {len(work.left(found, out))} of them to do")


def evidence(argv: Sequence[str]) -> int:
    """Makes what is missing and reports it; returns the exit status."""
    args = parse(argv)
    request = request_of(args)
    if args.report:
        return report(args, request)
    found, out = prepare(args, request), Path(args.out)
    if args.list:
        print_list(found, out)
        return 0
    is_worker = args.worker is not None
    work.set_environment(args.processes, args.worker)
    if is_worker or (args.processes == 1 and args.seconds == math.inf):
        work.Worker(found, out, args.commit or git_commit()).work()
        return 0 if is_worker else report(args, request)
    status = make_in_processes(argv, args.processes, args.seconds)
    # After a signal the user waits for the end.
    return status if status > 1 else max(status, report(args, request))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; status 1 for a failed run; user errors and signals are one sentence and status 2 or 128 + signal."""
    with end_on_signal("what is made is stored, and the same command resumes"), report_user_errors():
        if status := evidence(sys.argv[1:] if argv is None else argv):
            sys.exit(status)


if __name__ == "__main__":
    main()
