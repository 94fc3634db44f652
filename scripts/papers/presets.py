"""What `--preset` changes: the equations of the papers, or what their authors' code does, which made the printed
numbers.

`args` are the parsed flags of `scripts/reproduce.py`.
"""

import argparse

from papers.types import Model, TableRow

# The default first.
PRESETS = {
    "released": "the authors' code, which produced the printed numbers",
    "paper": "the papers' equations",
}
# Timesteps of every config here.
T = 1000


def with_preset(args: argparse.Namespace, preset: str) -> argparse.Namespace:
    """The same flags with another preset."""
    return argparse.Namespace(**{**vars(args), "preset": preset})


def model_of(model: Model, args: argparse.Namespace) -> Model:
    """The model under the preset: the papers write nothing of an EMA, so that all start alike."""
    return model if args.preset == "released" else model._replace(ema_start="initial")


def released_fields(row: TableRow, args: argparse.Namespace) -> dict[str, dict]:
    """The config fields, by group, in which the authors' code differs from the papers' equations; empty for `paper`.

    The reduction over pixels follows from the objective's own preset.
    """
    if args.preset != "released":
        return {}
    evaluation = dict(row.released)
    # The digits are compared in a classifier's features, which have no Inception to resize for.
    if args.scale == "full":
        evaluation["inception_resize"] = "pytorch_fid"
    if row.variance_head:
        return {"variance_head": {"dropout": True}, "eval": evaluation}
    train = {"ema_start": row.model.ema_start}
    return {"loss": {"preset": "released", "antithetic": True}, "train": train, "eval": evaluation}


def workdir_parts(model: Model, args: argparse.Namespace) -> list[str]:
    """The preset's part of a workdir's name: empty for `paper`."""
    return ["released", f"ema_{model.ema_start}"] if args.preset == "released" else []


def sampling_steps(row: TableRow, steps: int, preset: str) -> int:
    """The sampling steps behind a column: DDIM's code takes every ⌊T/steps⌋-th timestep, which are 500 for 400."""
    if preset == "released" and row.options.get("timestep_spacing") == "uniform":
        return len(range(0, T, T // steps))
    return steps
