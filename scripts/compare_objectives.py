"""Trains every objective over several seeds and compares their samples; docs/objectives.md has the table."""

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
Trains ddpm, s2, sa and s2sa from each seed by the ordinary command, and evaluates each by DDIM. Plain
training and the skip-step term make one network evaluation per image and step, the sequence-aware term
K = 2: ddpm and s2 are evaluated after STEPS steps (as many as the others) and after 2*STEPS (as many
evaluations). ddpm is also sampled with its output scaled as training with the skip term would scale it.

The first table has mean and standard deviation over the seeds of the Frechet distance in the features of a
classifier of the data set (not FID), the second those of the difference between two runs of one seed, which
begin with the same weights and see the same batches. Every run is evaluated from the same noise.

What was done is not done again: the same command goes on after an interruption."""
_EXAMPLE = """\
example (digits, 5 seeds of 500 steps, about an hour on 2 cores):
  python scripts/compare_objectives.py runs/objectives"""

_SKIP = 10
# method: (network evaluations per image and training step, evaluated with these eval.skip_scale)
_METHODS = {"ddpm": (1, (0, _SKIP)), "s2": (1, (0,)), "sa": (2, (0,)), "s2sa": (2, (0,))}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a value out of range.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument("out", metavar="DIR", help="folder for the runs and the table, new or to go on with")
    parser.add_argument("--config", default="configs/digits.py", help="config file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="number of training seeds, at least 2 (5)")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps at the same count (500)")
    parser.add_argument("--nfe", default="5,10,20,50", help="network evaluations per image (5,10,20,50)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        raise UserError(f"--seeds={args.seeds} is out of range: a standard deviation needs at least 2")
    if args.steps < 1:
        raise UserError(f"--steps={args.steps} is out of range: it must be at least 1")
    config_path(args.config)
    return args


def runs_of(args: argparse.Namespace) -> list[tuple[int, str, int, int]]:
    """What is trained and evaluated, (seed, method, steps, skip_scale), longer runs after shorter."""
    return [
        (seed, method, steps, skip_scale)
        for seed in range(args.seeds)
        for method, (cost, scales) in _METHODS.items()
        for steps in sorted({args.steps, 2 * args.steps // cost})
        for skip_scale in scales
    ]


def kept_at(args: argparse.Namespace, seed: int, method: str, steps: int, skip_scale: int) -> Path:
    """Where a run's results at this step are kept."""
    return Path(args.out) / "results" / f"{method}_seed{seed}_step{steps}_scale{skip_scale}.json"


def results_of(args: argparse.Namespace, seed: int, method: str, steps: int, skip_scale: int) -> dict:
    """Trains up to `steps` and evaluates, unless that was done, and returns the run's results.

    Raises:
      UserError: where the run fails, or what is there is of another number of evaluations.
    """
    kept = kept_at(args, seed, method, steps, skip_scale)
    budgets = [int(nfe) for nfe in args.nfe.split(",")]
    if not kept.exists():
        workdir = Path(args.out) / method / f"seed{seed}"
        command = [sys.executable, "-m", "s2dm_jax.main", f"--config={args.config}:{method}"]
        command += [f"--workdir={workdir}", f"--config.train.seed={seed}", f"--config.train.steps={steps}"]
        command += [f"--config.eval.nfe={args.nfe}", f"--config.eval.skip_scale={skip_scale}"]
        print(" ".join(command[1:]), flush=True)
        if run_command(command):
            raise UserError(f"{workdir} could not be trained or evaluated; the command above says why")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, (workdir / "results.json").read_text(encoding="utf-8"))
    results = json.loads(kept.read_text(encoding="utf-8"))
    if results["eval"]["nfe"] != budgets:
        raise UserError(f"{kept} was made with other --nfe; give another DIR, or the same --nfe")
    return results


def distances_of(runs: list[dict]) -> list[list[float]]:
    """Distances [run][number of evaluations]."""
    return [[row["frechet_distance"] for row in run["rows"] if row["nfe"]] for run in runs]


def name_of(method: str, skip_scale: int) -> str:
    """An objective, and what its output is scaled by, as a table has it."""
    return method + (f", ε scaled (skip {skip_scale})" if skip_scale else "")


def table(args: argparse.Namespace, results: dict) -> str:
    """Mean ± standard deviation over seeds, a row for each objective, training length and scale."""
    rows = []
    for (method, steps, skip_scale), runs in results.items():
        per_budget = zip(*distances_of(runs), strict=True)
        cells = [f"{statistics.mean(d):.2f} ± {statistics.stdev(d):.2f}" for d in per_budget]
        evaluations = steps * _METHODS[method][0]
        rows.append([name_of(method, skip_scale), f"{steps:,}", f"{evaluations:,}", *cells])
    header = ["objective", "steps", "evaluations per image of a batch", *args.nfe.split(",")]
    return markdown_table(header, rows)


def differences(args: argparse.Namespace, results: dict) -> str:
    """The same of one row less another, seed by seed."""
    few, many = args.steps, 2 * args.steps
    pairs = [
        (("s2", few, 0), ("ddpm", few, 0)),
        (("s2", few, 0), ("ddpm", few, _SKIP)),
        (("s2", many, 0), ("ddpm", many, 0)),
        (("s2", many, 0), ("ddpm", many, _SKIP)),
        (("sa", few, 0), ("ddpm", few, 0)),
        (("sa", few, 0), ("ddpm", many, 0)),
        (("s2sa", few, 0), ("sa", few, 0)),
    ]
    rows = []
    for one, other in pairs:
        per_seed = zip(distances_of(results[one]), distances_of(results[other]), strict=True)
        less = [[a - b for a, b in zip(*both, strict=True)] for both in per_seed]
        cells = [f"{statistics.mean(d):+.2f} ± {statistics.stdev(d):.2f}" for d in zip(*less, strict=True)]
        names = [f"{name_of(method, scale)}, {steps:,} steps" for method, steps, scale in (one, other)]
        rows.append([" less ".join(names), *cells])
    return markdown_table(["difference", *args.nfe.split(",")], rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point: a mistake becomes one sentence and exit status 2."""
    with report_user_errors():
        args = parse(argv)
        runs, results = runs_of(args), {}
        costs = [not kept_at(args, *each).exists() for each in runs]
        for seed, *kind in iterate_with_eta(runs, costs):
            one = results_of(args, seed, *kind)
            results.setdefault(tuple(kind), []).append(one)
        text = table(args, results)
        floor, *_, ceiling = (row["frechet_distance"] for row in one["rows"])
        text += f"\n\n{args.seeds} seeds; real images (floor) {floor:.2f}, noise (ceiling) {ceiling:.2f}.\n\n"
        text += differences(args, results) + "\n"
        (Path(args.out) / "table.md").write_text(text, encoding="utf-8")
        print(f"\n{text}")


if __name__ == "__main__":
    main()
