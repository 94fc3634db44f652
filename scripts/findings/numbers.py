"""From the stored numbers of the pieces to means over the seeds and differences paired by seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from findings.pieces import Piece, arms_of, split_arm
from findings.table import EVALUATIONS, TRAININGS, Finding
from sweeps.report import Mean, mean_of

# Of the logged steps, those whose mean is given as that of the beginning and of the end.
_ENDS = 0.1

# {arm: {column: {seed: value}}}; a column is an NFE, or a sampler where several are evaluated at one.
Values = dict[str, dict[str, dict[int, float]]]


class Curve(NamedTuple):
    """A quantity along the training or the sampling: its mean over the seeds at each point, and each seed's own."""

    x: list[int]
    mean: list[float]
    by_seed: dict[int, list[float]]


def records_of(finding: Finding, pieces: Sequence[Piece], results: Mapping[str, dict], arm: str) -> dict[int, dict]:
    """The stored numbers of an arm by seed.

    Other findings may have more seeds of the same arm; without them, all means of this one are over the same seeds.
    """
    wanted = split_arm(arm)
    return {
        piece.seed: results[piece.name]
        for piece in pieces
        if (piece.training, piece.evaluation) == wanted and piece.seed < finding.seeds and piece.name in results
    }


def values_of(finding: Finding, pieces: Sequence[Piece], results: Mapping[str, dict]) -> Values:
    """The finding's quantity of each of its arms, by column and seed; what was not measured is left out."""
    values: Values = {}
    for arm in arms_of(finding):
        for seed, record in records_of(finding, pieces, results, arm).items():
            columns = _columns_along(record, finding) if finding.kind == "along" else _columns(record, finding, arm)
            for column, value in columns.items():
                values.setdefault(arm, {}).setdefault(column, {})[seed] = value
    return values


def _columns(record: dict, finding: Finding, arm: str) -> dict[str, float]:
    if finding.kind == "gap":
        return {"rms": record["rms"][-1], "rms of the mean": record["rms_of_mean"][-1]}
    if finding.quantity == "bits_per_dim":
        whole = record.get("bits_per_dim", {}).get("variances", {})
        return {f"all timesteps, {name} variance": bound["bits_per_dim"] for name, bound in whole.items()}
    several = "," in EVALUATIONS[split_arm(arm)[1]].fields.get("samplers", "")
    rows = [row for row in record["rows"] if row["nfe"] and finding.quantity in row]
    return {row["name"].split(", skip_scale")[0] if several else str(row["nfe"]): row[finding.quantity] for row in rows}


def _columns_along(record: dict, finding: Finding) -> dict[str, float]:
    series = along(record, finding.quantity)
    if not series:
        return {}
    ends = max(1, round(_ENDS * len(series)))
    whole = {"all": float(np.mean(series)), "least": min(series), "greatest": max(series)}
    return {"first tenth": float(np.mean(series[:ends])), "last tenth": float(np.mean(series[-ends:])), **whole}


def along(record: dict, quantity: str) -> list[float]:
    """A quantity at each logged step; "a/b" is a ratio; empty where it is not logged."""
    names = quantity.split("/")
    if any(name not in record.get("along", {}) for name in names):
        return []
    first, *rest = (record["along"][name] for name in names)
    return [a / b for a, b in zip(first, rest[0], strict=True)] if rest else first


def curves_of(finding: Finding, pieces: Sequence[Piece], results: Mapping[str, dict]) -> dict[str, Curve]:
    """The whole course of a quantity of each arm that has one, at the points that all seeds have.

    A training that was stopped has logged points of its own.
    """
    found = {}
    for arm in arms_of(finding):
        by_seed = {}
        for seed, record in records_of(finding, pieces, results, arm).items():
            if finding.kind == "gap":
                by_seed[seed] = dict(zip(record["t"], record[finding.quantity], strict=True))
            elif series := along(record, finding.quantity):
                by_seed[seed] = dict(zip(record["along"]["step"], series, strict=True))
        shared = [x for x in next(iter(by_seed.values()), {}) if all(x in points for points in by_seed.values())]
        if shared:
            series_of = {seed: [points[x] for x in shared] for seed, points in by_seed.items()}
            found[arm] = Curve(shared, np.mean(list(series_of.values()), axis=0).tolist(), series_of)
    return found


def means(values: Values) -> dict[str, dict[str, Mean]]:
    """Mean over the seeds with its standard error, by arm and column."""
    return {
        arm: {column: mean_of(list(by_seed.values())) for column, by_seed in columns.items()}
        for arm, columns in values.items()
    }


def differences(finding: Finding, values: Values) -> dict[tuple[str, str], dict[str, Mean]]:
    """a less b of every pair by column, seed by seed: mean and standard error over the seeds that have both.

    Runs of one seed begin with the same weights and see the same batches, so that what they share cancels.
    """
    return _paired(finding, values, lambda a, b: a - b)


def ratios(finding: Finding, values: Values) -> dict[tuple[str, str], dict[str, Mean]]:
    """b / a of every pair by column, seed by seed: by how much a has made b smaller."""
    return _paired(finding, values, lambda a, b: b / a if a else math.nan)


def _paired(finding, values, combine):
    found = {}
    for a, b in finding.pairs:
        if not b:
            continue
        for column, by_seed in values.get(a, {}).items():
            other = values.get(b, {}).get(column, {})
            if both := [combine(value, other[seed]) for seed, value in sorted(by_seed.items()) if seed in other]:
                found.setdefault((a, b), {})[column] = mean_of(both)
    return found


def columns_of(values: Values) -> list[str]:
    """All columns, NFE in ascending order, others as they were measured."""
    names = list(dict.fromkeys(column for columns in values.values() for column in columns))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def label_of(arm: str) -> str:
    """An arm in words, as in "ddpm, ε scaled (paper, skip 10)"."""
    training, evaluation = split_arm(arm)
    fields = EVALUATIONS[evaluation].fields
    if "skip_scale" not in fields:
        return training
    return f"{training}, ε scaled ({fields['skip_scale_preset']}, skip {fields['skip_scale']})"


def description_of(training: str, steps: int) -> str:
    """What a training differs in, as "1,400 steps, loss.reduction=mean"."""
    chosen = TRAININGS[training]
    fields = [f"{name}={value}" for name, value in chosen.fields.items()]
    return ", ".join([f"`{chosen.objective}`", f"{chosen.length * steps:,} steps", *fields])
