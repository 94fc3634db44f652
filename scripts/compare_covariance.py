"""Compares the reverse variances of SA-DPM's Table 2 on several seeds; docs/covariance.md has the table."""

import argparse
import json
import statistics
import sys
from pathlib import Path

from s2dm_jax.common.cli import Parser, run_command
from s2dm_jax.common.errors import UserError, report_user_errors
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.common.progress import iterate_with_eta
from s2dm_jax.config.io import config_path

_DESCRIPTION = """\
Trains ddpm and sa from each seed, and on each a second head for SN-DPM and one for NPR-DPM, by the ordinary
command; samples them by DDPM with the posterior variance (plain), Analytic-DPM (A), NPR and SN, all from the
levels linspace 1 ... T; and prints mean and standard deviation over the seeds of the Frechet distance in the
features of a classifier of the data set (not FID).

Runs that scripts/compare_objectives.py has left in the same DIR are used. What was done is not done again:
the same command goes on after an interruption."""
_EXAMPLE = """\
example (digits, 3 seeds, about half an hour on 2 cores after compare_objectives.py):
  python scripts/compare_covariance.py runs/objectives"""

# objective: training steps that make as many network evaluations, as multiples of --steps.
_OBJECTIVES = {"ddpm": 2, "sa": 1}
_NAMES = {"ddpm": "plain", "analytic": "A", "npr": "NPR", "sn": "SN"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value out of range.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument("out", metavar="DIR", help="folder for the runs and the table, new or to go on with")
    parser.add_argument("--config", default="configs/digits.py", help="config file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds, at least 2 (3)")
    parser.add_argument(
        "--steps", type=int, default=500, help="optimizer steps of sa; ddpm makes twice (500)"
    )
    parser.add_argument("--head-steps", type=int, default=300, help="optimizer steps of each head (300)")
    parser.add_argument("--images", type=int, default=50, help="images a level behind A's statistic (50)")
    parser.add_argument("--nfe", default="5,10,20,50", help="network evaluations per image (5,10,20,50)")
    args = parser.parse_args(argv)
    for name, least in (("seeds", 2), ("steps", 1), ("head_steps", 1), ("images", 2)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)} is out of range: it must be at least {least}")
    config_path(args.config)
    return args


def distances_of(args: argparse.Namespace, kept: Path, workdir: Path, commands: list[list[str]]) -> dict:
    """Distances {method: one for each number of evaluations} of a run, after these commands unless kept.

    Raises:
      UserError: where a command fails, or what is kept is of other numbers of evaluations.
    """
    if not kept.exists():
        for flags in commands:
            command = [sys.executable, "-m", "s2dm_jax.main", f"--workdir={workdir}", *flags]
            print(" ".join(command[1:]), flush=True)
            if run_command(command):
                raise UserError(f"{workdir} could not be trained or evaluated; the command above says why")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, (workdir / "results.json").read_text(encoding="utf-8"))
    distances = {}
    for row in json.loads(kept.read_text(encoding="utf-8"))["rows"]:
        if row["nfe"]:
            method = row["name"].split(",")[0]
            distances.setdefault(method, {})[row["nfe"]] = row["frechet_distance"]
    budgets = [int(nfe) for nfe in args.nfe.split(",")]
    if any(list(found) != budgets for found in distances.values()):
        raise UserError(f"{kept} was made with other --nfe; give another DIR, or the same --nfe")
    return {method: list(found.values()) for method, found in distances.items()}


def jobs_of(args: argparse.Namespace) -> list[tuple[str, Path, Path, list[list[str]]]]:
    """What is to be had: (objective, where the results are kept, workdir, flags of each command)."""
    out, jobs, nfe = Path(args.out), [], f"--config.eval.nfe={args.nfe}"
    for seed in range(args.seeds):
        for objective, factor in _OBJECTIVES.items():
            steps, base = factor * args.steps, out / objective / f"seed{seed}"
            train = [f"--config={args.config}:{objective}", f"--config.train.seed={seed}", nfe]
            evaluate = ["--mode=evaluate", nfe, "--config.eval.samplers=ddpm,analytic"]
            evaluate += ["--config.eval.timestep_spacing=linspace", "--config.eval.variance=small"]
            evaluate += [f"--config.eval.noise_stat_images={args.images}"]
            kept = out / "covariance" / f"{objective}_seed{seed}_step{steps}.json"
            jobs.append((objective, kept, base, [[*train, f"--config.train.steps={steps}"], evaluate]))
            for kind in ("npr", "sn"):
                head = [f"--config={args.config}:{kind}", f"--config.variance_head.base_workdir={base}", nfe]
                head += [f"--config.train.seed={seed}", f"--config.train.steps={args.head_steps}"]
                name = f"{objective}_{kind}_seed{seed}_step{steps}_{args.head_steps}.json"
                workdir = out / f"{objective}_{kind}" / f"seed{seed}"
                jobs.append((objective, out / "covariance" / name, workdir, [head]))
    return jobs


def compare(args: argparse.Namespace) -> str:
    """Does what is not done, and makes the table."""
    jobs, found = jobs_of(args), {}
    for objective, *job in iterate_with_eta(jobs, [not kept.exists() for _, kept, *_ in jobs]):
        for method, values in distances_of(args, *job).items():
            found.setdefault((objective, _NAMES[method]), []).append(values)
    rows = []
    for (objective, name), per_seed in found.items():
        cells = (f"{statistics.mean(d):.2f} ± {statistics.stdev(d):.2f}" for d in zip(*per_seed, strict=True))
        rows.append([objective, name, *cells])
    return markdown_table(["objective", "variance", *args.nfe.split(",")], rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point: a mistake becomes one sentence and exit status 2."""
    with report_user_errors():
        args = parse(argv)
        table = compare(args)
        (Path(args.out) / "covariance.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}")


if __name__ == "__main__":
    main()
