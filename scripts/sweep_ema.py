"""Evaluates a trained run at many EMA lengths, and plots the distances; docs/training.md has an example."""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from s2dm_jax.common.cli import Parser, check_matplotlib, path_argument
from s2dm_jax.common.compilation_cache import set_compilation_cache
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path, check_writable, write_atomic
from s2dm_jax.common.jax_environment import check_jax_environment
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config.ema import EmaChoice, decay_name, has_rampup, main_decay, parse_choice, sigma_rel_name
from s2dm_jax.config.validate import check_config, check_evaluation_files
from s2dm_jax.workdir.folder import check_same_images, evaluation_folder
from s2dm_jax.workdir.load import ema_of_run, read_config
from s2dm_jax.workdir.paths import checkpoint_steps

_DESCRIPTION = """\
Evaluates power-function EMAs of several relative widths, synthesised from the snapshots that a run has stored
(train.ema_sigma_rel), beside the EMAs that it has tracked and its weights without an average. Prints a table of
Frechet distances (as --mode=evaluate measures them), and writes it with its numbers and a plot to
WORKDIR/evaluations/ema_sweep.md, .json and .png. Measured points are cached: rerun the same command to resume."""
_EXAMPLE = """\
example:
  python scripts/sweep_ema.py runs/digits_ema --sigma-rel=0.03,0.05,0.1,0.15,0.2"""
_WIDTHS = "0.02,0.03,0.05,0.07,0.1,0.15,0.2,0.25"


class Job(NamedTuple):
    """One row of the table.

    Attributes:
      step: training steps; None for the newest checkpoint.
      ema: as in `config.eval.ema`.
    """

    step: int | None
    ema: str


class Row(NamedTuple):
    """What was measured of a `Job`.

    Attributes:
      step: training steps.
      ema: as in `config.eval.ema`.
      sigma_rel: relative width of the average's profile; 0 for the weights themselves, None for a ramp-up.
      distances: of each column, None for a gap.
      notes: of the evaluation.
    """

    step: int
    ema: str
    sigma_rel: float | None
    distances: list[float | None]
    notes: list[str]


def _numbers(flag: str, text: str, kind: type) -> list:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError as error:
        example = "350,700" if kind is int else "0.05,0.1"
        raise UserError(f"--{flag}={text} is out of range: it must be numbers such as {example}") from error
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--{flag}={text} has a number twice; give each once")
    return numbers


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, ConfigDict, list[Job]]:
    """Reads the command line: its arguments, the run's config with the requested evaluation, the rows.

    Raises:
      UserError: for a value that is not allowed, a run without such EMAs, or a missing matplotlib.
    """
    parser = Parser(_DESCRIPTION, _EXAMPLE)
    folder = path_argument("WORKDIR")
    parser.add_argument("workdir", metavar="WORKDIR", type=folder, help="folder of a training run")
    parser.add_argument("--sigma-rel", default=_WIDTHS, help="relative widths, comma-separated (default: %(default)s)")
    parser.add_argument("--steps", default="", help="train steps, comma-separated (default: the newest checkpoint)")
    parser.add_argument("--samplers", default="", help="samplers, comma-separated (default: the run's eval.samplers)")
    parser.add_argument("--nfe", default="", help="network evaluations, comma-separated (default: the run's eval.nfe)")
    parser.add_argument("--images", type=int, help="number of images per row (default: the run's eval.num_images)")
    parser.add_argument(
        "--out", default="", type=path_argument("--out"), help="folder to write to (default: the run's)"
    )
    args = parser.parse_args(argv)
    config = read_config(args.workdir)
    config.eval.samplers = args.samplers or config.eval.samplers
    if args.nfe:
        config.eval.nfe = tuple(_numbers("nfe", args.nfe, int))
    if args.images is not None:
        config.eval.num_images = args.images
    check_config(config, trained=True)
    check_evaluation_files(config)
    jobs = list(_jobs(args, config))
    check_matplotlib("the plot")
    place = evaluation_folder(args.workdir, args.out) / "evaluations"
    check_writable([place, place / "points"], "give --out=DIR to write elsewhere")
    return args, config, jobs


def _jobs(args: argparse.Namespace, config: ConfigDict) -> Iterator[Job]:
    widths = [sigma_rel_name(width) for width in _numbers("sigma-rel", args.sigma_rel, float)]
    saved = checkpoint_steps(args.workdir)
    for step in _numbers("steps", args.steps, int) if args.steps else [None]:
        for ema in widths:
            ema_of_run(args.workdir, config, ema, step)
            yield Job(step, ema)
        # Of a step without a checkpoint there are the snapshots alone.
        for ema in ("", *map(decay_name, config.train.ema_decays), "weights") if step in (None, *saved) else ():
            yield Job(step, ema)


def width_of_decay(decay: float, updates: int) -> float:
    """The standard deviation of the profile of an EMA with a constant decay, relative to the length of the training."""
    age = np.arange(updates)
    weights = np.float64(decay) ** age
    weights /= weights.sum()
    mean = weights @ age
    return float(np.sqrt(weights @ (age - mean) ** 2) / updates)


def _width(choice: EmaChoice, train: ConfigDict, step: int) -> float | None:
    if choice.kind == "weights":
        return 0.0
    if choice.kind == "main" and has_rampup(train):
        return None
    decay = main_decay(train) if choice.kind == "main" else choice.value
    return choice.value if choice.kind == "sigma_rel" else width_of_decay(decay, step)


