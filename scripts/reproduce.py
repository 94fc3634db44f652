"""Trains and evaluates what a table or figure of the papers needs; prints their figures beside ours."""

import argparse
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from papers.plan import budgets, gpu_hours, images_of, picture_commands, scaled, train_command, workdir_of
from papers.s2dm import TABLES as S2_TABLES
from papers.sa_dpm import TABLES as SA_TABLES
from papers.types import Model, Table, TableRow

from s2dm_jax.common.cli import Parser, check_matplotlib, run_command
from s2dm_jax.common.errors import UserError, report_user_errors
from s2dm_jax.common.files import atomic_path, write_atomic
from s2dm_jax.common.progress import iterate_with_eta
from s2dm_jax.config.io import from_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = {**S2_TABLES, **SA_TABLES}
_DESCRIPTION = """\
Trains what is missing, evaluates it, and leaves OUT/TABLE.md: for each line the paper's figures and ours. The
same command goes on after an interruption; tables share the runs in OUT/runs. --dry-run prints the commands
and what they cost. --scale=digits does the same with the handwritten digits, short trainings and few images,
in minutes: it tests the way, not the claims."""
_EXAMPLE = """\
examples:
  python scripts/reproduce.py s2-table1 --dry-run
  python scripts/reproduce.py sa-table4 --scale=digits --out=runs/digits_papers"""

_PICTURES = ("grid", "rows", "interpolation", "gap")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a table that does not exist, or a value out of range.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument(
        "table", metavar="TABLE", nargs="?", help=f"one of {', '.join(TABLES)}; none: list them"
    )
    parser.add_argument("--out", default="runs/papers", help="folder for runs and tables (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training (0)")
    parser.add_argument("--images", type=int, default=0, help="per cell (50,000; with --scale=digits 100)")
    parser.add_argument(
        "--steps", type=int, default=0, help="of the longest training with --scale=digits (200)"
    )
    parser.add_argument("--scale", choices=("full", "digits"), default="full", help="default: full")
    parser.add_argument("--dry-run", action="store_true", help="print commands and cost, do nothing")
    args = parser.parse_args(argv)
    if args.table and args.table not in TABLES:
        raise UserError(f"{args.table} is no table or figure; there are {', '.join(TABLES)}")
    if args.images < 0 or args.images == 1:
        raise UserError(f"--images={args.images} is out of range: it must be at least 2")
    if args.steps < 0 or (args.steps and args.scale == "full"):
        raise UserError(f"--steps={args.steps} must be positive, and goes with --scale=digits only")
    return args


def kept_at(table: Table, line: TableRow, args: argparse.Namespace) -> Path:
    """Where a line's results are kept."""
    name = "".join(c if c.isalnum() else "_" for c in line.label)
    digest = _digest(train_command(table, line, args))
    return Path(args.out) / "results" / args.table / f"{name}_{digest}.json"


def run_line(table: Table, line: TableRow, args: argparse.Namespace) -> dict:
    """Trains and evaluates, unless that was done, and returns the results.

    Raises:
      UserError: where the command fails.
    """
    command, kept = train_command(table, line, args), kept_at(table, line, args)
    if not kept.exists():
        workdir = workdir_of(line.model, args, line.head)
        if not line.head:
            _continue_a_shorter_one(line.model, workdir, args)
        print(" ".join(command[1:]), flush=True)
        if run_command(command):
            raise UserError(f"{line.label}: the command above failed and says why; the same command goes on")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, (workdir / "results.json").read_text(encoding="utf-8"))
    return json.loads(kept.read_text(encoding="utf-8"))


def costs_of(table: Table, args: argparse.Namespace) -> list[float]:
    """Hours of arithmetic that each line has left; what an earlier line trains is that line's."""
    left = [line for line in table.lines if not kept_at(table, line, args).exists()]
    costs = {}
    for i, line in enumerate(left):
        before, after = (sum(gpu_hours(table._replace(lines=tuple(left[:n])), args)) for n in (i, i + 1))
        costs[line.label] = after - before
    return [costs.get(line.label, 0.0) for line in table.lines]


