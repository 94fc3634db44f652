"""Trains and evaluates a list of objectives and seeds, optionally over a grid of fields, and writes one report."""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from run_once import main_command, shell_line
from sweeps.jobs import Job, Task, is_under_way, outcome_of, run_jobs, task_of
from sweeps.plan import (
    PLAN,
    Request,
    Run,
    parse_objectives,
    parse_seeds,
    parse_vary,
    plan_runs,
    read_plan,
    split_fields,
    text_of,
    write_plan,
)
from sweeps.report import write_plot, write_report

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable, read_json
from s2dm_jax.common.locks import acquire
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.defaults import default_config

_DESCRIPTION = """\
Runs python -m s2dm_jax.main once for each seed, objective and combination of the values of --vary, one run
after another, each in a folder of OUT/runs, and writes OUT/report.md, .csv, .json, .png and .html: means over
the seeds with standard errors, and differences to the first objective seed by seed. All runs are checked
before the first one trains. Any flag --config.GROUP.FIELD=VALUE is passed to all of them.

Rerun the same command to resume: finished runs are skipped, an interrupted run continues, and a failed run is
retried. Several processes can share one OUT; each run is done by one of them. In a Slurm array each task does its
share. The exit status is 0 if no run of this process failed, 1 if one did, 2 for an error on the command line,
128 + signal after a signal."""
_EXAMPLE = """\
examples:
  python scripts/sweep.py --config=configs/digits.py --objectives=ddpm,s2_10,sa_2 --seeds=0,1,2 --out=runs/sweep
  python scripts/sweep.py --config=configs/digits.py --objectives=ddpm,s2_10 --seeds=0-4 --out=runs/rates \\
      --vary=train.lr=1e-3,3e-4 --config.train.steps=500 --config.eval.nfe=5,10
  python scripts/sweep.py --out=runs/rates               # resumes it
  python scripts/sweep.py --out=runs/rates --report      # reports what is finished
  sbatch --array=0-3 --wrap='python scripts/sweep.py --out=runs/rates'"""

# What Slurm sets in a process that srun started, besides the number of those.
_SRUN = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def _parser() -> Parser:
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.allow_abbrev = False
    parser.add_argument(
        "--out", default="runs/sweep", type=path_argument("--out"), help="folder, new or to resume (%(default)s)"
    )
    parser.add_argument("--config", help="config file, such as configs/digits.py (default: resume the sweep in --out)")
    parser.add_argument("--objectives", help="objectives, comma-separated; the others are compared with the first")
    parser.add_argument("--seeds", help="training seeds, such as 0,1,2 or 0-4 (0)")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=A,B",
        help="values of a field, such as train.lr=1e-3,3e-4 (values with commas: separate them by semicolons); "
        "repeat for a grid",
    )
    parser.add_argument("--task", type=int, help="number of this task, from 0 (default: from a Slurm array)")
    parser.add_argument("--num-tasks", "--num_tasks", type=int, help="number of tasks that share the runs")
    parser.add_argument(
        "--list",
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print each run with its state and command, and train nothing",
    )
    parser.add_argument(
        "--report", action="store_true", help="write the report of the finished runs, and train nothing"
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Request | None]:
    """Reads the command line: the options, and what to train, None for the plan in --out.

    Raises:
      UserError: for a value that is wrong by itself.
    """
    fields, rest = split_fields(argv)
    args = _parser().parse_args(rest)
    if not args.out:
        raise UserError("--out is empty; give a folder, such as --out=runs/sweep")
    if args.config is None:
        named = {"--objectives": args.objectives, "--seeds": args.seeds, "--vary": args.vary, "--config.…": fields}
        if given := [name for name, value in named.items() if value]:
            raise UserError(f"{given[0]} needs --config; for example --config=configs/digits.py")
        return args, None
    objectives = parse_objectives(args.objectives) if args.objectives is not None else []
    seeds = parse_seeds(args.seeds) if args.seeds is not None else [0]
    return args, Request(args.config, objectives, seeds, parse_vary(args.vary), fields)


def job_of(run: Run, out: Path) -> Job:
    """How a run of the sweep in `out` is made."""
    workdir = out / "runs" / run.folder
    commands = [main_command(*run.flags, f"--workdir={workdir}")]
    if run.evaluation["checkpoint_step"]:
        # The training evaluates its last step, whatever this field says.
        texts = {name: "none" if value in (None, "", []) else text_of(value) for name, value in run.evaluation.items()}
        flags = [f"--config.eval.{name}={text}" for name, text in texts.items()]
        commands.append(main_command("--mode=evaluate", f"--workdir={workdir}", *flags))
    return Job(run.name, run.folder, workdir, out / "results" / f"{run.name}.json", commands)


def stored_results(run: Run, out: Path) -> dict | None:
    """The results of a run if they are those of its last step and its evaluation, else None."""
    job = job_of(run, out)
    if not (job.workdir / "config.json").exists() or not job.result_path.exists():
        return None
    results = read_json(job.result_path, ("step", "eval", "rows", "provenance"), "the run is evaluated again")
    # Results of before a field existed were made with its default.
    defaults = json.loads(json.dumps(default_config().eval.to_dict()))
    current = results and results["step"] == run.steps and {**defaults, **results["eval"]} == run.evaluation
    return results if current else None


