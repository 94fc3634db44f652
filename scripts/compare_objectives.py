"""Trains every objective over several seeds and compares their samples; docs/objectives.md has the table."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from run_once import DIGITS, constant_rate, main_command, mean_cell, parse_nfe, say_gaps, stored_results
from sweeps.jobs import Job, print_incomplete, renamed, run_jobs

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.io import config_path
from s2dm_jax.config.presets import ALIASES

_DESCRIPTION = """\
Trains ddpm, s2_10, sa_2 and s2_10+sa_2 with each seed and evaluates each with DDIM. Plain training and the
skip-step term make one network evaluation per image and step, the sequence-aware term K = 2. ddpm and s2_10
are therefore evaluated after STEPS steps (equal steps) and after 2*STEPS (equal network evaluations). ddpm is
also sampled with its output scaled by the factor that training with the skip-step term leads to.

The first table has the mean and standard deviation over the seeds of the Frechet distance in the features of a
classifier of the dataset (not FID). The second has those of the difference between two runs of one seed,
which start from the same weights and see the same batches. Every run is evaluated from the same noise.

Rerun the same command to resume: finished runs are not repeated. A run that fails is reported at the end,
leaves gaps in the tables and sets exit status 1. scripts/sweep.py compares any objectives, fields and samplers."""
_EXAMPLE = """\
example (digits, 5 seeds of 500 steps, about an hour on 2 cores):
  python scripts/compare_objectives.py runs/objectives"""

_SKIP = 10
# Network evaluations per image and train step, and the values of eval.skip_scale to evaluate with.
_OBJECTIVES = {"ddpm": (1, (0, _SKIP)), "s2_10": (1, (0,)), "sa_2": (2, (0,)), "s2_10+sa_2": (2, (0,))}
# The names that folders and files of results had before 0.3.
_BEFORE = {full: short for short, full in ALIASES.items()}


class Variant(NamedTuple):
    """A row of the first table: objective, train steps and skip of the output's scale (0: unscaled)."""

    objective: str
    steps: int
    skip_scale: int

    @property
    def name(self) -> str:
        return self.objective + (f", ε scaled (skip {self.skip_scale})" if self.skip_scale else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value out of range.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument(
        "out", metavar="DIR", type=path_argument("DIR"), help="folder for the runs and the table, new or to resume"
    )
    parser.add_argument("--config", default=DIGITS, help="config file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="number of training seeds, at least 2 (5)")
    parser.add_argument("--steps", type=int, default=500, help="train steps of sa_2 and s2_10+sa_2 (500)")
    parser.add_argument(
        "--nfe", default="5,10,20,50", help="network evaluations per image, comma-separated (5,10,20,50)"
    )
    args = parser.parse_args(argv)
    if args.seeds < 2:
        raise UserError(f"--seeds={args.seeds} is out of range: a standard deviation needs at least 2")
    if args.steps < 1:
        raise UserError(f"--steps={args.steps} is out of range: it must be at least 1")
    parse_nfe(args.nfe)
    config_path(args.config)
    return args


def variants(args: argparse.Namespace) -> list[Variant]:
    """The variants that each seed is trained and evaluated in, longer trainings after shorter ones."""
    return [
        Variant(objective, steps, skip_scale)
        for objective, (cost, scales) in _OBJECTIVES.items()
        for steps in sorted({args.steps, 2 * args.steps // cost})
        for skip_scale in scales
    ]


def job_of(args: argparse.Namespace, seed: int, variant: Variant) -> Job:
    """How a variant is trained and evaluated; its folder and its results may have the objective's short name."""
    objective, steps, skip_scale = variant
    before, out = _BEFORE.get(objective, objective), Path(args.out)
    workdir = renamed(out / objective / f"seed{seed}", out / before / f"seed{seed}")
    end = f"_seed{seed}_step{steps}_scale{skip_scale}"
    path = renamed(out / "results" / f"{objective}{end}.json", out / "results" / f"{before}{end}.json")
    flags = [f"--config={args.config}:{objective}", f"--workdir={workdir}"]
    flags += [*constant_rate(args.config), f"--config.train.seed={seed}", f"--config.train.steps={steps}"]
    flags += [f"--config.eval.nfe={args.nfe}", f"--config.eval.skip_scale={skip_scale}"]
    # As in the papers' tables.
    flags += ["--config.eval.timestep_spacing=uniform"]
    return Job(f"{objective}{end}", f"{objective}_seed{seed}", workdir, path, [main_command(*flags)])


def distances_of(args: argparse.Namespace, runs: Sequence[dict | None]) -> list[list[float | None]]:
    """Frechet distances [run][NFE], None for a gap and for all of a run that failed; floor and ceiling have no NFE."""
    gaps = {"rows": [{"nfe": nfe} for nfe in parse_nfe(args.nfe)]}
    return [[row.get("frechet_distance") for row in (run or gaps)["rows"] if row["nfe"]] for run in runs]


def table(args: argparse.Namespace, results: dict[Variant, list[dict | None]]) -> str:
    """Mean ± standard deviation over the seeds, a row for each variant."""
    rows = []
    for variant, runs in results.items():
        per_nfe = zip(*distances_of(args, runs), strict=True)
        cells = [mean_cell(d) for d in per_nfe]
        evaluations = variant.steps * _OBJECTIVES[variant.objective][0]
        rows.append([variant.name, f"{variant.steps:,}", f"{evaluations:,}", *cells])
    header = ["objective", "steps", "evaluations per image of a batch", *args.nfe.split(",")]
    return markdown_table(header, rows)


def differences(args: argparse.Namespace, results: dict[Variant, list[dict | None]]) -> str:
    """Mean ± standard deviation of the difference between two variants, seed by seed."""
    few, many = args.steps, 2 * args.steps
    pairs = [
        (Variant("s2_10", few, 0), Variant("ddpm", few, 0)),
        (Variant("s2_10", few, 0), Variant("ddpm", few, _SKIP)),
        (Variant("s2_10", many, 0), Variant("ddpm", many, 0)),
        (Variant("s2_10", many, 0), Variant("ddpm", many, _SKIP)),
        (Variant("sa_2", few, 0), Variant("ddpm", few, 0)),
        (Variant("sa_2", few, 0), Variant("ddpm", many, 0)),
        (Variant("s2_10+sa_2", few, 0), Variant("sa_2", few, 0)),
    ]
    rows = []
    for pair in pairs:
        per_seed = zip(*(distances_of(args, results[variant]) for variant in pair), strict=True)
        difference = [
            [None if a is None or b is None else a - b for a, b in zip(*both, strict=True)] for both in per_seed
        ]
        per_nfe = zip(*difference, strict=True)
        cells = [mean_cell(d, "+") for d in per_nfe]
        rows.append([" less ".join(f"{v.name}, {v.steps:,} steps" for v in pair), *cells])
    return markdown_table(["difference", *args.nfe.split(",")], rows)


def compare(args: argparse.Namespace) -> int:
    """Runs what is missing, then writes and prints the tables if all runs are finished; returns the exit status."""
    jobs = {(seed, v): job_of(args, seed, v) for seed in range(args.seeds) for v in variants(args)}
    nfe, results = parse_nfe(args.nfe), {}
    outcome = run_jobs(list(jobs.values()), Path(args.out), lambda job: stored_results(job.result_path, nfe))
    print_incomplete(outcome)
    if outcome.left or not outcome.results:
        return int(bool(outcome.failures))
    for (seed, variant), job in jobs.items():
        found = outcome.results.get(job.name)
        results.setdefault(variant, []).append(found)
        if found:
            say_gaps(f"{variant.name}, seed {seed},", found)
    # Floor and ceiling are the same for every run.
    anchors = next(iter(outcome.results.values()))["rows"]
    floor, *_, ceiling = (row.get("frechet_distance", math.nan) for row in anchors)
    text = table(args, results)
    text += f"\n\n{args.seeds} seeds; real images (floor) {floor:.2f}, noise (ceiling) {ceiling:.2f}.\n\n"
    text += differences(args, results) + "\n"
    write_atomic(Path(args.out) / "table.md", text)
    print(f"\n{text}")
    return int(bool(outcome.failures))


def main(argv: list[str] | None = None) -> None:
    """Entry point; status 1 for a failed run; user errors and signals are one sentence and status 2 or 128 + signal."""
    with end_on_signal("finished runs are stored, and the same command resumes"), report_user_errors():
        if status := compare(parse(argv)):
            sys.exit(status)


if __name__ == "__main__":
    main()
