"""The evaluation plan: the (sampler, NFE) points. Imports no jax, like `samplers/specs.py`."""

from typing import NamedTuple

import numpy as np

from s2dm_jax.config.metrics import split_names
from s2dm_jax.samplers.guards import MIN_LOG_SNR
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS, check_options, sampler_name
from s2dm_jax.samplers.timesteps import (
    SPACINGS,
    TimestepSpec,
    plan_timesteps,
    resolve_spacing,
    split_timestep_spec,
    unvisited_note,
)

FEATURES = ("auto", "inception", "classifier")
REFERENCES = ("auto", "train", "held_out")


class EvalPoint(NamedTuple):
    """A sampler at an NFE, a line of the table of results; `options` are its keyword arguments besides defaults.

    `timestep_spacing` is never "auto", but what that is for the sampler and the schedule.
    """

    sampler: str
    nfe: int
    timestep_spacing: str
    options: dict

    @property
    def name(self) -> str:
        """The sampler with its spacing and options, as in the table: "ddim, quadratic, eta 1"."""
        return ", ".join([self.sampler, self.timestep_spacing, *(f"{name} {v}" for name, v in self.options.items())])

    def timesteps(self, T: int, log_snr: np.ndarray | None = None) -> np.ndarray:
        """The timesteps [S] that it visits, ascending; for the spacing "optimal" as many others."""
        spec, options = self.request()
        return plan_timesteps(T, self.sampler, spec, log_snr=log_snr, **options)

    def request(self) -> tuple[TimestepSpec, dict]:
        """What stands for its timesteps, and the sampler's own options."""
        fields = {"nfe": self.nfe, "timestep_spacing": self.timestep_spacing}
        return split_timestep_spec(fields | self.options)

    def note(self, T: int, log_snr: np.ndarray) -> str:
        """One sentence if the last timesteps are not visited, else ""."""
        spec, options = self.request()
        return unvisited_note(T, self.sampler, spec, log_snr, **options)


def plan_evaluation(T: int, fields: dict, log_snr: np.ndarray | None = None) -> tuple[list[EvalPoint], list[str]]:
    """The points that a config's group `eval` requests, sampler by sampler, and one sentence for each skipped pair.

    An impossible pair of sampler and NFE, such as F-PNDM with 10, is skipped. An option applies to those of the
    samplers that have it. `log_snr` is the schedule's λ at each timestep, as for `plan_timesteps`.

    Raises:
      ValueError: for an unknown or repeated sampler, an option that no sampler has or a value that is not allowed, and
        if no pair is possible. The message begins with the name of a field.
    """
    samplers = [sampler_name(name) for name in split_names(fields["samplers"])]
    for name in samplers:
        if name not in SAMPLERS:
            raise ValueError(f"samplers={fields['samplers']!r} names {name!r}; choose among {', '.join(SAMPLERS)}")
    if not samplers or len(set(samplers)) < len(samplers):
        raise ValueError(f"samplers={fields['samplers']!r} must name at least one sampler, each only once")
    if fields["timestep_spacing"] == "optimal" and any(SAMPLERS[name].requires != "ms_eps" for name in samplers):
        raise ValueError(f"timestep_spacing='optimal' is only for analytic, not for samplers={fields['samplers']!r}")
    requested = {name: fields[name] for name in OPTIONS if fields[name] is not None}
    if fields["eta"]:
        requested["eta"] = fields["eta"]
    for name, value in requested.items():
        if not any(name in SAMPLERS[sampler].options for sampler in samplers):
            owners = ", ".join(sampler for sampler, spec in SAMPLERS.items() if name in spec.options)
            raise ValueError(f"{name}={value!r} is not an option of {', '.join(samplers)}, only of {owners}")
    spacing = fields["timestep_spacing"]
    if spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing={spacing!r} is not one of {', '.join(SPACINGS)}")
    bound = {} if fields["min_log_snr"] == MIN_LOG_SNR else {"min_log_snr": fields["min_log_snr"]}
    points, reasons, skipped = [], [], []
    for sampler in samplers:
        options = {name: value for name, value in requested.items() if name in SAMPLERS[sampler].options}
        check_options(sampler, **options)
        options |= bound
        for nfe in fields["nfe"]:
            point = EvalPoint(sampler, nfe, resolve_spacing(spacing, sampler, log_snr), options)
            try:
                point.timesteps(T, log_snr)
                points.append(point)
            except ValueError as error:
                reasons.append(str(error))
                skipped.append(f"skipped {sampler} at NFE {nfe}: {error}")
    if not points:
        raise ValueError(reasons[0])
    return points, skipped
