"""Compares the reverse variances of SA-DPM's Table 2 over several seeds; docs/covariance.md has the table."""

import argparse
from pathlib import Path
from typing import NamedTuple

from run_once import main_command, mean_cell, parse_nfe, run_once, say_gaps

from s2dm_jax.common.cli import Parser, path_argument
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.common.progress import iterate_with_eta
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.io import config_path

_DESCRIPTION = """\
Trains ddpm and sa with each seed, and on each of them one variance head for SN-DPM and one for NPR-DPM;
samples them by DDPM with the posterior variance (plain), Analytic-DPM (A), NPR and SN at the timesteps
linspace 1 ... T; and prints mean and standard deviation over the seeds of the Frechet distance in the
features of a classifier of the dataset (not FID).

Runs of scripts/compare_objectives.py in the same DIR are used. Rerun the same command to resume: finished
runs
are not repeated."""
_EXAMPLE = """\
example (digits, 3 seeds, about half an hour on 2 cores after compare_objectives.py):
  python scripts/compare_covariance.py runs/objectives"""

# Train steps at an equal number of network evaluations, as multiples of --steps (sa evaluates K = 2
# timesteps).
_OBJECTIVES = {"ddpm": 2, "sa": 1}
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
    parser.add_argument("--config", default="configs/digits.py", help="config file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds, at least 2 (3)")
    parser.add_argument("--steps", type=int, default=500, help="train steps of sa; ddpm makes twice as many (500)")
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


class Job(NamedTuple):
    """A run with its evaluations.

    Attributes:
      objective: of the run, or of a variance head's base.
      result_path: where its results are stored.
      workdir: of the run.
      commands: train and evaluate it.
    """

    objective: str
    result_path: Path
    workdir: Path
    commands: list[list[str]]


def distances_of(results: dict) -> dict[str, list[float | None]]:
    """Frechet distance by sampler, one for each NFE, None for a gap."""
    distances = {}
    for row in results["rows"]:
        # The floor and the ceiling have no NFE.
        if row["nfe"]:
            distances.setdefault(row["name"].split(",")[0], []).append(row.get("frechet_distance"))
    return distances


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The runs in the order in which they are made: each base before its variance heads."""
    out, jobs, nfe = Path(args.out), [], f"--config.eval.nfe={args.nfe}"
    for seed in range(args.seeds):
        for objective, factor in _OBJECTIVES.items():
            steps, base = factor * args.steps, out / objective / f"seed{seed}"
            seed_flag = f"--config.train.seed={seed}"
            train = [f"--config={args.config}:{objective}", seed_flag, nfe, f"--config.train.steps={steps}"]
            train += ["--config.eval.timestep_spacing=uniform"]
            evaluate = ["--mode=evaluate", nfe, "--config.eval.samplers=ddpm,analytic"]
            evaluate += ["--config.eval.timestep_spacing=linspace", "--config.eval.variance=small"]
            evaluate += [f"--config.eval.noise_stat_images={args.images}"]
            commands = [main_command(f"--workdir={base}", *flags) for flags in (train, evaluate)]
            path = out / "covariance" / f"{objective}_seed{seed}_step{steps}.json"
            jobs.append(Job(objective, path, base, commands))
            for kind in ("npr", "sn"):
                workdir = out / f"{objective}_{kind}" / f"seed{seed}"
                flags = [f"--config={args.config}:{kind}", f"--config.variance_head.base_workdir={base}", nfe]
                flags += [seed_flag, f"--config.train.steps={args.head_steps}"]
                name = f"{objective}_{kind}_seed{seed}_step{steps}_{args.head_steps}.json"
                command = main_command(f"--workdir={workdir}", *flags)
                jobs.append(Job(objective, out / "covariance" / name, workdir, [command]))
    return jobs


def compare(args: argparse.Namespace) -> str:
    """Runs what is missing and returns the table."""
    jobs, found = jobs_of(args), {}
    nfe = parse_nfe(args.nfe)
    for job in iterate_with_eta(jobs, [not job.result_path.exists() for job in jobs]):
        results = run_once(job.result_path, job.workdir, job.commands, nfe)
        say_gaps(str(job.workdir), results)
        for sampler, distances in distances_of(results).items():
            found.setdefault((job.objective, _NAMES[sampler]), []).append(distances)
    rows = []
    for (objective, name), per_seed in found.items():
        cells = (mean_cell(d) for d in zip(*per_seed, strict=True))
        rows.append([objective, name, *cells])
    return markdown_table(["objective", "variance", *args.nfe.split(",")], rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("finished runs are stored, and the same command resumes"), report_user_errors():
        args = parse(argv)
        table = compare(args)
        write_atomic(Path(args.out) / "covariance.md", table + "\n")
        print(f"\n{table}")


if __name__ == "__main__":
    main()
