"""Results of several runs side by side: which are seeds of one another, distances by evaluations."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import flatten
from s2dm_jax.workdir.load import read_config
from s2dm_jax.workdir.results import mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Results that differ in one of these are not in one unit.
_SAME = ("metric", "features", "reference", "num_images", "seed")


class Evaluated(NamedTuple):
    """A run with its newest results.

    Attributes:
      workdir: its folder, as the user named it.
      fields: its config as {"group.name": value}, without what does not change the trained network.
      results: of results.json.
    """

    workdir: str
    fields: dict
    results: dict


class Series(NamedTuple):
    """One line of a plot: a sampler on the runs that differ in nothing but their training seed.

    Attributes:
      name: what distinguishes it from the other lines.
      workdirs: the runs, one for each seed.
      points: (network evaluations, mean, standard deviation or None), by evaluations.
    """

    name: str
    workdirs: list[str]
    points: list[tuple[int, float, float | None]]


def read_evaluated(workdirs: Sequence[str]) -> list[Evaluated]:
    """The runs in `workdirs` with the results that were written last.

    Raises:
      UserError: for a folder without a run or results, one named twice, or results that cannot be compared.
    """
    if len({str(Path(name).resolve()) for name in workdirs}) < len(workdirs):
        raise UserError(f"one workdir is named twice in {' '.join(workdirs)}; give each once")
    runs = []
    for workdir in workdirs:
        fields = flatten(read_config(workdir))
        path = Path(workdir) / "results.json"
        try:
            results = json.loads(path.read_text())
            results["rows"], results["provenance"]["metric"]
        except FileNotFoundError as error:
            raise UserError(
                f"{workdir} has no results.json; run --mode=evaluate --workdir={workdir} first"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no results of ours ({error}); evaluate the run again") from error
        trained = {name: value for name, value in fields.items() if not FIELDS[name].resumable}
        runs.append(Evaluated(workdir, {**trained, "step": results["step"]}, results))
    for run in runs[1:]:
        for name in _SAME:
            one, other = (each.results["provenance"].get(name) for each in (runs[0], run))
            if one != other:
                raise UserError(
                    f"{runs[0].workdir} and {run.workdir} were evaluated with different {name}: {one} and "
                    f"{other}; evaluate both alike"
                )
    return runs


def series_of(runs: Sequence[Evaluated]) -> list[Series]:
    """Distances of every sampler on every kind of run, mean and standard deviation over training seeds."""
    kinds: dict[str, list[Evaluated]] = {}
    for run in runs:
        kind = json.dumps({name: value for name, value in run.fields.items() if name != "train.seed"})
        kinds.setdefault(kind, []).append(run)
    names = _names([json.loads(kind) for kind in kinds])
    series = []
    samplers = list(dict.fromkeys(row["name"] for run in runs for row in _sampled(run)))
    for name, members in zip(names, kinds.values(), strict=True):
        if len({run.fields["train.seed"] for run in members}) < len(members):
            raise UserError(
                f"{' and '.join(run.workdir for run in members)} share one train.seed and config; give one"
            )
        for sampler in samplers:
            distances: dict[int, list[float]] = {}
            for run in members:
                for row in _sampled(run):
                    if row["name"] == sampler:
                        distances.setdefault(row["nfe"], []).append(row["frechet_distance"])
            if distances:
                points = [(nfe, *mean_and_spread(values)) for nfe, values in sorted(distances.items())]
                label = ", ".join(part for part in (name, sampler) if part)
                series.append(Series(label, [run.workdir for run in members], points))
    return series


def comparison_table(runs: Sequence[Evaluated]) -> str:
    """The points of `series_of` as a Markdown table, with the anchors below."""
    series = series_of(runs)
    budgets = sorted({nfe for each in series for nfe, *_ in each.points})
    rows = []
    for each in series:
        cells = {nfe: f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}") for nfe, mean, sd in each.points}
        rows.append([each.name, len(each.workdirs), *(cells.get(nfe, "–") for nfe in budgets)])
    provenance = runs[0].results["provenance"]
    floor, *_, ceiling = (row["frechet_distance"] for row in runs[0].results["rows"])
    table = markdown_table(["run, sampler", "seeds", *map(str, budgets)], rows)
    anchors = f"real images (floor) {floor:.2f}, noise (ceiling) {ceiling:.2f}"
    return f"{table}\n{provenance['metric']}, by network evaluations; {anchors}.\n"


def plot_distances(runs: Sequence[Evaluated]) -> "Figure":
    """A matplotlib figure: distance against network evaluations, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for each in series_of(runs):
        nfe, means, spreads = zip(*each.points, strict=True)
        seeds = f" ({len(each.workdirs)} seeds)" if len(each.workdirs) > 1 else ""
        axes.errorbar(
            nfe, means, yerr=[sd or 0 for sd in spreads], marker="o", capsize=3, label=each.name + seeds
        )
    budgets = sorted({nfe for each in series_of(runs) for nfe, *_ in each.points})
    floor = runs[0].results["rows"][0]["frechet_distance"]
    axes.axhline(floor, color="0.5", linestyle="--", linewidth=1, label="real images")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(budgets, map(str, budgets))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set(
        xlabel="network evaluations per image",
        ylabel=runs[0].results["provenance"].get("distance", "Fréchet distance"),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _sampled(run: Evaluated) -> list[dict]:
    return [row for row in run.results["rows"] if row["nfe"]]


def _names(kinds: list[dict]) -> list[str]:
    """For each config what sets it apart from the others: "loss.skip=10, loss.K=1"."""
    fields = dict.fromkeys(name for kind in kinds for name in kind)
    apart = [name for name in fields if len({json.dumps(kind.get(name)) for kind in kinds}) > 1]
    return [", ".join(f"{name}={kind.get(name)}" for name in apart) for kind in kinds]