def measure(args: argparse.Namespace, config: ConfigDict, jobs: list[Job]) -> tuple[list[str], list[Row], dict]:
    """The columns, the rows and the newest results of `evaluate`."""
    from s2dm_jax.data.datasets import load_dataset
    from s2dm_jax.evaluation.checks import check_evaluation
    from s2dm_jax.evaluation.evaluate import evaluate
    from s2dm_jax.inference.model import load

    data = load_dataset(config)
    check_same_images(args.workdir, data.digest, data.labels_digest, record=False)
    check_evaluation(config, data)
    rows: list[Row] = []
    first, columns, results = None, [], {}
    for job in jobs:
        model = load(args.workdir, job.step, ema=job.ema)._replace(config=config)
        # What shares network and schedule shares the compiled samplers.
        first = first or model
        model = model._replace(network=first.network, schedule=first.schedule)
        print(f"{model.weights} at step {model.step:,}", flush=True)
        results = evaluate(model, data, args.workdir, args.out)
        sampled = [row for row in results["rows"] if row["nfe"]]
        suffix = f", {model.weights}" if model.ema else ""
        columns = [f"{row['name'].removesuffix(suffix)}, NFE {row['nfe']}" for row in sampled]
        distances = [row.get("frechet_distance") for row in sampled]
        width = _width(parse_choice(job.ema), config.train, model.step)
        rows.append(Row(model.step, job.ema, width, distances, results["provenance"]["notes"]))
    return columns, rows, results


def label(row: Row) -> str:
    """What a row is called in the table."""
    return parse_choice(row.ema).words if row.ema else "the run's EMA"


def table(columns: list[str], rows: list[Row]) -> str:
    """The distances in Markdown, the smallest of each column in bold."""
    present = [[row.distances[i] for row in rows if row.distances[i] is not None] for i in range(len(columns))]
    best = [min(values, default=None) for values in present]
    cells = []
    for row in rows:
        width = "–" if row.sigma_rel is None else f"{row.sigma_rel:.3g}"
        texts = ["–" if value is None else f"{value:.2f}" for value in row.distances]
        least = [value is not None and value == smallest for value, smallest in zip(row.distances, best, strict=True)]
        marked = [f"**{text}**" if is_least else text for text, is_least in zip(texts, least, strict=True)]
        cells.append([f"{row.step:,}", label(row), width, *marked])
    return markdown_table(["step", "weights", "relative width", *columns], cells)


def notes_of(rows: list[Row]) -> list[str]:
    """The notes of the rows; one that not all have, with the names of its rows before it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            found.setdefault(note, []).append(f"{label(row)} at step {row.step:,}")
    return [note if len(names) == len(rows) else f"{'; '.join(names)}: {note}" for note, names in found.items()]


def plot(columns: list[str], rows: list[Row], results: dict, path: Path) -> None:
    """Distance against relative width: a line for each column and step, the EMAs with a constant decay as crosses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    steps = list(dict.fromkeys(row.step for row in rows))
    for (i, column), step in itertools.product(enumerate(columns), steps):
        measured = [row for row in rows if row.step == step and row.distances[i] is not None and row.sigma_rel]
        curve = sorted((row.sigma_rel, row.distances[i]) for row in measured if "=" in row.ema)
        crosses = [(row.sigma_rel, row.distances[i]) for row in measured if "=" not in row.ema]
        name = column if len(steps) == 1 else f"{column}, step {step:,}"
        (line,) = axes.plot(*np.reshape(curve, (-1, 2)).T, marker="o", label=name)
        axes.plot(*np.reshape(crosses, (-1, 2)).T, marker="x", linestyle="", color=line.get_color())
    axes.plot([], marker="x", linestyle="", color="0.3", label="EMA with a constant decay")
    floor = results["rows"][0].get("frechet_distance")
    if floor is not None:
        # Far below the curves, a line would flatten them.
        axes.plot([], linestyle="", label=f"real images: {floor:.2f}")
    axes.set(xscale="log", yscale="log")
    for axis, locator in ((axes.xaxis, LogLocator(subs=(1, 2, 5))), (axes.yaxis, MaxNLocator(6))):
        axis.set_major_locator(locator)
        axis.set_major_formatter(FormatStrFormatter("%g"))
    axes.minorticks_off()
    distance = results["provenance"]["distance"]
    axes.set(xlabel="EMA length: standard deviation of its profile / length of the training", ylabel=distance)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def run(argv: list[str] | None) -> None:
    """Measures every row, then writes table, numbers and plot."""
    args, config, jobs = parse(argv)
    # Orbax logs with a traceback what it also raises.
    logging.set_verbosity(logging.FATAL)
    set_compilation_cache()
    check_jax_environment()
    columns, rows, results = measure(args, config, jobs)
    place = evaluation_folder(args.workdir, args.out) / "evaluations"
    place.mkdir(parents=True, exist_ok=True)
    provenance = {name: value for name, value in results["provenance"].items() if name not in ("weights", "notes")}
    numbers = {
        "workdir": args.workdir,
        "columns": columns,
        "rows": [row._asdict() for row in rows],
        "anchors": [results["rows"][end] for end in (0, -1)],
        "provenance": provenance,
    }
    notes = [f"note: {note}" for note in notes_of(rows)]
    text = "\n".join([table(columns, rows), f"{provenance['metric']}.", *notes])
    write_atomic(place / "ema_sweep.json", json.dumps(numbers, indent=1) + "\n")
    write_atomic(place / "ema_sweep.md", f"{text}\n")
    plot(columns, rows, results, place / "ema_sweep.png")
    print(f"\n{text}\nplot: {place / 'ema_sweep.png'}, numbers: {place / 'ema_sweep.json'}")


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors and signals are one sentence on stderr and exit status 2 or 128 + signal."""
    with end_on_signal("the rows measured so far are cached, and the same command resumes"), report_user_errors():
        run(argv)


if __name__ == "__main__":
    main()