def prepare(out: Path, request: Request | None, *, writes: bool) -> list[Run]:
    """The runs of a sweep, all of them checked; `writes` leaves their plan in its folder.

    Raises:
      UserError: for a run that cannot be trained, or a folder that is none of a sweep.
    """
    if request is None:
        return read_plan(out)
    if out.exists() and not (out / PLAN).exists() and any(not each.name.startswith(".") for each in out.iterdir()):
        raise UserError(f"--out={out} holds files but no sweep; give a new or an empty folder")
    runs = plan_runs(request, out)
    if writes:
        check_writable([out], "give another --out")
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out):
            names = {run.name for run in runs}
            dropped = [run.name for run in read_plan(out) if run.name not in names] if (out / PLAN).exists() else []
            write_plan(out, request, runs)
        if dropped:
            print(f"note: {out} also holds {len(dropped)} other runs of an earlier command, which remain unchanged")
    return runs


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """For the block, no other process writes the plan or the report."""
    with (out / ".lock").open("a", encoding="utf-8") as file:
        acquire(file, fix="give a folder on another file system", wait=True)
        yield


def print_list(runs: Sequence[Run], out: Path, task: Task | None) -> None:
    """Prints each run of this task: its state and its command."""
    jobs = {run.name: job_of(run, out) for run in runs}
    outcome = outcome_of(list(jobs.values()), out, lambda job: stored_results(_named(runs, job), out))
    own = list(jobs.values()) if task is None else task.share(list(jobs.values()))
    for job in own:
        state = "finished" if job.name in outcome.results else "to do"
        if job.name in outcome.failures:
            state = f"failed before: {outcome.failures[job.name]}"
        if job.name not in outcome.results and is_under_way(job, out):
            state = "running in another process"
        print("\n  ".join([f"{job.name} ({state})", *map(shell_line, job.commands)]))
    print(f"{len(own)} runs, {sum(job.name in outcome.results for job in own)} of them finished")


def _named(runs: Sequence[Run], job: Job) -> Run:
    return next(run for run in runs if run.name == job.name)


def report(out: Path, runs: Sequence[Run], results: Mapping[str, dict], failures: Mapping[str, str]) -> None:
    """Writes and prints the report; the plot needs matplotlib, and the page runs that can be compared, too."""
    with exclusive(out):
        text = write_report(out, runs, results, failures)
        print(f"\n{text}\nreport: {out / 'report.md'}, report.csv, report.json")
        if not any("frechet_distance" in row for each in results.values() for row in each["rows"] if row["nfe"]):
            return
        if importlib.util.find_spec("matplotlib") is None:
            print(
                "note: no plot and no page because matplotlib is not installed; install it with pip install "
                "'s2dm_jax[plot]'"
            )
            return
        print(f"plot: {write_plot(out, runs, results)}")
        from s2dm_jax.common.files import write_atomic
        from s2dm_jax.evaluation.html_report import report_page

        folders = dict.fromkeys(out / "runs" / run.folder for run in runs if run.name in results)
        try:
            page = report_page([str(folder) for folder in folders if (folder / "results.json").exists()])
        except UserError as error:
            print(f"note: no page: {error}")
        else:
            write_atomic(out / "report.html", page)
            print(f"page: {out / 'report.html'}")


def check_processes(environment: Mapping[str, str]) -> None:
    """Raises a `UserError` in one of several processes of srun, which the trainings would take for a run of several."""
    count = environment.get("SLURM_NTASKS", "1")
    if count != "1" and all(name in environment for name in _SRUN):
        raise UserError(
            f"SLURM_NTASKS={count}: srun has started {count} processes of this sweep, but each run uses one process; "
            "give --ntasks=1, and --array to train several runs in parallel"
        )


def sweep(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    args, request = parse(argv)
    out, task = Path(args.out), task_of(args.task, args.num_tasks, os.environ)
    runs = prepare(out, request, writes=not args.list)
    jobs = [job_of(run, out) for run in runs]
    by_name = {run.name: run for run in runs}

    def stored(job: Job) -> dict | None:
        return stored_results(by_name[job.name], out)

    if args.list:
        print_list(runs, out, task)
        return 0
    own = jobs if task is None else task.share(jobs)
    if not args.report:
        check_processes(os.environ)
        if task is not None:
            print(f"task {task.number} of {task.count} ({task.source}): {len(own)} of {len(jobs)} runs", flush=True)
        run_jobs(own, out, stored)
    outcome = outcome_of(jobs, out, stored)
    if args.report or not outcome.left:
        report(out, runs, outcome.results, outcome.failures)
    else:
        print(f"{len(outcome.left)} of {len(runs)} runs are left to other processes; the last one writes the report")
    return int(any(job.name in outcome.failures for job in own))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; status 1 for a failed run; user errors and signals are one sentence and status 2 or 128 + signal."""
    with end_on_signal("finished runs are stored, and the same command resumes"), report_user_errors():
        if status := sweep(sys.argv[1:] if argv is None else argv):
            sys.exit(status)


if __name__ == "__main__":
    main()
