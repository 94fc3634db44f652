"""Which numbers an evaluation is to have: samplers × budgets, and the metrics. No jax, as
`samplers/specs.py`.
"""

from typing import NamedTuple

import numpy as np

from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS
from s2dm_jax.samplers.timesteps import SPACINGS, TimestepSpec, plan_timesteps

FEATURES = ("auto", "inception", "classifier")

REFERENCES = ("auto", "train", "held_out")

METRICS = ("fid", "kid", "inception_score", "precision_recall", "fid_infinity")

# Names that the papers use for one of ours.
_ALIASES = {"pndm": "f_pndm"}


class EvalPoint(NamedTuple):
    """One line of a table.

    Attributes:
      sampler: one of `specs.SAMPLERS`.
      nfe: network evaluations.
      timestep_spacing: one of `timesteps.SPACINGS`.
      options: the sampler's keyword arguments that are not its defaults.
    """

    sampler: str
    nfe: int
    timestep_spacing: str
    options: dict

    @property
    def name(self) -> str:
        """The sampler with its options, as a table has it: "ddim, eta 1"."""
        said = {} if self.timestep_spacing == "uniform" else {"timestep_spacing": self.timestep_spacing}
        return ", ".join([self.sampler, *(f"{key} {value}" for key, value in (said | self.options).items())])

    def timesteps(self, T: int) -> np.ndarray:
        """The timesteps [S] that it visits, ascending; for the spacing "optimal" as many others."""
        spec = TimestepSpec(nfe=self.nfe, timestep_spacing=self.timestep_spacing)
        return plan_timesteps(T, self.sampler, spec, **self.options)


def split_names(text: str) -> list[str]:
    """The names in "a,b, c"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def plan_evaluation(T: int, fields: dict) -> tuple[list[EvalPoint], list[str]]:
    """The cells that a config's group `eval` asks for.

    A budget that suits one sampler and not another, as 10 evaluations DDIM and not F-PNDM, leaves a gap. An
    option holds for those of the samplers that have it.

    Args:
      T: number of levels.
      fields: the group as a dict.

    Returns:
      The cells, sampler by sampler, and one sentence for each gap.

    Raises:
      ValueError: for an unknown or repeated sampler, an option that no sampler has, a budget that suits no
        sampler, a sampler that no budget suits. The message begins with the name of a field.
    """
    samplers = [_ALIASES.get(name, name) for name in split_names(fields["samplers"])]
    for name in samplers:
        if name not in SAMPLERS:
            raise ValueError(
                f"samplers={fields['samplers']!r} names {name!r}; there are {', '.join(SAMPLERS)}"
            )
    if not samplers or len(set(samplers)) < len(samplers):
        raise ValueError(
            f"samplers={fields['samplers']!r} must name at least one sampler, none of them twice"
        )
    if fields["timestep_spacing"] not in SPACINGS:
        raise ValueError(
            f"timestep_spacing={fields['timestep_spacing']!r} is not known; choose one of "
            f"{', '.join(SPACINGS)}"
        )
    if fields["timestep_spacing"] == "optimal" and any(
        SAMPLERS[name].requires != "ms_eps" for name in samplers
    ):
        raise ValueError(
            f"timestep_spacing='optimal' is only for analytic, not for samplers={fields['samplers']!r}"
        )
    given = {name: fields[name] for name in OPTIONS if fields[name] is not None}
    if fields["eta"]:
        given["eta"] = fields["eta"]
    for name, value in given.items():
        if not any(name in SAMPLERS[sampler].options for sampler in samplers):
            have = ", ".join(sampler for sampler, facts in SAMPLERS.items() if name in facts.options)
            raise ValueError(f"{name}={value!r} is no option of {', '.join(samplers)}, only of {have}")
    cells, gaps = [], {}
    for sampler in samplers:
        options = {name: value for name, value in given.items() if name in SAMPLERS[sampler].options}
        for nfe in fields["nfe"]:
            cell = EvalPoint(sampler, nfe, fields["timestep_spacing"], options)
            try:
                cell.timesteps(T)
                cells.append(cell)
            except ValueError as error:
                gaps[sampler, nfe] = str(error)
    for wanted, found in ((samplers, {c.sampler for c in cells}), (fields["nfe"], {c.nfe for c in cells})):
        for one in wanted:
            if one not in found:
                raise ValueError(next(why for cell, why in gaps.items() if one in cell))
    return cells, [f"no {sampler} at {nfe}: {why}" for (sampler, nfe), why in gaps.items()]


def parse_metrics(text: str) -> list[str]:
    """The metrics that "fid,kid" names, in the order of METRICS; "fid" is always among them.

    Raises:
      ValueError: for an unknown one.
    """
    named = split_names(text)
    for name in named:
        if name not in METRICS:
            raise ValueError(f"metrics={text!r} names {name!r}; there are {', '.join(METRICS)}")
    return [name for name in METRICS if name in named or name == "fid"]
