"""The results of an evaluation: as a table, as files, and averaged over several runs."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.config.evaluation_plan import METRICS, Column


def results_cells(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of `evaluate`'s results, one column for each metric that was computed."""
    provenance = results["provenance"]
    names = {
        "distance": provenance.get("distance", "Fréchet distance"),
        "score": provenance.get("score", "score"),
    }
    columns = [
        column
        for metric in METRICS.values()
        for column in metric.columns
        if any(column.value in row for row in results["rows"])
    ]
    titles = [column.title.format(**names) for column in columns]
    header = ["sampler", "NFE", *titles, "above the floor, noise = 100"]
    rows = [
        [
            row["name"],
            str(row["nfe"] or "–"),
            *(_cell(column, row) for column in columns),
            f"{100 * row['normalized']:.1f}",
        ]
        for row in results["rows"]
    ]
    return header, rows


def _cell(column: Column, row: dict) -> str:
    if column.value not in row:
        return "–"
    text = f"{column.scale * row[column.value]:.{column.digits}f}"
    return f"{text} ± {column.scale * row[column.error]:.{column.digits}f}" if column.error else text


def results_table(results: dict) -> str:
    """`results_cells` as a Markdown table."""
    return markdown_table(*results_cells(results))


def results_page(results: dict) -> str:
    """The table and the provenance of its numbers, as Markdown."""
    provenance = results["provenance"]
    lines = [results_table(results), f"{provenance['metric']}.", ""]
    lines += [f"- {name}: {value}" for name, value in flat_provenance(provenance).items()]
    return "\n".join(lines) + "\n"


def flat_provenance(provenance: dict) -> dict[str, str]:
    """The provenance as lines of text: groups become "group: name", lists are joined."""
    flat: dict[str, str] = {}
    for name, value in provenance.items():
        if isinstance(value, dict):
            flat |= {f"{name}: {key}": str(inner) for key, inner in value.items()}
        elif isinstance(value, list):
            flat |= {name: "; ".join(map(str, value))} if value else {}
        else:
            flat[name] = str(value)
    return flat


def write_results(workdir: str | os.PathLike, results: dict, name: str) -> Path:
    """Writes `workdir`/evaluations/NAME.json and .md, and the same as `workdir`/results.json and .md.

    Returns:
      The first of the four.
    """
    folder = Path(workdir) / "evaluations"
    folder.mkdir(exist_ok=True)
    text, page = json.dumps(results, indent=1) + "\n", results_page(results)
    for stem in (folder / name, Path(workdir) / "results"):
        write_atomic(stem.with_name(f"{stem.name}.md"), page)
        write_atomic(stem.with_name(f"{stem.name}.json"), text)
    return folder / f"{name}.json"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (divided by n − 1; None for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
