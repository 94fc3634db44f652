"""The report of a sweep: means over seeds with standard errors, paired differences, as tables, data and a plot."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sweeps.plan import Run

from s2dm_jax.common.files import atomic_path, write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.config.metrics import METRICS, Column
from s2dm_jax.evaluation.comparison import Series, plot_series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = [column for metric in METRICS.values() for column in metric.columns]


class Row(NamedTuple):
    """A row of the tables: what is compared, but for the seed and the NFE."""

    objective: str
    values: tuple[tuple[str, str], ...]
    sampler: str

    @property
    def label(self) -> str:
        """The row's label, as in "s2_10, train.lr=0.001, ddim, quadratic"."""
        return ", ".join([self.objective, *(f"{name}={value}" for name, value in self.values), self.sampler])


class Mean(NamedTuple):
    """Mean over `n` seeds and its standard error, s/√n with s divided by n − 1; None for a single seed."""

    mean: float
    error: float | None
    n: int

    def cell(self, column: Column, sign: str = "") -> str:
        """As in a table: "8.79 ± 0.12"."""
        digits = f".{column.digits}f"
        text = f"{column.scale * self.mean:{sign}{digits}}"
        return text if self.error is None else f"{text} ± {column.scale * self.error:{digits}}"


# {row: {NFE: {seed: value}}} of a metric.
Measured = dict[Row, dict[int, dict[int, float]]]


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of at least one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.mean(values), error, len(values))


def measured(runs: Sequence[Run], results: Mapping[str, dict], key: str) -> Measured:
    """The values of a key of the results' rows, as "frechet_distance"; the anchors, which have no NFE, are left out."""
    found: Measured = {}
    order = list(dict.fromkeys(map(_group, runs)))
    for run in sorted(runs, key=lambda run: order.index(_group(run))):
        for line in results[run.name]["rows"] if run.name in results else []:
            if line["nfe"] and key in line:
                row = Row(*_group(run), line["name"])
                found.setdefault(row, {}).setdefault(line["nfe"], {})[run.seed] = line[key]
    return found


def _group(run: Run) -> tuple[str, tuple[tuple[str, str], ...]]:
    return run.objective, tuple(run.values.items())


def differences(values: Measured, first: Run) -> dict[tuple[Row, Row], dict[int, Mean]]:
    """Each row less that of the first run's objective with the same fields, seed by seed; of one objective, less that
    of its fields.

    Runs of one seed begin with the same weights and see the same batches, so that what they share cancels.
    """
    objective, fields = _group(first)
    several = any(row.objective != objective for row in values)
    found: dict[tuple[Row, Row], dict[int, Mean]] = {}
    for row, by_nfe in values.items():
        base = row._replace(objective=objective) if several else row._replace(values=fields)
        if base not in values:
            # A sampler that is named by the fields that are varied has no other of its name.
            (base, *others), own = [each for each in values if each[:2] == base[:2]] or [row], row[:2]
            if others or sum(each[:2] == own for each in values) > 1:
                continue
        if base == row:
            continue
        for nfe, by_seed in by_nfe.items():
            other = values[base].get(nfe, {})
            if paired := [value - other[seed] for seed, value in by_seed.items() if seed in other]:
                found.setdefault((row, base), {})[nfe] = mean_of(paired)
    return found


def tables(runs: Sequence[Run], results: Mapping[str, dict]) -> str:
    """The tables of every metric as Markdown, a row for each objective, combination of fields and sampler."""
    parts = []
    for column in _COLUMNS:
        values = measured(runs, results, column.value)
        if values:
            parts += _tables_of(column, values, runs, results)
    return "\n\n".join(parts)


def _tables_of(column: Column, values: Measured, runs: Sequence[Run], results: Mapping[str, dict]) -> list[str]:
    provenance = next(iter(results.values()))["provenance"]
    title = column.title.format(
        distance=provenance.get("distance", "Fréchet distance"), score=provenance.get("score", "score")
    )
    budgets = sorted({nfe for by_nfe in values.values() for nfe in by_nfe})
    fields = [name for name, _ in next(iter(values)).values]
    seeds = len({run.seed for run in runs})
    rows = []
    for row, by_nfe in values.items():
        cells = [mean_of(list(by_nfe[nfe].values())).cell(column) if nfe in by_nfe else "–" for nfe in budgets]
        counts = sorted({len(by_seed) for by_seed in by_nfe.values()})
        found = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        count = found if counts == [seeds] else f"{found} of {seeds}"
        rows.append([row.objective, *(value for _, value in row.values), row.sampler, count, *cells])
    table = markdown_table(["objective", *fields, "sampler", "seeds", *map(str, budgets)], rows)
    parts = [f"## {title}", f"By NFE: mean over the seeds{' ± its standard error' if seeds > 1 else ''}.", table]
    if paired := differences(values, runs[0]):
        lines = [
            [
                f"{row.label} less {_base_name(row, base)}",
                *(by_nfe[nfe].cell(column, "+") if nfe in by_nfe else "–" for nfe in budgets),
            ]
            for (row, base), by_nfe in paired.items()
        ]
        caption = "Differences seed by seed" + (": mean ± its standard error." if seeds > 1 else ".")
        parts += [caption, markdown_table(["difference", *map(str, budgets)], lines)]
    return parts


