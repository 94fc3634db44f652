"""Which numbers an evaluation is to have: methods × budgets, and the metrics. No jax, as `methods.py`."""

from typing import NamedTuple

import numpy as np

from s2dm_jax.methods import FACTS, GRID_NAMES, OPTIONS, plan

FEATURES = ("auto", "inception", "classifier")
REFERENCES = ("auto", "train", "held_out")
METRICS = ("fid", "kid", "is", "pr", "fid_inf")
# Names that the papers use for one of ours.
_ALIASES = {"pndm": "f_pndm"}


class Cell(NamedTuple):
    """One line of a table.

    Attributes:
      method: one of `methods.FACTS`.
      nfe: network evaluations.
      grid: one of `methods.GRID_NAMES`.
      options: the method's keyword arguments that are not its defaults.
    """

    method: str
    nfe: int
    grid: str
    options: dict

    @property
    def name(self) -> str:
        """The method with its options, as a table has it: "ddim, eta 1"."""
        said = {} if self.grid == "uniform" else {"grid": self.grid}
        return ", ".join([self.method, *(f"{key} {value}" for key, value in (said | self.options).items())])

    def timesteps(self, T: int) -> np.ndarray:
        """The levels [S] that it visits, ascending; for the grid "optimal" as many others."""
        return plan(T, self.method, nfe=self.nfe, grid=self.grid, **self.options)


def names_in(text: str) -> list[str]:
    """The names in "a,b, c"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def plan_cells(T: int, fields: dict) -> tuple[list[Cell], list[str]]:
    """The cells that a config's group `eval` asks for.

    A budget that suits one method and not another, as 10 evaluations DDIM and not F-PNDM, leaves a gap. An
    option holds for those of the methods that have it.

    Args:
      T: number of levels.
      fields: the group as a dict.

    Returns:
      The cells, method by method, and one sentence for each gap.

    Raises:
      ValueError: for an unknown or repeated method, an option that no method has, a budget that suits no
        method, a method that no budget suits. The message begins with the name of a field.
    """
    methods = [_ALIASES.get(name, name) for name in names_in(fields["methods"])]
    for name in methods:
        if name not in FACTS:
            raise ValueError(f"methods={fields['methods']!r} names {name!r}; there are {', '.join(FACTS)}")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods={fields['methods']!r} must name at least one method, none of them twice")
    if fields["grid"] not in GRID_NAMES:
        raise ValueError(f"grid={fields['grid']!r} is not known; choose one of {', '.join(GRID_NAMES)}")
    if fields["grid"] == "optimal" and any(FACTS[name].needs != "ms_eps" for name in methods):
        raise ValueError(f"grid='optimal' is only for analytic, not for methods={fields['methods']!r}")
    given = {name: fields[name] for name in OPTIONS if fields[name] is not None}
    if fields["eta"]:
        given["eta"] = fields["eta"]
    for name, value in given.items():
        if not any(name in FACTS[method].options for method in methods):
            have = ", ".join(method for method, facts in FACTS.items() if name in facts.options)
            raise ValueError(f"{name}={value!r} is no option of {', '.join(methods)}, only of {have}")
    cells, gaps = [], {}
    for method in methods:
        options = {name: value for name, value in given.items() if name in FACTS[method].options}
        for nfe in fields["nfe"]:
            cell = Cell(method, nfe, fields["grid"], options)
            try:
                cell.timesteps(T)
                cells.append(cell)
            except ValueError as error:
                gaps[method, nfe] = str(error)
    for wanted, found in ((methods, {c.method for c in cells}), (fields["nfe"], {c.nfe for c in cells})):
        for one in wanted:
            if one not in found:
                raise ValueError(next(why for cell, why in gaps.items() if one in cell))
    return cells, [f"no {method} at {nfe}: {why}" for (method, nfe), why in gaps.items()]


def metrics_in(text: str) -> list[str]:
    """The metrics that "fid,kid" names, in the order of METRICS; "fid" is always among them.

    Raises:
      ValueError: for an unknown one.
    """
    named = names_in(text)
    for name in named:
        if name not in METRICS:
            raise ValueError(f"metrics={text!r} names {name!r}; there are {', '.join(METRICS)}")
    return [name for name in METRICS if name in named or name == "fid"]
