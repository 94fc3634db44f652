"""Results of several runs side by side: runs grouped over seeds, distances by NFE."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import flatten
from s2dm_jax.workdir.load import read_config
from s2dm_jax.workdir.results import mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Results that differ in one of these are not comparable. The features say all that the metric's sentence does.
_COMPARABLE = ("features", "reference", "num_images", "seed")


class Evaluated(NamedTuple):
    """A run with its newest results.

    Attributes:
      workdir: its folder, as in the user's command.
      fields: {"group.name": value} of the config's fields that change the trained network, and "step".
      results: of results.json.
    """

    workdir: str
    fields: dict
    results: dict


class Series(NamedTuple):
    """One curve of a plot: a sampler on the runs that differ only in their training seed.

    Attributes:
      name: the config fields that distinguish it from the other curves, and the sampler.
      workdirs: the runs, one for each seed.
      points: (NFE, mean, standard deviation or None), by NFE.
    """

    name: str
    workdirs: list[str]
    points: list[tuple[int, float, float | None]]


def read_evaluated(workdirs: Sequence[str]) -> list[Evaluated]:
    """The runs with their newest results.

    Raises:
      UserError: for a folder without a run or results, a repeated folder, or results that cannot be compared.
    """
    if len({str(Path(name).resolve()) for name in workdirs}) < len(workdirs):
        raise UserError(f"a workdir appears twice in {' '.join(workdirs)}; give each only once")
    runs = []
    for workdir in workdirs:
        fields = flatten(read_config(workdir))
        path = Path(workdir) / "results.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            rows, _ = results["rows"], results["provenance"]["metric"]
        except FileNotFoundError as error:
            raise UserError(f"{workdir} has no results.json; run --mode=evaluate --workdir={workdir} first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not readable as results ({error}); evaluate the run again") from error
        if not all("frechet_distance" in row for row in (rows[0], rows[-1])):
            raise UserError(f"{path} has no distance for real images or noise (its notes say why); leave out {workdir}")
        trained = {name: value for name, value in fields.items() if not FIELDS[name].resumable}
        runs.append(Evaluated(workdir, {**trained, "step": results["step"]}, results))
    for run in runs[1:]:
        for name in _COMPARABLE:
            one, other = _differing(*(evaluated.results["provenance"].get(name) for evaluated in (runs[0], run)))
            if one != other:
                raise UserError(
                    f"{runs[0].workdir} and {run.workdir} were evaluated with different {name}: {one} and "
                    f"{other}; evaluate both with the same settings"
                )
    return runs


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Two values, of two dicts only the entries that differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return {name: one.get(name) for name in names}, {name: other.get(name) for name in names}


def series_of(runs: Sequence[Evaluated]) -> list[Series]:
    """Distances of every sampler on every group of runs, mean and standard deviation over training seeds."""
    groups = defaultdict(list)
    for run in runs:
        settings = json.dumps({name: value for name, value in run.fields.items() if name != "train.seed"})
        groups[settings].append(run)
    labels = _differences([json.loads(settings) for settings in groups])
    samplers = dict.fromkeys(row["name"] for run in runs for row in run.results["rows"] if row["nfe"])
    series = []
    for label, members in zip(labels, groups.values(), strict=True):
        if len({run.fields["train.seed"] for run in members}) < len(members):
            raise UserError(
                f"{' and '.join(run.workdir for run in members)} have the same train.seed and config; give only one of "
                "them"
            )
        for sampler in samplers:
            rows = [(run.workdir, row) for run in members for row in run.results["rows"] if row["name"] == sampler]
            distances = defaultdict(list)  # by NFE
            for _, row in rows:
                if "frechet_distance" in row:
                    distances[row["nfe"]].append(row["frechet_distance"])
            if distances:
                points = [(nfe, *mean_and_spread(values)) for nfe, values in sorted(distances.items())]
                workdirs = list(dict.fromkeys(workdir for workdir, _ in rows))
                series.append(Series(", ".join(filter(None, (label, sampler))), workdirs, points))
    return series


def comparison_cells(runs: Sequence[Evaluated]) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and caption of the table of `series_of`'s points; the caption holds the anchors."""
    series = series_of(runs)
    budgets = sorted({nfe for each in series for nfe, *_ in each.points})
    rows = []
    for each in series:
        cells = {nfe: f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}") for nfe, mean, sd in each.points}
        rows.append([each.name, str(len(each.workdirs)), *(cells.get(nfe, "–") for nfe in budgets)])
    metric = runs[0].results["provenance"]["metric"]
    floor, *_, ceiling = (row["frechet_distance"] for row in runs[0].results["rows"])
    caption = f"{metric}, by NFE; real images (floor) {floor:.2f}, noise (ceiling) {ceiling:.2f}."
    return ["run, sampler", "seeds", *map(str, budgets)], rows, caption


def plot_distances(runs: Sequence[Evaluated]) -> "Figure":
    """A matplotlib figure: distance against NFE, both axes logarithmic; mean and standard deviation over seeds."""
    results = runs[0].results
    distance = results["provenance"].get("distance", "Fréchet distance")
    return plot_series(series_of(runs), results["rows"][0]["frechet_distance"], distance)


def plot_series(series: Sequence[Series], floor: float | None, label: str) -> "Figure":
    """The figure of `plot_distances`, of any series with their spread as error bars; `floor` None: no line of it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for each in series:
        nfe, means, spreads = zip(*each.points, strict=True)
        seeds = f" ({len(each.workdirs)} seeds)" if len(each.workdirs) > 1 else ""
        axes.errorbar(nfe, means, yerr=[sd or 0 for sd in spreads], marker="o", capsize=3, label=each.name + seeds)
    budgets = sorted({nfe for each in series for nfe, *_ in each.points})
    if floor is not None:
        axes.axhline(floor, color="0.5", linestyle="--", linewidth=1, label="real images")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(budgets, map(str, budgets))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set(xlabel="NFE, network evaluations per image", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _differences(configs: list[dict]) -> list[str]:
    """For each config its values of the fields in which the configs differ: "loss.skip=10, loss.K=1"."""
    fields = dict.fromkeys(name for config in configs for name in config)
    differing = [name for name in fields if len({json.dumps(config.get(name)) for config in configs}) > 1]
    return [", ".join(f"{name}={config.get(name)}" for name in differing) for config in configs]
