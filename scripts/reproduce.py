"""Reproduces a table or figure of the papers: trains, evaluates, prints the measured values beside the printed ones."""

import argparse
import hashlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from papers.illustration import plot_illustration
from papers.plan import (
    gpu_hours,
    image_commands,
    nfe_by_steps,
    num_images,
    scaled,
    train_command,
    workdir_of,
)
from papers.presets import PRESETS, with_preset
from papers.s2dm import NOT_REPRODUCED
from papers.s2dm import TABLES as S2_TABLES
from papers.sa_dpm import TABLES as SA_TABLES
from papers.types import Model, Table, TableRow
from run_once import print_command, run_once, say_gaps, stored_results

from s2dm_jax.common.cli import Parser, check_matplotlib, path_argument, run_command
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path, read_json_lines, write_atomic
from s2dm_jax.common.progress import iterate_with_eta
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.io import from_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = {**S2_TABLES, **SA_TABLES}
_DESCRIPTION = """\
Trains the models of a table that are not trained yet, evaluates them, and writes OUT/TABLE.md, with the printed
and the measured values of each row. --preset=released, the default, follows the authors' published code, which
produced the printed numbers; --preset=paper trains the papers' equations. A table also shows the finished rows of
the other preset. Rerun the same command to resume. Tables share the runs in OUT/runs. --dry-run prints the
commands and their cost. --scale=digits runs the same procedure on the handwritten digits with short trainings and
few images, in minutes: it tests the procedure, not the papers' claims."""
_EXAMPLE = """\
examples:
  python scripts/reproduce.py s2-table1 --dry-run
  python scripts/reproduce.py sa-table2 --preset=paper --dry-run
  python scripts/reproduce.py sa-table4 --scale=digits --out=runs/digits_papers"""