def _base_name(row: Row, base: Row) -> str:
    if row.objective != base.objective:
        return base.objective
    return ", ".join(f"{name}={value}" for name, value in base.values)


def long_rows(runs: Sequence[Run], results: Mapping[str, dict]) -> list[dict[str, Any]]:
    """Every number by itself: run, objective, varied fields, seed, sampler, NFE, metric, value; the anchors too."""
    rows = []
    for run in runs:
        for line in results[run.name]["rows"] if run.name in results else []:
            for column in _COLUMNS:
                if column.value in line:
                    fixed = {"run": run.name, "objective": run.objective, **run.values, "seed": run.seed}
                    number = {"metric": column.value, "value": line[column.value]}
                    rows.append(
                        {
                            **fixed,
                            "step": results[run.name]["step"],
                            "sampler": line["name"],
                            "nfe": line["nfe"],
                            **number,
                        }
                    )
    return rows


def summary(runs: Sequence[Run], results: Mapping[str, dict], failures: Mapping[str, str]) -> dict[str, Any]:
    """The report as plain data: means and paired differences with standard errors, failures, all numbers."""
    means, paired = [], []
    for column in _COLUMNS:
        values = measured(runs, results, column.value)
        for row, by_nfe in values.items():
            for nfe, by_seed in sorted(by_nfe.items()):
                means.append(
                    {**_plain(row), "metric": column.value, "nfe": nfe, **_numbers(mean_of(list(by_seed.values())))}
                )
        for (row, base), found in differences(values, runs[0]).items():
            for nfe, mean in sorted(found.items()):
                paired.append(
                    {**_plain(row), "less": _base_name(row, base), "metric": column.value, "nfe": nfe, **_numbers(mean)}
                )
    return {"means": means, "differences": paired, "failures": dict(failures), "values": long_rows(runs, results)}


def _plain(row: Row) -> dict[str, Any]:
    return {"objective": row.objective, **dict(row.values), "sampler": row.sampler}


def _numbers(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.mean, "standard_error": mean.error, "seeds": mean.n}


def report_text(runs: Sequence[Run], results: Mapping[str, dict], failures: Mapping[str, str]) -> str:
    """The report in Markdown: tables, what the distances mean, failed and missing runs."""
    lines = [f"# Sweep of {len(runs)} runs"]
    if results:
        lines.append(tables(runs, results))
        found = {each["provenance"]["metric"]: each for each in results.values()}
        for metric, one in found.items():
            ends = [row.get("frechet_distance", math.nan) for row in (one["rows"][0], one["rows"][-1])]
            lines.append(
                f"{metric}; {one['provenance']['num_images']:,} images; real images (floor) {ends[0]:.2f}, noise "
                f"(ceiling) {ends[1]:.2f}; s2dm_jax {one['provenance'].get('s2dm_jax')}, "
                f"{one['provenance'].get('device')}."
            )
        lines += _notes(results)
    missing = [run.name for run in runs if run.name not in results and run.name not in failures]
    if failures:
        lines.append("Failed:\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in failures.items()))
    if missing:
        lines.append("Not finished: " + ", ".join(missing))
    return "\n\n".join(lines) + "\n"


def _notes(results: Mapping[str, dict]) -> list[str]:
    """The notes of all results as one list, and which results have others, whose numbers differ from run to run."""
    found = {name: each["provenance"]["notes"] for name, each in results.items()}
    shared = [note for note in next(iter(found.values())) if all(note in notes for notes in found.values())]
    others = [name for name, notes in found.items() if set(notes) - set(shared)]
    more = [f"{len(others)} runs have further notes, in results/: {', '.join(others)}"] if others else []
    lines = "\n".join(f"- {note}" for note in shared + more)
    return [lines] if lines else []


def plot(runs: Sequence[Run], results: Mapping[str, dict]) -> "Figure":
    """A matplotlib figure: mean distance ± standard error against NFE, both axes logarithmic."""
    series = []
    for row, by_nfe in measured(runs, results, "frechet_distance").items():
        means = {nfe: mean_of(list(by_seed.values())) for nfe, by_seed in sorted(by_nfe.items())}
        seeds = {str(seed) for by_seed in by_nfe.values() for seed in by_seed}
        series.append(Series(row.label, sorted(seeds), [(nfe, mean.mean, mean.error) for nfe, mean in means.items()]))
    one = next(iter(results.values()))
    distance = one["provenance"].get("distance", "Fréchet distance")
    return plot_series(series, one["rows"][0].get("frechet_distance"), f"{distance}, mean ± standard error")


def write_report(out: Path, runs: Sequence[Run], results: Mapping[str, dict], failures: Mapping[str, str]) -> str:
    """Writes report.md, report.csv and report.json to the sweep's folder; returns the Markdown."""
    text = report_text(runs, results, failures)
    write_atomic(out / "report.md", text)
    write_atomic(out / "report.json", json.dumps(summary(runs, results, failures), indent=1) + "\n")
    rows = long_rows(runs, results)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["run"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "report.csv", buffer.getvalue())
    return text


def write_plot(out: Path, runs: Sequence[Run], results: Mapping[str, dict]) -> Path:
    """Writes the plot, report.png."""
    path = out / "report.png"
    with atomic_path(path) as temporary:
        plot(runs, results).savefig(temporary, dpi=150)
    return path
