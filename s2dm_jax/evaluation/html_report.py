"""One HTML page about one run or several, with everything in it: readable anywhere, without a network."""

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2dm_jax.common.version import __version__
from s2dm_jax.evaluation.comparison import Evaluated, comparison_table, plot_distances, read_evaluated
from s2dm_jax.workdir.results import flat_provenance, results_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .provenance td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img, figure svg { max-width: 100%; height: auto; }
figcaption, .small { color: #555; font-size: .9rem; } summary { cursor: pointer; }
"""


def report_page(workdirs: Sequence[str]) -> str:
    """The page: distances by evaluations, and for each run its table, pictures, curves and provenance.

    Args:
      workdirs: folders of evaluated runs, at least one.

    Raises:
      UserError: as `comparison.read_evaluated`.
    """
    runs = read_evaluated(workdirs)
    title = workdirs[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) > 1:
        parts += ["<h2>Compared</h2>", _markdown(comparison_table(runs))]
    parts.append(
        _figure(_svg(plot_distances(runs)), "Distance against network evaluations, lower is better.")
    )
    for run in runs:
        parts += _about(run)
    parts.append(f"<p class=small>s2dm_jax {__version__}</p>")
    return (
        f"<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _about(run: Evaluated) -> list[str]:
    parts = [f"<h2>{html.escape(run.workdir)}</h2>"]
    loss = {
        name.removeprefix("loss."): value for name, value in run.fields.items() if name.startswith("loss.")
    }
    said = ", ".join(f"{name} {value}" for name, value in loss.items() if value is not None)
    told = f"{run.results['step']:,} steps, training seed {run.fields['train.seed']}; loss: {said}."
    parts.append(f"<p>{html.escape(told)}</p>")
    parts.append(_markdown(f"{results_table(run.results)}\n{run.results['provenance']['metric']}."))
    grids = sorted(Path(run.workdir, "samples").glob("step_*.png"))
    if grids:
        picture = base64.b64encode(grids[-1].read_bytes()).decode()
        step = int(grids[-1].stem.removeprefix("step_"))
        caption = f"Samples at step {step:,}, the newest of the training."
        parts.append(_figure(f"<img alt='samples' src='data:image/png;base64,{picture}'>", caption))
    curves = _loss_curves(Path(run.workdir, "metrics.jsonl"))
    if curves:
        parts.append(_figure(curves, "Loss and its terms as training went, logarithmic."))
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in flat_provenance(run.results["provenance"]).items()
    )
    fields = html.escape(json.dumps(run.fields, indent=1))
    parts.append(
        f"<h3>What the numbers depend on</h3><div class=wide><table class=provenance>{lines}</table></div>"
    )
    parts.append(f"<details><summary>Config</summary><pre>{fields}</pre></details>")
    return parts


def _markdown(text: str) -> str:
    """A Markdown table, and the line below it, as HTML."""
    lines = [line for line in text.splitlines() if line]
    table = [re.split(r"(?<!\\)\|", line.strip("| ")) for line in lines if line.startswith("|")]
    header, _, *rows = [[html.escape(cell.strip().replace("\\|", "|")) for cell in row] for row in table]
    below = " ".join(line for line in lines if not line.startswith("|"))
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    return (
        f"<div class=wide><table><tr>{head}</tr>{body}</table></div><p class=small>{html.escape(below)}</p>"
    )


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _loss_curves(path: Path) -> str:
    if not path.exists():
        return ""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in ("loss", "simple", "skip", "sa"):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="mean over the steps since the point before")
    axes.grid(alpha=0.3)
    axes.legend()
    return _svg(figure)


def _svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Letters as paths, so that they look alike everywhere; no date, so that equal runs give equal pages.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "s2dm_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
