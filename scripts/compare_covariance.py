"""Compares the reverse variances of SA-DPM's Table 2 over several seeds; docs/covariance.md has the table."""

import argparse
import sys
from pathlib import Path

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
Trains ddpm and sa_2 with each seed, and on each of them one variance head for SN-DPM and one for NPR-DPM;
samples them with DDPM and the posterior variance (plain), Analytic-DPM (A), NPR and SN at the timesteps
linspace 1 ... T; and prints the mean and standard deviation over the seeds of the Frechet distance in the
features of a classifier of the dataset (not FID).

Existing runs of scripts/compare_objectives.py in DIR are reused. Rerun the same command to resume: finished
runs are not repeated. A run that fails is reported at the end, leaves gaps in the table and sets exit status 1."""
_EXAMPLE = """\
example (digits, 3 seeds, about half an hour on 2 cores after compare_objectives.py):
  python scripts/compare_covariance.py runs/objectives"""

# Train steps at an equal number of network evaluations, as multiples of --steps (sa_2 evaluates K = 2
# timesteps).
_OBJECTIVES = {"ddpm": 2, "sa_2": 1}
# The names that folders and files of results had before 0.3.
_BEFORE = {full: short for short, full in ALIASES.items()}
# The table's names of the samplers.
_NAMES = {"ddpm": "plain", "analytic": "A", "npr": "NPR", "sn": "SN"}


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
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds, at least 2 (3)")
    parser.add_argument(
        "--steps", type=int, default=500, help="train steps of sa_2; ddpm trains for twice as many (500)"
    )
    parser.add_argument("--head-steps", type=int, default=300, help="train steps of each variance head (300)")
    parser.add_argument("--images", type=int, default=50, help="images per timestep for A's statistic (50)")
    parser.add_argument(
        "--nfe", default="5,10,20,50", help="network evaluations per image, comma-separated (5,10,20,50)"
    )
    args = parser.parse_args(argv)
    for flag, low in (("seeds", 2), ("steps", 1), ("head-steps", 1), ("images", 2)):
        value = getattr(args, flag.replace("-", "_"))
        if value < low:
            raise UserError(f"--{flag}={value} is out of range: it must be at least {low}")
    parse_nfe(args.nfe)
    config_path(args.config)
    return args


def distances_of(results: dict) -> dict[str, list[float | None]]:
    """Frechet distance by sampler, one for each NFE, None for a gap."""
    distances = {}
    for row in results["rows"]:
        # The floor and the ceiling have no NFE.
        if row["nfe"]:
            distances.setdefault(row["name"].split(",")[0], []).append(row.get("frechet_distance"))
    return distances


def jobs_of(args: argparse.Namespace) -> dict[tuple[str, int, str], Job]:
    """The runs by objective, seed and variance head, "" for none, in the order in which they are made: each base before
    its heads.
    """
    keys = [(objective, seed) for seed in range(args.seeds) for objective in _OBJECTIVES]
    return {(*key, kind): _job_of(args, *key, kind) for key in keys for kind in ("", "npr", "sn")}


def _job_of(args: argparse.Namespace, objective: str, seed: int, kind: str) -> Job:
    """How a base, or a variance head on it, is made; its folder and its results may have the objective's short name."""
    out, before = Path(args.out), _BEFORE.get(objective, objective)
    nfe, seed_flag = f"--config.eval.nfe={args.nfe}", f"--config.train.seed={seed}"
    steps, head = _OBJECTIVES[objective] * args.steps, f"_{kind}" if kind else ""
    base = renamed(out / objective / f"seed{seed}", out / before / f"seed{seed}")
    end = f"{head}_seed{seed}_step{steps}" + (f"_{args.head_steps}" if kind else "")
    path = renamed(out / "covariance" / f"{objective}{end}.json", out / "covariance" / f"{before}{end}.json")
    if kind:
        workdir = renamed(out / f"{objective}{head}" / f"seed{seed}", out / f"{before}{head}" / f"seed{seed}")
        flags = [f"--config={args.config}:{kind}", f"--config.variance_head.base_workdir={base}", nfe]
        commands = [[*flags, seed_flag, f"--config.train.steps={args.head_steps}"]]
    else:
        workdir = base
        train = [f"--config={args.config}:{objective}", *constant_rate(args.config), seed_flag, nfe]
        train.append(f"--config.train.steps={steps}")
        evaluate = ["--mode=evaluate", nfe, "--config.eval.samplers=ddpm,analytic"]
        evaluate += ["--config.eval.timestep_spacing=linspace", "--config.eval.variance=small"]
        evaluate += [f"--config.eval.noise_stat_images={args.images}"]
        commands = [[*train, "--config.eval.timestep_spacing=uniform"], evaluate]
    made = [main_command(f"--workdir={workdir}", *flags) for flags in commands]
    # One lock for a base and its heads, which is that of scripts/compare_objectives.py.
    return Job(f"{objective}{end}", f"{objective}_seed{seed}", workdir, path, made)


def compare(args: argparse.Namespace) -> int:
    """Runs what is missing, then writes and prints the table if all runs are finished; returns the exit status."""
    jobs, nfe = jobs_of(args), parse_nfe(args.nfe)
    outcome = run_jobs(list(jobs.values()), Path(args.out), lambda job: stored_results(job.result_path, nfe))
    print_incomplete(outcome)
    if outcome.left or not outcome.results:
        return int(bool(outcome.failures))
    found: dict[tuple[str, str], list[list[float | None]]] = {}
    for (objective, _, kind), job in jobs.items():
        results = outcome.results.get(job.name)
        if results:
            say_gaps(str(job.workdir), results)
        distances = distances_of(results) if results else {}
        for sampler in [kind] if kind else ["ddpm", "analytic"]:
            gaps: list[float | None] = [None] * len(nfe)
            found.setdefault((objective, _NAMES[sampler]), []).append(distances.get(sampler, gaps))
    rows = []
    for (objective, name), per_seed in found.items():
        cells = (mean_cell(d) for d in zip(*per_seed, strict=True))
        rows.append([objective, name, *cells])
    table = markdown_table(["objective", "variance", *args.nfe.split(",")], rows)
    write_atomic(Path(args.out) / "covariance.md", table + "\n")
    print(f"\n{table}")
    return int(bool(outcome.failures))


def main(argv: list[str] | None = None) -> None:
    """Entry point; status 1 for a failed run; user errors and signals are one sentence and status 2 or 128 + signal."""
    with end_on_signal("finished runs are stored, and the same command resumes"), report_user_errors():
        if status := compare(parse(argv)):
            sys.exit(status)


if __name__ == "__main__":
    main()
