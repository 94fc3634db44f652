"""Trains and evaluates what a table or figure of the papers needs; prints their figures beside ours."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from s2dm_jax.config import UserError, from_json
from s2dm_jax.methods import num_evaluations
from s2dm_jax.papers import Line, Model, Table
from s2dm_jax.papers_s2 import TABLES as S2_TABLES
from s2dm_jax.papers_sa import TABLES as SA_TABLES

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

# Multiply-adds of one forward pass in G (shared/spec/design.md; the digits' network in configs/digits.py) and
# the batch of a training step.
_COST = {
    "cifar10": (6.222, 128),
    "celeba64": (24.05, 128),
    "celebahq256": (248.5, 24),
    "digits": (0.0131, 64),
}
_INCEPTION_COST = 5.5
# An H100 in bfloat16, measured (shared/spec/design.md).
_TFLOPS = 790e12
_PICTURES = ("grid", "rows", "interpolation", "gap")
_DIGITS_STEPS = 200
_DIGITS_LONGEST = 800_000
_DIGITS_MOST = 20
_DIGITS_IMAGES = 100


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for a table that does not exist, or a value out of range.
    """
    parser = argparse.ArgumentParser(
        description=_DESCRIPTION, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


def scaled(table: Table, args: argparse.Namespace) -> Table:
    """The table as it is, or on the digits with short trainings, few steps and few images."""
    if args.scale == "full":
        return table
    longest = args.steps or _DIGITS_STEPS

    def model(of):
        steps = max(1, round(longest * min(1, of.steps / _DIGITS_LONGEST)))
        return of._replace(dataset="digits", steps=steps, flip=False)

    columns = [steps for steps in table.columns if steps <= _DIGITS_MOST] or [_DIGITS_MOST] * bool(
        table.columns
    )
    lines = tuple(line._replace(model=model(line.model)) for line in table.lines)
    return table._replace(columns=tuple(columns), lines=lines)


def images_of(args: argparse.Namespace) -> int:
    """Images in a cell."""
    return args.images or (_DIGITS_IMAGES if args.scale == "digits" else 50_000)


def workdir_of(model: Model, args: argparse.Namespace) -> Path:
    """The folder of the run, named by all that it is."""
    parts = [model.dataset, model.schedule, f"skip{model.skip}", f"K{model.K}", f"lam{model.lam:g}"]
    parts += [f"flip{int(model.flip)}", f"seed{args.seed}", f"steps{model.steps}"]
    return Path(args.out) / "runs" / "_".join(parts)


def budgets(table: Table, line: Line) -> dict[int, int]:
    """Network evaluations by sampling steps, of the steps that the method can make."""
    found = {}
    for steps in table.columns:
        try:
            found[steps] = num_evaluations(line.method, steps)
        except ValueError:
            continue
    return found


def command_of(table: Table, line: Line, args: argparse.Namespace) -> list[str]:
    """The command that trains the line's model, if it is not there, and evaluates it."""
    model = line.model
    train = {"seed": args.seed, "steps": model.steps}
    if args.scale == "digits":
        train |= {"log_every": 20, "sample_every": model.steps, "checkpoint_every": model.steps}
    loss = {"skip": model.skip, "K": model.K, "lam": model.lam}
    evaluation = {
        "methods": line.method,
        "nfe": ",".join(map(str, budgets(table, line).values())) or 10,
        "metrics": "fid,is" if table.kind == "is" else "fid",
        "num_images": images_of(args),
        **line.options,
    }
    if args.scale == "digits" and line.method == "analytic":
        evaluation["ms_eps_images"] = 10
    groups = {"train": train, "loss": loss, "eval": evaluation, "diffusion": {"schedule": model.schedule}}
    groups["data"] = {"random_flip": model.flip}
    flags = [
        f"--config.{group}.{name}={value}"
        for group, fields in groups.items()
        for name, value in fields.items()
    ]
    main = [sys.executable, "-m", "s2dm_jax.main", f"--config=configs/{model.dataset}.py:ddpm"]
    return [*main, f"--workdir={workdir_of(model, args)}", *flags]


def gpu_hours(table: Table, args: argparse.Namespace) -> tuple[float, float]:
    """Hours on one H100 for training and for evaluating, of the arithmetic alone: a floor."""
    models = {line.model for line in table.lines}

    def done_before(model):
        alike = (other.steps for other in models if other._replace(steps=model.steps) == model)
        return max((steps for steps in alike if steps < model.steps), default=0)

    training = 0
    for model in models:
        macs, batch = _COST[model.dataset]
        training += 3 * 2e9 * macs * batch * model.K * (model.steps - done_before(model))
    images = images_of(args)
    sampling = sum(
        2e9 * images * (_COST[line.model.dataset][0] * nfe + _INCEPTION_COST)
        for line in table.lines
        if not line.head
        for nfe in budgets(table, line).values()
    )
    return training / _TFLOPS / 3600, sampling / _TFLOPS / 3600


def run_line(table: Table, line: Line, args: argparse.Namespace) -> dict:
    """Trains and evaluates, unless that was done, and returns the results.

    Raises:
      UserError: where the command fails.
    """
    command = command_of(table, line, args)
    name = "".join(c if c.isalnum() else "_" for c in line.label)
    kept = Path(args.out) / "results" / args.table / f"{name}_{_digest(command)}.json"
    if not kept.exists():
        workdir = workdir_of(line.model, args)
        _continue_a_shorter_one(line.model, workdir, args)
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{line.label}: the command above failed and says why; the same command goes on")
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        temporary.write_text((workdir / "results.json").read_text())
        temporary.replace(kept)
    return json.loads(kept.read_text())


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


def picture_commands(table: Table, args: argparse.Namespace) -> list[list[str]]:
    """The commands that make a figure's pictures from its runs, which print where they leave them."""
    workdirs = [str(workdir_of(line.model, args)) for line in table.lines]
    if table.kind == "gap":
        out = Path(args.out) / f"{args.table}.png"
        return [[sys.executable, "scripts/estimation_gap.py", *dict.fromkeys(workdirs), f"--out={out}"]]
    main, commands = [sys.executable, "-m", "s2dm_jax.main", "--mode=sample"], []
    rows = table.kind == "rows"
    for line, workdir in list(zip(table.lines, workdirs, strict=True))[: 1 if rows else None]:
        said = {name: value for name, value in line.options.items() if name in ("eta", "grid")}
        said |= {"method": line.method, "num_images": 8 if rows or table.kind == "interpolation" else 64}
        if rows:
            said["compare"] = ",".join(other for other in dict.fromkeys(workdirs) if other != workdir)
        if table.kind == "interpolation":
            said["interpolate"] = 11
        for nfe in budgets(table, line).values():
            fields = {**said, "nfe": nfe}
            flags = [f"--config.sample.{name}={value}" for name, value in fields.items()]
            commands.append([*main, f"--workdir={workdir}", *flags])
    return commands


def seconds_of(table: Table, line: Line, args: argparse.Namespace) -> list[str]:
    """What a table of times holds for a line: seconds per training step, or for sampling all images."""
    workdir = workdir_of(line.model, args)
    if table.kind == "training":
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        batch = from_json((workdir / "config.json").read_text()).train.batch_size
        return [f"{batch / last['images_per_second']:.4f}"]
    cells = [json.loads(path.read_text()) for path in (workdir / "evaluations" / "cells").glob("*.json")]
    seconds = {
        (cell["depends_on"]["cell"]["nfe"], cell["depends_on"]["num_images"]): cell["seconds"]
        for cell in cells
        if "cell" in cell["depends_on"]
    }
    images = images_of(args)
    return [f"{seconds[nfe, images]:.1f}" for nfe in budgets(table, line).values()]


def table_text(table: Table, results: dict[str, dict | None], args: argparse.Namespace) -> str:
    """The papers' figures and ours, a pair of rows for each line; None stands for what cannot be had."""
    from s2dm_jax.report import markdown_table

    unit = "is" if table.kind == "is" else "distance"
    rows = []
    for line in table.lines:
        if line.paper and args.scale == "full":
            rows.append([line.label, "paper", *line.paper])
        found, of = results[line.label], budgets(table, line)
        if found is None:
            cells = ["–"] * max(1, len(table.columns))
        elif table.kind in ("training", "sampling"):
            cells = seconds_of(table, line, args)
        else:
            measured = {row["evaluations"]: row[unit] for row in found["rows"] if row["evaluations"]}
            cells = [
                f"{measured[of[steps]]:.2f}" if of.get(steps) in measured else "–" for steps in table.columns
            ]
        rows.append([line.label, "ours", *cells])
    header = [f"{steps} steps" for steps in table.columns] or ["seconds"]
    text = markdown_table(["", "", *header], rows)
    provenance = next((found["provenance"] for found in results.values() if found), None)
    below = f"{provenance['metric']}, {provenance['num_images']:,} images. " if provenance else ""
    if args.scale == "digits":
        below += "Digits and short trainings: a test of the way, not of the claims. "
    heads = sorted({line.head for line in table.lines if line.head})
    if heads:
        below += f"Not made: {' and '.join(heads)}, which need second heads. "
    return f"# {table.title}\n\n{text}\n\n{below}{table.note}".rstrip() + "\n"


def reproduce(args: argparse.Namespace) -> None:
    """Runs or prints the plan of one table.

    Raises:
      UserError: where a command fails.
    """
    table = scaled(TABLES[args.table], args)
    pictures = picture_commands(table, args) if table.kind in _PICTURES else []
    training, sampling = gpu_hours(table, args)
    print(
        f"{table.title}\nat least {training:.1f} hours of training and {sampling:.1f} of sampling on one H100"
    )
    if args.dry_run:
        for line in table.lines:
            print(f"\n{line.label}: " + ("needs a second head, left out" if line.head else ""))
            if not line.head:
                print("  " + " ".join(command_of(table, line, args)[1:]))
            if line.paper:
                print("  paper: " + ", ".join(map(str, line.paper)))
        for command in pictures:
            print("\n" + " ".join(command[1:]))
        return
    results = {line.label: None if line.head else run_line(table, line, args) for line in table.lines}
    if table.kind != "gap":
        text = table_text(table, results, args)
        path = Path(args.out) / f"{args.table}.md"
        path.write_text(text)
        print(f"\n{text}\ntable: {path}")
    for command in pictures:
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command).returncode:
            raise UserError("the command above failed and says why; the same command goes on")


def main(argv: list[str] | None = None) -> None:
    """Entry point: a `UserError` becomes one sentence and exit status 2."""
    try:
        args = parse(argv)
        if args.table:
            reproduce(args)
        else:
            print("\n".join(f"{name:12s} {table.title}" for name, table in TABLES.items()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
