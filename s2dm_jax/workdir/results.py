"""The results of an evaluation as tables, on the disk, and over several runs."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table

# Names in a row, and what stands over and in their column.
_COLUMNS = {
    "kid": ("KID × 1000", lambda row: f"{1e3 * row['kid']:.2f} ± {1e3 * row['kid_se']:.2f}"),
    "inception_score": (
        "{score}",
        lambda row: f"{row['inception_score']:.2f} ± {row['inception_score_std']:.2f}",
    ),
    "precision": ("precision", lambda row: f"{row['precision']:.3f}"),
    "recall": ("recall", lambda row: f"{row['recall']:.3f}"),
    "fid_infinity": (
        "{distance}, N → ∞",
        lambda row: f"{row['fid_infinity']:.2f} ± {row['fid_infinity_se']:.2f}",
    ),
}


def results_table(results: dict) -> str:
    """The rows of `evaluate` as a Markdown table."""
    names = results["provenance"]
    distance = names.get("distance", "Fréchet distance")
    others = [name for name in _COLUMNS if any(name in row for row in results["rows"])]
    titles = [_COLUMNS[name][0].format(distance=distance, score=names.get("score")) for name in others]
    header = ["sampler", "NFE", distance, *titles, "above the floor, noise = 100"]
    rows = [
        [
            row["name"],
            row["nfe"] or "–",
            f"{row['frechet_distance']:.2f}",
            *(_COLUMNS[name][1](row) if name in row else "–" for name in others),
            f"{100 * row['normalized']:.1f}",
        ]
        for row in results["rows"]
    ]
    return markdown_table(header, rows)


def results_page(results: dict) -> str:
    """The table, and below it all that the numbers depend on, as Markdown."""
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
    """Mean, and standard deviation (divided by n − 1), which a single value does not have."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
