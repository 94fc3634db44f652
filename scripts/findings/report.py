"""The report of the runs finished so far: report.md, report.json, and a figure of each finding."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from findings import numbers
from findings.pieces import Piece, Request, arms_of, findings_of, split_arm
from findings.table import SKIPS, Finding
from sweeps.report import Mean

from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.config.metrics import METRICS, Column

_DIGITS = {"gap": 4, "along": 2}


def write_report(
    out: Path,
    request: Request,
    pieces: Sequence[Piece],
    results: Mapping[str, dict],
    failures: Mapping[str, str],
    figures: bool = True,
) -> str:
    """Writes report.md, report.json and figures/FINDING.png to the folder; returns the Markdown."""
    findings = findings_of(request.size)
    drawn = {}
    if figures:
        from findings.figures import draw

        for name, finding in findings.items():
            path = out / "figures" / f"{name}.png"
            if draw(finding, pieces, results, path):
                drawn[name] = path.relative_to(out).as_posix()
    text = report_text(request, pieces, results, failures, drawn)
    write_atomic(out / "report.md", text)
    content = {"request": request._asdict(), "findings": {n: summary(f, pieces, results) for n, f in findings.items()}}
    content |= {"failures": dict(failures), "made": len(results), "pieces": len(pieces), "where": where_of(results)}
    write_atomic(out / "report.json", json.dumps(content, indent=1) + "\n")
    return text


def summary(finding: Finding, pieces: Sequence[Piece], results: Mapping[str, dict]) -> dict[str, Any]:
    """The numbers of a finding as plain data."""
    values = numbers.values_of(finding, pieces, results)
    found = {
        "title": finding.title,
        "claim": finding.claim,
        "source": finding.source,
        "quantity": finding.quantity,
        "values": values,
        "means": _plain(numbers.means(values)),
        "differences": _plain({f"{a} less {b}": each for (a, b), each in numbers.differences(finding, values).items()}),
    }
    if finding.kind == "gap":
        found["ratios"] = _plain({f"{b} / {a}": each for (a, b), each in numbers.ratios(finding, values).items()})
    return found


def _plain(found: Mapping[str, Mapping[str, Mean]]) -> dict[str, Any]:
    return {
        key: {
            column: {"mean": mean.mean, "standard_error": mean.error, "seeds": mean.n}
            for column, mean in columns.items()
        }
        for key, columns in found.items()
    }


def where_of(results: Mapping[str, dict]) -> list[dict[str, Any]]:
    """The devices and commits of the numbers, with their count of pieces and seconds."""
    found: dict[tuple, list[float]] = {}
    names = ("device", "commit", "s2dm_jax", "jax")
    for record in results.values():
        found.setdefault(tuple(record.get(name) for name in names), []).append(record["seconds"])
    return [
        {**dict(zip(names, key, strict=True)), "pieces": len(seconds), "seconds": sum(seconds)}
        for key, seconds in found.items()
    ]


def report_text(
    request: Request,
    pieces: Sequence[Piece],
    results: Mapping[str, dict],
    failures: Mapping[str, str],
    figures: Mapping[str, str],
) -> str:
    """The report in Markdown: a section for each finding, then what is missing."""
    parts = [f"# Evidence, {request.preset}", _heading(request, pieces, results)]
    for name, finding in findings_of(request.size).items():
        parts += section(name, finding, request, pieces, results, figures.get(name))
    if failures:
        parts += ["## Failed", "\n".join(f"- {name}: {reason}" for name, reason in failures.items())]
    if missing := [piece.name for piece in pieces if piece.name not in results and piece.name not in failures]:
        parts += ["## Not finished", f"{len(missing)}: {', '.join(missing)}"]
    return "\n\n".join(parts) + "\n"


def _heading(request: Request, pieces: Sequence[Piece], results: Mapping[str, dict]) -> str:
    size = request.size
    lines = [
        f"{len(results)} of {len(pieces)} runs and evaluations; `{size.config}`, {size.steps:,} train steps, with "
    ]
    fields = [f"{name}={value}" for name, value in size.fields.items()]
    lines[0] += ", ".join(fields + [flag.removeprefix("--config.") for flag in request.fields]) + "."
    for one in where_of(results):
        lines.append(
            f"{one['pieces']} on {one['device']}: commit {one['commit'] or 'unknown'}, s2dm_jax {one['s2dm_jax']}, jax "
            f"{one['jax']}; {one['seconds'] / 3600:.2f} process hours."
        )
    if found := next((record for record in results.values() if "rows" in record), None):
        ends = [row.get("frechet_distance") for row in found["rows"] if row["nfe"] is None]
        shown = " and ".join(f"{end:.2f}" for end in ends if end is not None)
        lines.append(f"{found['metric']}; {found['num_images']:,} images; real images and noise are at {shown}.")
    return "\n".join(lines)


def section(
    name: str,
    finding: Finding,
    request: Request,
    pieces: Sequence[Piece],
    results: Mapping[str, dict],
    figure: str | None,
) -> list[str]:
    """The section of a finding: the claim, its figure, means, differences."""
    parts = [f"## {finding.title} (`{name}`)", f"> {finding.claim}\n>\n> — {finding.source}"]
    values = numbers.values_of(finding, pieces, results)
    if not values:
        return [*parts, "No run is finished yet."]
    if figure:
        parts.append(f"![{finding.title}]({figure})")
    columns, column = numbers.columns_of(values), _column(finding)
    parts += [
        _legend(finding, request),
        _caption(finding, values),
        _means_table(numbers.means(values), columns, column),
    ]
    if found := numbers.differences(finding, values):
        rows = {f"{numbers.label_of(a)} less {numbers.label_of(b)}": each for (a, b), each in found.items()}
        parts += ["Differences seed by seed, mean ± standard error:", _table("difference", rows, columns, column, "+")]
    if finding.kind == "gap":
        ratios = {
            f"{split_arm(b)[0]} / {split_arm(a)[0]}": each for (a, b), each in numbers.ratios(finding, values).items()
        }
        parts += ["Ratios seed by seed, mean ± standard error:", _table("ratio", ratios, columns, Column("", ""))]
    if finding.quantity == "loss_skip/loss_simple":
        parts.append(sqrt_alpha_skip_table())
    return parts


def _column(finding: Finding) -> Column:
    """How the quantity is written."""
    found = [column for metric in METRICS.values() for column in metric.columns if column.value == finding.quantity]
    return found[0] if found else Column(finding.quantity, finding.quantity, digits=_DIGITS.get(finding.kind, 2))


def _caption(finding: Finding, values: numbers.Values) -> str:
    counts = sorted({len(by_seed) for columns in values.values() for by_seed in columns.values()})
    seeds = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    what = {"distances": "by network evaluations or sampler", "gap": "at the end", "along": "of the logged steps"}
    text = f"`{finding.quantity}` {what[finding.kind]}: mean ± standard error over {seeds} of {finding.seeds} seeds"
    return f"{text}."


def _legend(finding: Finding, request: Request) -> str:
    trainings = dict.fromkeys(split_arm(arm)[0] for arm in arms_of(finding))
    return "\n".join(f"- {name}: {numbers.description_of(name, request.size.steps)}" for name in trainings)


def _means_table(means: Mapping[str, Mapping[str, Mean]], columns: Sequence[str], column: Column) -> str:
    return _table("run", {numbers.label_of(arm): found for arm, found in means.items()}, columns, column)


def _table(
    first: str, rows: Mapping[str, Mapping[str, Mean]], columns: Sequence[str], column: Column, sign: str = ""
) -> str:
    cells = [
        [label, *(found[name].cell(column, sign) if name in found else "–" for name in columns)]
        for label, found in rows.items()
    ]
    return markdown_table([first, *columns], cells)


def sqrt_alpha_skip_table() -> str:
    """√α_skip at the last timestep of the linear schedule, which S²-DMs set to 1 beside the step before."""
    from s2dm_jax.diffusion.objectives import alpha_skip
    from s2dm_jax.diffusion.schedule import linear_schedule

    schedule = linear_schedule()
    rows = [
        [skip, *(f"{alpha_skip(schedule, factors)[-1] ** 0.5:.3f}" for factors in (1, skip - 1, skip))]
        for skip in SKIPS
    ]
    header = ["skip", "√α_t", "√α_skip, released (skip − 1 factors)", "√α_skip, paper (skip factors)"]
    return "At the last timestep of the linear schedule:\n\n" + markdown_table(header, rows)


def headline(results: Mapping[str, dict], pieces: Sequence[Piece]) -> str:
    """The progress on one line."""
    seconds = sum(record["seconds"] for record in results.values())
    mean = statistics.mean(record["seconds"] for record in results.values()) if results else 0.0
    return f"{len(results)} of {len(pieces)} finished, {seconds:,.0f} s in total, {mean:.1f} s each"
