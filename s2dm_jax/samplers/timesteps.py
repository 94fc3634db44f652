"""Which timesteps a sampler visits. Imports no jax; error messages begin with the name of the argument."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from s2dm_jax.samplers.specs import check_options, nfe_of, steps_for_nfe

DEFAULT_NFE = 10


class TimestepSpec(NamedTuple):
    """A request for timesteps, by their number, an NFE budget, or a list; 0 and () stand for not set.

    Attributes:
      steps: number of timesteps.
      nfe: network evaluations; 10 where nothing is set.
      timestep_spacing: one of SPACINGS; ignored with `timesteps`. "optimal" depends on the network
        (`analytic.optimal_timesteps`): here it stands for as many timesteps of "uniform".
      timesteps: a list, ascending.
    """

    steps: int = 0
    nfe: int = 0
    timestep_spacing: str = "uniform"
    timesteps: Sequence[int] = ()


def split_timestep_spec(options: Mapping[str, Any]) -> tuple[TimestepSpec, dict[str, Any]]:
    """The `TimestepSpec` in a user's keyword arguments, and the other arguments."""
    fields = {name: options[name] for name in TimestepSpec._fields if name in options}
    return TimestepSpec(**fields), {name: value for name, value in options.items() if name not in fields}


def check_steps(T: int, steps: int) -> None:
    """Refuses a number of timesteps outside 1 … T."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is out of range: T={T} allows 1 to {T}")


def uniform_timesteps(T: int, steps: int) -> np.ndarray:
    """Equally spaced timesteps from 0 up, "uniform" of the DDIM code: int32 [steps], ascending.

    Where `steps` does not divide T the DDIM code visits more timesteps than requested (400 gives 500); here there are
    exactly `steps`.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(T, steps)
    return (np.arange(steps) * T // steps).astype(np.int32)


def quadratic_timesteps(T: int, steps: int) -> np.ndarray:
    """Timesteps dense near the image, "quad" of the DDIM code: ⌊linspace(0, √(0.8T), steps)²⌋, int32 [steps].

    Raises:
      ValueError: unless 1 <= steps <= T, and where rounding would repeat a timestep.
    """
    check_steps(T, steps)
    timesteps = (np.linspace(0, np.sqrt(T * 0.8), steps) ** 2).astype(np.int32)
    if len(np.unique(timesteps)) < steps:
        raise ValueError(
            f"steps={steps} repeats a timestep in quadratic spacing over T={T}; use fewer steps or uniform spacing"
        )
    return timesteps


def linspace_timesteps(T: int, steps: int) -> np.ndarray:
    """Timesteps from 0 to T−1, both included ("linear" of Analytic-DPM, which counts 1 … T): int32 [steps], ascending.

    Raises:
      ValueError: unless 2 <= steps <= T.
    """
    check_steps(T, steps)
    if steps < 2:
        raise ValueError("steps=1 is too few for linspace spacing: it has the first and the last timestep")
    return (np.round(1 + np.arange(steps) * (T - 1) / (steps - 1)) - 1).astype(np.int32)


SPACING_FUNCTIONS = {"uniform": uniform_timesteps, "quadratic": quadratic_timesteps, "linspace": linspace_timesteps}
SPACINGS = (*SPACING_FUNCTIONS, "optimal")


def check_timesteps(T: int, timesteps: ArrayLike) -> np.ndarray:
    """`timesteps` as int32 [S]; a ValueError unless they are 1 to T integers in [0, T), ascending without repeats."""
    array = np.asarray(timesteps)
    if array.ndim != 1:
        raise ValueError(f"timesteps has shape {array.shape}; it must be a 1-D list")
    check_steps(T, len(array))
    if array.dtype.kind not in "iuf" or (array != np.floor(array)).any():
        raise ValueError(f"timesteps={array.tolist()} are not integers")
    if array.min() < 0 or array.max() >= T:
        raise ValueError(f"timesteps go from {array.min()} to {array.max()}; T={T} allows 0 to {T - 1}")
    if (np.diff(array) <= 0).any():
        raise ValueError(f"timesteps={array.tolist()} are not in ascending order without repeats")
    return array.astype(np.int32)


def check_published_pndm(T: int, last: int) -> None:
    """Refuses timesteps that end at `last` = T−1, for which the table of PNDM's released code has no entry."""
    if last == T - 1:
        raise ValueError(
            "pndm_convention='published' reads alpha_bar one timestep later: the timesteps must end below "
            f"T−1={T - 1}; pndm_convention='corrected' has no such limit"
        )


def plan_timesteps(T: int, sampler: str, spec: TimestepSpec, **options: Any) -> np.ndarray:
    """The timesteps int32 [S], ascending, that a sampler with these options visits, once all of them are checked.

    Raises:
      ValueError: as `check_options`; for an unknown spacing, a number of steps that the sampler, the spacing or T does
        not allow, a bad list, fields that contradict one another, or a PNDM convention that the timesteps do not suit.
    """
    check_options(sampler, **options)
    if spec.timestep_spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing={spec.timestep_spacing!r} is not one of {', '.join(SPACINGS)}")
    if len(spec.timesteps):
        timesteps = check_timesteps(T, spec.timesteps)
        if spec.steps and spec.steps != len(timesteps):
            raise ValueError(
                f"steps={spec.steps} contradicts timesteps, which are {len(timesteps)}; give one of the two"
            )
    else:
        timesteps = _spaced_timesteps(T, sampler, spec)
    nfe = nfe_of(sampler, len(timesteps))
    if spec.nfe and spec.nfe != nfe:
        source = "timesteps" if len(spec.timesteps) else f"steps={spec.steps}"
        raise ValueError(
            f"nfe={spec.nfe} contradicts {source}: {len(timesteps)} steps of {sampler} make {nfe} "
            "evaluations; give one of the two"
        )
    if options.get("pndm_convention") == "published":
        check_published_pndm(T, timesteps[-1])
    return timesteps


def _spaced_timesteps(T: int, sampler: str, spec: TimestepSpec) -> np.ndarray:
    spacing = "uniform" if spec.timestep_spacing == "optimal" else spec.timestep_spacing
    if spec.steps:
        return SPACING_FUNCTIONS[spacing](T, spec.steps)
    nfe = spec.nfe or DEFAULT_NFE
    steps = steps_for_nfe(sampler, nfe)
    try:
        return SPACING_FUNCTIONS[spacing](T, steps)
    except ValueError as error:
        raise ValueError(f"nfe={nfe} is not possible: {error}") from error
