"""The results of an evaluation: as a table, as files, and averaged over several runs."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.config.metrics import METRICS, Column


def results_cells(results: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of `evaluate`'s results, one column for each metric that was computed."""
    provenance = results["provenance"]
    distance, score = provenance.get("distance", "Fréchet distance"), provenance.get("score", "score")
    columns = [column for metric in METRICS.values() for column in metric.columns]
    columns = [column for column in columns if any(column.value in row for row in results["rows"])]
    titles = [column.title.format(distance=distance, score=score) for column in columns]
    rows = []
    for row in results["rows"]:
        cells = [_cell(column, row) for column in columns]
        normalized = f"{100 * row['normalized']:.1f}" if "normalized" in row else "–"
        rows.append([row["name"], str(row["nfe"] or "–"), *cells, normalized])
    return ["sampler", "NFE", *titles, "above the floor, noise = 100"], rows


def _cell(column: Column, row: dict) -> str:
    if column.value not in row:
        return "–"
    text = f"{column.scale * row[column.value]:.{column.digits}f}"
    return f"{text} ± {column.scale * row[column.error]:.{column.digits}f}" if column.error else text


def results_table(results: dict) -> str:
    """`results_cells` as a Markdown table."""
    return markdown_table(*results_cells(results))


def bound_cells(results: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of the table of the bound over all timesteps, which `evaluation.bits_per_dim` measured."""
    bound, rows = results["bits_per_dim"], []
    for name, values in bound["variances"].items():
        decoder, *others = values["terms"]
        whole = f"{values['bits_per_dim']:.3f} ± {values['bits_per_dim_se']:.3f}"
        rows.append([name, whole, f"{bound['prior']:.4f}", f"{sum(others):.3f}", f"{decoder:.3f}"])
    title = (
        f"Bits per dimension of {results['provenance']['bits_per_dim']['images']}, all {bound['timesteps']:,} timesteps"
    )
    return title, ["variance", "bits/dim", "L_T", "L_1 … L_T−1", "L_0"], rows


def bound_text(results: dict) -> str:
    """`bound_cells` as a paragraph and a Markdown table; "" if there is no bound."""
    if "bits_per_dim" not in results:
        return ""
    title, header, rows = bound_cells(results)
    return f"\n\n{title}:\n\n{markdown_table(header, rows)}"


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


def results_files(workdir: str | os.PathLike, name: str) -> list[Path]:
    """What `write_results` writes."""
    stems = Path(workdir) / "evaluations" / name, Path(workdir) / "results"
    return [stem.with_name(f"{stem.name}{suffix}") for stem in stems for suffix in (".md", ".json")]


def write_results(workdir: str | os.PathLike, results: dict, name: str) -> Path:
    """Writes `workdir`/evaluations/NAME.json and .md, the same as `workdir`/results.json and .md; returns the first."""
    provenance, files = results["provenance"], results_files(workdir, name)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    lines = [results_table(results), f"{provenance['metric']}.{bound_text(results)}", ""]
    lines += [f"- {key}: {value}" for key, value in flat_provenance(provenance).items()]
    texts = {".md": "\n".join(lines) + "\n", ".json": json.dumps(results, indent=1) + "\n"}
    for file in files:
        write_atomic(file, texts[file.suffix])
    return files[1]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (divided by n − 1; None for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
