"""A figure of each finding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from findings import numbers
from findings.pieces import Piece, split_arm
from findings.table import EVALUATIONS, Finding
from sweeps.report import Mean

from s2dm_jax.common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _HEIGHT_OF_LINE = 12, 5.0, 0.16
# Of a legend, in heights of its panel.
_BELOW = -0.12
_MARKERS = "osv^D<>Ph*"


def draw(finding: Finding, pieces: Sequence[Piece], results: Mapping[str, dict], path: Path) -> bool:
    """Writes the figure of a finding to a .png; False where none of its pairs is measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = numbers.values_of(finding, pieces, results)
    if not values or (finding.kind == "distances" and not numbers.differences(finding, values)):
        return False
    lines = (max(len(values), len(finding.pairs)) + 1) // 2
    figure, panels = plt.subplots(1, 2, figsize=(_WIDTH, _HEIGHT + _HEIGHT_OF_LINE * lines), layout="constrained")
    if finding.kind == "distances":
        columns = numbers.columns_of(values)
        _points(panels[0], columns, {_short(arm): found for arm, found in numbers.means(values).items()})
        panels[0].set(title="mean over the seeds ± standard error", ylabel=_quantity(finding, results))
        if finding.quantity == "frechet_distance":
            panels[0].set_yscale("log")
        paired = numbers.differences(finding, values)
        _points(panels[1], columns, {f"{_short(a)} − {_short(b)}": found for (a, b), found in paired.items()})
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set(title="difference seed by seed ± standard error", ylabel="below 0: the first is better")
    else:
        _curves(panels, finding, numbers.curves_of(finding, pieces, results), values)
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="x-small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, _BELOW))
    figure.suptitle(finding.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
    return True


def _quantity(finding: Finding, results: Mapping[str, dict]) -> str:
    if finding.quantity != "frechet_distance":
        return finding.quantity.replace("_", " ")
    return next((found["distance"] for found in results.values() if "distance" in found), "Fréchet distance")


def _short(arm: str) -> str:
    """An arm in few letters, as "ddpm × s(10)" for a scaled output."""
    training, evaluation = split_arm(arm)
    skip = EVALUATIONS[evaluation].fields.get("skip_scale")
    return f"{training} × s({skip})" if skip else training


def _points(panel: "Axes", columns: Sequence[str], series: Mapping[str, Mapping[str, Mean]]) -> None:
    """Means with standard errors at evenly spaced columns, each series a little beside the others."""
    for number, (label, found) in enumerate(series.items()):
        shift = 0.3 * (number / max(len(series) - 1, 1) - 0.5)
        x = [columns.index(column) + shift for column in columns if column in found]
        y = [found[column] for column in columns if column in found]
        errors = [mean.error or 0.0 for mean in y]
        line = "-" if columns[0].isdecimal() else ""
        style = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4, "linewidth": 0.8, "capsize": 2}
        panel.errorbar(x, [mean.mean for mean in y], errors, label=label, color=_color(number), linestyle=line, **style)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_xlabel("network evaluations per image" if columns[0].isdecimal() else "sampler")
    if not columns[0].isdecimal():
        panel.tick_params(axis="x", rotation=20, labelsize="x-small")


def _curves(panels: Sequence["Axes"], finding: Finding, curves: Mapping[str, Any], values: numbers.Values) -> None:
    """A quantity along the training or the sampling; beside it where it starts and ends, or the ratios at the end."""
    for number, (arm, curve) in enumerate(curves.items()):
        for series in curve.by_seed.values():
            panels[0].plot(curve.x, series, color=_color(number), linewidth=0.5, alpha=0.3)
        panels[0].plot(curve.x, curve.mean, color=_color(number), label=_short(arm))
    columns, is_gap = numbers.columns_of(values), finding.kind == "gap"
    if is_gap:
        ratios = numbers.ratios(finding, values)
        _points(panels[1], columns, {f"{_short(b)} / {_short(a)}": found for (a, b), found in ratios.items()})
        panels[1].axhline(1, color="black", linewidth=0.8)
    else:
        _points(panels[1], columns, {_short(arm): found for arm, found in numbers.means(values).items()})
    panels[1].set_xlabel("")
    if finding.expected:
        low, high = finding.expected
        for panel in panels[is_gap:]:
            panel.axhspan(low, high * (1.01 if low == high else 1), color="tab:red", alpha=0.3, label="the paper")
    if is_gap:
        panels[0].set(xlabel="timestep t", ylabel="total gap (rms), pixels in [−1, 1]", ylim=(0, None))
        panels[0].invert_xaxis()
        panels[1].set(title="gap of the one / gap of the other, at the end", ylim=(0, None))
    else:
        panels[0].set(xlabel="train step", ylabel=finding.quantity.replace("_", " ").replace("/", " / "), yscale="log")
        panels[1].set(title="mean over the seeds ± standard error", yscale="log")


def _color(number: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["tab20"](number % 20)