_IMAGE_KINDS = ("grid", "compare", "interpolation", "gap")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a table that does not exist, or a value out of range.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument("table", metavar="TABLE", nargs="?", help=f"one of {', '.join(TABLES)}; none: list them")
    parser.add_argument(
        "--out", default="runs/papers", type=path_argument("--out"), help="folder for runs and tables (%(default)s)"
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="released",
        help="; ".join(f"{name}: {meaning}" for name, meaning in PRESETS.items()) + " (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="training seed (0)")
    parser.add_argument(
        "--images", type=int, default=0, help="number of images per value (50,000; with --scale=digits 100)"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="train steps of the longest training with --scale=digits (200)"
    )
    parser.add_argument(
        "--scale",
        choices=("full", "digits"),
        default="full",
        help="the papers' datasets, or the digits (full)",
    )
    parser.add_argument(
        "--network",
        choices=("improved_unet", "unet"),
        default="improved_unet",
        help="network of SA-DPM's CIFAR-10 tables: improved-diffusion's, most likely the paper's, or the one of its "
        "released code (improved_unet)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and their cost, and run nothing")
    args = parser.parse_args(argv)
    if args.table in NOT_REPRODUCED:
        raise UserError(f"{args.table} cannot be reproduced: {NOT_REPRODUCED[args.table]}")
    if args.table and args.table not in TABLES:
        raise UserError(f"{args.table} is not a table or figure; choose one of {', '.join(TABLES)}")
    if args.images < 0 or args.images == 1:
        raise UserError(f"--images={args.images} is out of range: it must be at least 2")
    if args.steps < 0 or (args.steps and args.scale == "full"):
        raise UserError(f"--steps={args.steps} is not allowed: it must be positive, and works with --scale=digits only")
    return args


def result_path(table: Table, row: TableRow, args: argparse.Namespace) -> Path:
    """Where the results of a row are stored: the name has a hash of the command that makes them."""
    name = "".join(c if c.isalnum() else "_" for c in row.label)
    command = " ".join(train_command(table, row, args)[1:])
    digest = hashlib.sha256(command.encode()).hexdigest()[:8]
    return Path(args.out) / "results" / args.table / f"{name}_{digest}.json"


def run_row(table: Table, row: TableRow, args: argparse.Namespace) -> dict:
    """The results of a row, after training and evaluating it unless they are stored.

    Raises:
      UserError: if the command fails.
    """
    path, workdir = result_path(table, row, args), workdir_of(row.model, args, row.variance_head)
    if not path.exists() and not row.variance_head:
        _start_from_shorter_run(row.model, workdir, args)
    return run_once(path, workdir, [train_command(table, row, args)])


def remaining_hours(table: Table, args: argparse.Namespace) -> list[float]:
    """Hours of arithmetic left for each row; a training that rows share counts for the first of them."""
    rows = [row for row in table.rows if not result_path(table, row, args).exists()]
    hours = {}
    for i, row in enumerate(rows):
        before, after = (sum(gpu_hours(table._replace(rows=tuple(rows[:n])), args)) for n in (i, i + 1))
        hours[row.label] = after - before
    return [hours.get(row.label, 0.0) for row in table.rows]


def _start_from_shorter_run(model: Model, workdir: Path, args: argparse.Namespace) -> None:
    """Copies a finished run of the same model with fewer train steps, for training to continue."""
    if workdir.exists():
        return
    models = {row.model for table in TABLES.values() for row in scaled(table, args).rows}
    shorter = [m for m in models if m._replace(steps=model.steps) == model and m.steps < model.steps]
    for other in sorted(shorter, key=lambda m: -m.steps):
        source = workdir_of(other, args)
        if (source / "results.json").exists():
            temporary = workdir.with_name(f".{workdir.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("results.*", "evaluations"))
            temporary.rename(workdir)
            return


def costs_of(table: Table, row: TableRow, args: argparse.Namespace) -> list[str]:
    """The row's entries in a table of costs: seconds and GB per train step, or seconds to sample all images."""
    workdir = workdir_of(row.model, args)
    if not (workdir / "metrics.jsonl").exists():
        # The workdir was deleted after its results were stored.
        return ["–"] * len(row.paper)
    if table.kind == "training":
        last = read_json_lines(workdir / "metrics.jsonl")[-1]
        batch = from_json((workdir / "config.json").read_text(encoding="utf-8")).train.batch_size
        return [f"{batch / last['images_per_second']:.4f}", f"{last['peak_memory_gb']:.2f}"]
    paths = (workdir / "evaluations" / "points").glob("*.json")
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    seconds = {
        (entry["depends_on"]["point"]["nfe"], entry["depends_on"]["num_images"]): entry["seconds"]
        for entry in entries
        if "point" in entry["depends_on"]
    }
    return [f"{seconds[nfe, num_images(args)]:.1f}" for nfe in nfe_by_steps(table, row, args.preset).values()]


def measured(table: Table, row: TableRow, results: dict, preset: str = "paper") -> list[float | None]:
    """The measured value of each column; None where the sampler needs more steps, and for a gap."""
    metric = "inception_score" if table.kind == "inception_score" else "frechet_distance"
    by_nfe = {result["nfe"]: result.get(metric) for result in results["rows"] if result["nfe"]}
    nfe = nfe_by_steps(table, row, preset)
    return [by_nfe.get(nfe.get(steps)) for steps in table.columns]


def finished_rows(results: dict[str, dict], args: argparse.Namespace) -> dict[str, dict[str, tuple[TableRow, dict]]]:
    """The rows with results by preset and label: those just made, and stored ones of the other presets."""
    found = {}
    for preset in PRESETS:
        other = with_preset(args, preset)
        table = scaled(TABLES[args.table], other)
        stored = results
        if preset != args.preset:
            stored = {row.label: stored_results(result_path(table, row, other)) for row in table.rows}
        found[preset] = {row.label: (row, stored[row.label]) for row in table.rows if stored[row.label]}
    return {preset: rows for preset, rows in found.items() if rows}


def table_text(table: Table, results: dict[str, dict], args: argparse.Namespace) -> str:
    """Markdown with the printed and the measured values, a line for each preset that has results."""
    from s2dm_jax.common.markdown import markdown_table

    found = finished_rows(results, args)
    lines = []
    for row in table.rows:
        if row.paper and args.scale == "full":
            lines.append([row.label, "printed", *row.paper])
        for preset, rows in found.items():
            if row.label in rows:
                cells = _cells(table, *rows[row.label], with_preset(args, preset))
                lines.append([row.label, f"measured, {preset}", *cells])
    names = ["seconds", "GB per device"] if table.kind == "training" else ["seconds"]
    header = [f"{steps} steps" for steps in table.columns] or names
    captions = [_caption(preset, rows) for preset, rows in found.items()]
    if args.scale == "digits":
        captions.append("Digits and short trainings: a test of the procedure, not of the papers' claims.")
    text = markdown_table(["", "", *header], lines)
    return f"# {table.title}\n\n{text}\n\n{' '.join([*captions, table.note])}".rstrip() + "\n"


def _cells(table: Table, row: TableRow, results: dict, args: argparse.Namespace) -> list[str]:
    if table.kind in ("training", "sampling"):
        return costs_of(table, row, args)
    return ["–" if value is None else f"{value:.2f}" for value in measured(table, row, results, args.preset)]


def _caption(preset: str, rows: dict[str, tuple[TableRow, dict]]) -> str:
    _, results = next(iter(rows.values()))
    provenance = results["provenance"]
    return f"Preset {preset}, {PRESETS[preset]}: {provenance['metric']}, {provenance['num_images']:,} images."


def plot_curves(table: Table, results: dict[str, dict], args: argparse.Namespace) -> "Figure":
    """Plots the measured values as solid lines, in the same colour the printed ones dashed and those of the other
    preset dotted.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    found = finished_rows(results, args)
    for row in table.rows:
        ours = np.array(measured(table, row, results[row.label], args.preset), float)
        (line,) = axes.plot(table.columns, ours, marker="o", label=row.label)
        for preset in found.keys() - {args.preset}:
            if row.label in found[preset]:
                other = np.array(measured(table, *found[preset][row.label], preset), float)
                axes.plot(table.columns, other, linestyle=":", marker=".", color=line.get_color())
        if row.paper and args.scale == "full":
            axes.plot(table.columns, row.paper, linestyle="--", color=line.get_color())
    axes.set(xlabel="sampling steps", ylabel="distance", xscale="log", yscale="log")
    axes.set_title(f"{table.title}, preset {args.preset}")
    axes.set_xticks(table.columns, table.columns)
    axes.minorticks_off()
    axes.legend()
    return figure


def print_plan(table: Table, args: argparse.Namespace) -> None:
    """Prints every command of a table, and the printed values."""
    for row in table.rows:
        print(f"\n{row.label}:\n  {shlex.join(['python', *train_command(table, row, args)[1:]])}")
        if row.paper:
            print("  printed: " + ", ".join(map(str, row.paper)))
    for command in image_commands(table, args) if table.kind in _IMAGE_KINDS else []:
        print()
        print_command(command)
    if table.note:
        print(f"\n{table.note}")


def reproduce(args: argparse.Namespace) -> None:
    """Runs one table, or prints its plan.

    Raises:
      UserError: if a command fails, or for curves without matplotlib.
    """
    table = scaled(TABLES[args.table], args)
    training, sampling = gpu_hours(table, args)
    print(f"{table.title}\npreset {args.preset}: {PRESETS[args.preset]}")
    print(
        f"at least {training:.1f} hours of training and {sampling:.1f} of sampling on one H100, by arithmetic alone; a "
        "train step of CIFAR-10's UNet was measured at 3.3 times its arithmetic"
    )
    if args.dry_run:
        print_plan(table, args)
        return
    if table.kind in ("curves", "illustration"):
        check_matplotlib("the figure")
    if table.kind == "illustration":
        _save(plot_illustration(), args)
        print(table.note)
        return
    rows = iterate_with_eta(table.rows, remaining_hours(table, args))
    results = {row.label: run_row(table, row, args) for row in rows}
    for label, found in results.items():
        say_gaps(label, found)
    if table.kind == "curves":
        _save(plot_curves(table, results, args), args)
    if table.kind != "gap":
        text = table_text(table, results, args)
        path = Path(args.out) / f"{args.table}.md"
        write_atomic(path, text)
        print(f"\n{text}\ntable: {path}")
    for command in image_commands(table, args) if table.kind in _IMAGE_KINDS else []:
        print_command(command)
        if run_command(command, sys.stdout):
            raise UserError("the command above failed and reports the reason; fix it and rerun to resume")


def _save(figure: "Figure", args: argparse.Namespace) -> None:
    path = Path(args.out) / f"{args.table}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    print(f"figure: {path}")


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("finished runs are stored, and the same command resumes"), report_user_errors():
        args = parse(argv)
        if args.table:
            reproduce(args)
        else:
            print("\n".join(f"{name:12s} {table.title}" for name, table in TABLES.items()))
            print("\n".join(f"{name:12s} not reproduced: {why}" for name, why in NOT_REPRODUCED.items()))


if __name__ == "__main__":
    main()