def _continue_a_shorter_one(model: Model, workdir: Path, args: argparse.Namespace) -> None:
    """Starts a run from a finished one that differs in nothing but having fewer steps."""
    if workdir.exists():
        return
    alike = {line.model for table in TABLES.values() for line in scaled(table, args).lines}
    shorter = [m for m in alike if m._replace(steps=model.steps) == model and m.steps < model.steps]
    for other in sorted(shorter, key=lambda m: -m.steps):
        source = workdir_of(other, args)
        if (source / "results.json").exists():
            temporary = workdir.with_name(f".{workdir.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("results.*", "evaluations"))
            temporary.rename(workdir)
            return


def _digest(command: list[str]) -> str:
    return hashlib.sha256(" ".join(command[1:]).encode()).hexdigest()[:8]


def seconds_of(table: Table, line: TableRow, args: argparse.Namespace) -> list[str]:
    """What a table of times holds for a line: seconds per training step, or for sampling all images."""
    workdir = workdir_of(line.model, args)
    if table.kind == "training":
        last = json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        batch = from_json((workdir / "config.json").read_text(encoding="utf-8")).train.batch_size
        return [f"{batch / last['images_per_second']:.4f}"]
    entries = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (workdir / "evaluations" / "points").glob("*.json")
    ]
    seconds = {
        (entry["depends_on"]["point"]["nfe"], entry["depends_on"]["num_images"]): entry["seconds"]
        for entry in entries
        if "point" in entry["depends_on"]
    }
    images = images_of(args)
    return [f"{seconds[nfe, images]:.1f}" for nfe in budgets(table, line).values()]


def measured(table: Table, line: TableRow, found: dict) -> list[float | None]:
    """What a line's results have for each column; None where the method cannot make so few steps."""
    unit, of = (
        "inception_score" if table.kind == "inception_score" else "frechet_distance",
        budgets(table, line),
    )
    by_nfe = {row["nfe"]: row[unit] for row in found["rows"] if row["nfe"]}
    return [by_nfe.get(of.get(steps)) for steps in table.columns]


def table_text(table: Table, results: dict[str, dict], args: argparse.Namespace) -> str:
    """The papers' figures and ours, a pair of rows for each line."""
    from s2dm_jax.common.markdown import markdown_table

    rows = []
    for line in table.lines:
        if line.paper and args.scale == "full":
            rows.append([line.label, "paper", *line.paper])
        if table.kind in ("training", "sampling"):
            cells = seconds_of(table, line, args)
        else:
            values = measured(table, line, results[line.label])
            cells = ["–" if value is None else f"{value:.2f}" for value in values]
        rows.append([line.label, "ours", *cells])
    header = [f"{steps} steps" for steps in table.columns] or ["seconds"]
    text = markdown_table(["", "", *header], rows)
    provenance = next(iter(results.values()))["provenance"]
    below = f"{provenance['metric']}, {provenance['num_images']:,} images. "
    if args.scale == "digits":
        below += "Digits and short trainings: a test of the way, not of the claims. "
    return f"# {table.title}\n\n{text}\n\n{below}{table.note}".rstrip() + "\n"


def plot_curves(table: Table, results: dict[str, dict], args: argparse.Namespace) -> "Figure":
    """The table as a figure: ours as solid lines, the paper's numbers dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for line in table.lines:
        ours = np.array(measured(table, line, results[line.label]), float)
        (drawn,) = axes.plot(table.columns, ours, marker="o", label=line.label)
        if line.paper and args.scale == "full":
            axes.plot(table.columns, line.paper, linestyle="--", color=drawn.get_color())
    axes.set(title=table.title, xlabel="sampling steps", ylabel="distance", xscale="log", yscale="log")
    axes.set_xticks(table.columns, table.columns)
    axes.minorticks_off()
    axes.legend()
    return figure


def reproduce(args: argparse.Namespace) -> None:
    """Runs or prints the plan of one table.

    Raises:
      UserError: where a command fails, or for curves without matplotlib.
    """
    table = scaled(TABLES[args.table], args)
    pictures = picture_commands(table, args) if table.kind in _PICTURES else []
    training, sampling = gpu_hours(table, args)
    print(
        f"{table.title}\nat least {training:.1f} hours of training and {sampling:.1f} of sampling on one H100"
    )
    if args.dry_run:
        for line in table.lines:
            print(f"\n{line.label}:\n  " + " ".join(train_command(table, line, args)[1:]))
            if line.paper:
                print("  paper: " + ", ".join(map(str, line.paper)))
        for command in pictures:
            print("\n" + " ".join(command[1:]))
        return
    if table.kind == "curves":
        check_matplotlib("the figure")
    lines = iterate_with_eta(table.lines, costs_of(table, args))
    results = {line.label: run_line(table, line, args) for line in lines}
    if table.kind == "curves":
        path = Path(args.out) / f"{args.table}.png"
        with atomic_path(path) as temporary:
            plot_curves(table, results, args).savefig(temporary)
        print(f"curves: {path}")
    if table.kind != "gap":
        text = table_text(table, results, args)
        path = Path(args.out) / f"{args.table}.md"
        write_atomic(path, text)
        print(f"\n{text}\ntable: {path}")
    for command in pictures:
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command).returncode:
            raise UserError("the command above failed and says why; the same command goes on")


def main(argv: list[str] | None = None) -> None:
    """Entry point: a mistake becomes one sentence and exit status 2."""
    with report_user_errors():
        args = parse(argv)
        if args.table:
            reproduce(args)
        else:
            print("\n".join(f"{name:12s} {table.title}" for name, table in TABLES.items()))


if __name__ == "__main__":
    main()
