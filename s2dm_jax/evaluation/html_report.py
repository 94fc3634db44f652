"""One self-contained HTML page about one run or several: readable anywhere, without a network."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from s2dm_jax.common.files import read_json_lines
from s2dm_jax.common.version import __version__
from s2dm_jax.evaluation.comparison import Evaluated, comparison_cells, plot_distances, read_evaluated
from s2dm_jax.workdir.results import bound_cells, flat_provenance, results_cells

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
    """The HTML page: distances by NFE, and for each run its results, samples, loss curves and provenance."""
    runs = read_evaluated(workdirs)
    title = workdirs[0] if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) > 1:
        header, rows, caption = comparison_cells(runs)
        parts += ["<h2>Comparison</h2>", _table(header, rows, caption)]
    parts.append(_figure(_svg(plot_distances(runs)), "Distance against NFE; lower is better."))
    for run in runs:
        parts += _section(run)
    parts.append(f"<p class=small>s2dm_jax {__version__}</p>")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f"<!DOCTYPE html>\n<html lang=en><head>{head}</head>\n<body>{''.join(parts)}</body></html>\n"


def _section(run: Evaluated) -> list[str]:
    workdir, provenance = Path(run.workdir), run.results["provenance"]
    fields = {name: value for name, value in run.fields.items() if name.startswith("loss.") and value is not None}
    loss = ", ".join(f"{name.removeprefix('loss.')} {value}" for name, value in fields.items())
    summary = f"{run.results['step']:,} steps, training seed {run.fields['train.seed']}; loss: {loss}."
    parts = [f"<h2>{html.escape(run.workdir)}</h2>", f"<p>{html.escape(summary)}</p>"]
    parts.append(_table(*results_cells(run.results), f"{provenance['metric']}."))
    if "bits_per_dim" in run.results:
        title, header, lines = bound_cells(run.results)
        parts.append(_table(header, lines, f"{title}."))
    # `glob` takes a folder that may not be read for an empty one.
    folder = workdir / "samples"
    grids = sorted(path for path in folder.iterdir() if path.match("step_*.png")) if folder.is_dir() else []
    if grids:
        image = base64.b64encode(grids[-1].read_bytes()).decode()
        caption = f"Samples at step {int(grids[-1].stem.removeprefix('step_')):,}, the last ones saved in training."
        parts.append(_figure(f"<img alt='samples' src='data:image/png;base64,{image}'>", caption))
    log = workdir / "metrics.jsonl"
    if log.exists():
        curves = plot_losses(read_json_lines(log))
        parts.append(_figure(_svg(curves), "Loss and its terms during training, on a logarithmic scale."))
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in flat_provenance(provenance).items()
    )
    parts.append(f"<h3>Provenance</h3><div class=wide><table class=provenance>{rows}</table></div>")
    config = html.escape(json.dumps(run.fields, indent=1))
    parts.append(f"<details><summary>Config</summary><pre>{config}</pre></details>")
    return parts


def plot_losses(lines: Sequence[dict]) -> "Figure":
    """A matplotlib figure of the loss and its terms against the step, logarithmic, from the lines of metrics.jsonl."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for line in lines for name in line):
        # A "/" marks the loss of a group of timesteps.
        if name.startswith("loss") and "/" not in name:
            curve = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*curve, strict=True), label=name, linewidth=1.2)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="mean over the steps since the point before")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
    return f"{table}<p class=small>{html.escape(caption)}</p>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Letters as paths, so that they look alike everywhere; no date, so that equal runs give equal pages.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "s2dm_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
