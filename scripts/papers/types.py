"""The data that describe a table or figure of a paper: the trained models, their samplers, the reported
values.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Model(NamedTuple):
    """A trained model.

    Attributes:
      dataset: name of a file in configs/, without its suffix.
      steps: train steps.
      skip, K, lam: parameters of the objective; 0, 1 and 0 for plain training.
      schedule: noise schedule.
      flip: whether training images are flipped horizontally at random.
      ema_start: weights that the EMA starts from in the authors' code, as `train.ema_start`.
    """

    dataset: str
    steps: int
    skip: int = 0
    K: int = 1
    lam: float = 0.0
    schedule: str = "linear"
    flip: bool = True
    ema_start: str = "initial"


class TableRow(NamedTuple):
    """One row of a table, or one image of a figure.

    Attributes:
      label: the paper's name for it, unique in its table.
      model: the model that is sampled.
      sampler: one of `specs.SAMPLERS`.
      options: the sampler's fields of the config group `eval`.
      paper: the reported value for each column; empty where the paper reports none.
      variance_head: "sn" or "npr" where the sampler needs a variance head on the model.
      released: further fields of the config group `eval` that the authors' code had, for `--preset=released`.
    """

    label: str
    model: Model
    sampler: str
    options: dict
    paper: tuple = ()
    variance_head: str = ""
    released: Mapping = MappingProxyType({})


class Table(NamedTuple):
    """A table or figure.

    Attributes:
      title: what it shows.
      kind: "fid" or "inception_score" (a table of that metric), "curves" (of FID), "grid" (samples),
        "compare" (the same noise through several models), "interpolation", "gap"
        (`scripts/estimation_gap.py`), "training" (seconds and memory of a step), "sampling" (seconds) or
        "illustration" (a figure without models).
      columns: numbers of sampling steps.
      rows: one for each model and sampler.
      note: what the paper leaves open, or what is done differently here.
    """

    title: str
    kind: str
    columns: tuple[int, ...]
    rows: tuple[TableRow, ...]
    note: str = ""


# Samplers with their options, on the timesteps of the DDIM and PNDM code.
_UNIFORM = {"timestep_spacing": "uniform"}
DDIM: tuple[str, dict] = ("ddim", _UNIFORM)
PNDM: tuple[str, dict] = ("f_pndm", _UNIFORM)
# DDIM with the posterior variance of DDPM: "one type of DDPM" in the DDIM code.
ETA_1: tuple[str, dict] = ("ddim", {**_UNIFORM, "eta": 1.0})
