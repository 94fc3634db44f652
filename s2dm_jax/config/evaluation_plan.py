"""The evaluation plan: the (sampler, NFE) points. Imports no jax, like `samplers/specs.py`."""

from typing import NamedTuple

import numpy as np

from s2dm_jax.config.metrics import split_names
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS, sampler_name
from s2dm_jax.samplers.timesteps import MIN_LOG_SNR, TimestepSpec, plan_timesteps, split_timestep_spec, unvisited_note

FEATURES = ("auto", "inception", "classifier")
REFERENCES = ("auto", "train", "held_out")


class EvalPoint(NamedTuple):
    """A sampler at an NFE, a line of the table of results; `options` are its keyword arguments besides defaults."""

    sampler: str
    nfe: int
    timestep_spacing: str
    options: dict

    @property
    def name(self) -> str:
        """The sampler with its options, as in the table: "ddim, eta 1"."""
        spacing = {} if self.timestep_spacing == "uniform" else {"timestep_spacing": self.timestep_spacing}
        return ", ".join([self.sampler, *(f"{name} {value}" for name, value in (spacing | self.options).items())])

    def timesteps(self, T: int, log_snr: np.ndarray | None = None) -> np.ndarray:
        """The timesteps [S] that it visits, ascending; for the spacing "optimal" as many others."""
        spec, options = self.request()
        return plan_timesteps(T, self.sampler, spec, log_snr=log_snr, **options)

    def request(self) -> tuple[TimestepSpec, dict]:
        """What stands for its timesteps, and the sampler's own options."""
        fields = {"nfe": self.nfe, "timestep_spacing": self.timestep_spacing}
        return split_timestep_spec(fields | self.options)

    def note(self, T: int, log_snr: np.ndarray) -> str:
        """One sentence where the last timesteps are not visited, else ""."""
        spec, options = self.request()
        return unvisited_note(T, self.sampler, spec, log_snr, **options)


def plan_evaluation(T: int, fields: dict, log_snr: np.ndarray | None = None) -> tuple[list[EvalPoint], list[str]]:
    """The points that a config's group `eval` requests, sampler by sampler, and one sentence for each skipped pair.

    A pair of sampler and NFE that is impossible, as F-PNDM with 10, is skipped. An option applies to those of the
    samplers that have it. `log_snr` is the schedule's λ at each timestep, for the bound `min_log_snr`.

    Raises:
      ValueError: for an unknown or repeated sampler, an option that no sampler has, an NFE that no sampler can run
        with, a sampler that can run with none. The message begins with the name of a field.
    """
    samplers = [sampler_name(name) for name in split_names(fields["samplers"])]
    for name in samplers:
        if name not in SAMPLERS:
            raise ValueError(f"samplers={fields['samplers']!r} names {name!r}; there are {', '.join(SAMPLERS)}")
    if not samplers or len(set(samplers)) < len(samplers):
        raise ValueError(f"samplers={fields['samplers']!r} must name at least one sampler, none of them twice")
    if fields["timestep_spacing"] == "optimal" and any(SAMPLERS[name].requires != "ms_eps" for name in samplers):
        raise ValueError(f"timestep_spacing='optimal' is only for analytic, not for samplers={fields['samplers']!r}")
    requested = {name: fields[name] for name in OPTIONS if fields[name] is not None}
    if fields["eta"]:
        requested["eta"] = fields["eta"]
    for name, value in requested.items():
        if not any(name in SAMPLERS[sampler].options for sampler in samplers):
            owners = ", ".join(sampler for sampler, spec in SAMPLERS.items() if name in spec.options)
            raise ValueError(f"{name}={value!r} is no option of {', '.join(samplers)}, only of {owners}")
    bound = {} if fields["min_log_snr"] == MIN_LOG_SNR else {"min_log_snr": fields["min_log_snr"]}
    points, skipped = [], {}
    for sampler in samplers:
        options = {name: value for name, value in requested.items() if name in SAMPLERS[sampler].options} | bound
        for nfe in fields["nfe"]:
            point = EvalPoint(sampler, nfe, fields["timestep_spacing"], options)
            try:
                point.timesteps(T, log_snr)
                points.append(point)
            except ValueError as error:
                skipped[sampler, nfe] = str(error)
    # A sampler or an NFE without any point is an error.
    for request in (*samplers, *fields["nfe"]):
        if not any(request in (point.sampler, point.nfe) for point in points):
            raise ValueError(next(reason for pair, reason in skipped.items() if request in pair))
    return points, [f"no {sampler} at {nfe}: {reason}" for (sampler, nfe), reason in skipped.items()]
