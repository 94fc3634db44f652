"""Which timesteps a sampler visits. Imports no jax; error messages begin with the name of the argument."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from s2dm_jax.samplers.specs import check_options, nfe_of, steps_for_nfe

DEFAULT_NFE = 10


class TimestepSpec(NamedTuple):
    """A request for timesteps, by their number, an NFE budget, or a list; 0 and () stand for not given.

    Attributes:
      steps: number of timesteps.
      nfe: network evaluations; 10 where nothing is given.
      timestep_spacing: one of SPACINGS, not used where `timesteps` are given. "optimal" depends on the
        network (`analytic.optimal_timesteps`): here it stands for as many timesteps of "uniform".
      timesteps: a list, ascending.
    """

    steps: int = 0
    nfe: int = 0
    timestep_spacing: str = "uniform"
    timesteps: Sequence[int] = ()


def split_timestep_spec(options: Mapping[str, Any]) -> tuple[TimestepSpec, dict[str, Any]]:
    """The `TimestepSpec` in a user's keyword arguments, and the arguments that are left."""
    fields = {name: options[name] for name in TimestepSpec._fields if name in options}
    return TimestepSpec(**fields), {name: value for name, value in options.items() if name not in fields}


def uniform_timesteps(T: int, steps: int) -> np.ndarray:
    """Equally spaced timesteps from 0 up, "uniform" of the DDIM code.

    Where `steps` does not divide T the DDIM code visits more timesteps than requested (400 gives 500); here
    there are exactly `steps`.

    Returns:
      int32 [steps], ascending, first entry 0.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    _check_steps(T, steps)
    return (np.arange(steps) * T // steps).astype(np.int32)


def quadratic_timesteps(T: int, steps: int) -> np.ndarray:
    """Timesteps dense near the image, "quad" of the DDIM code: ⌊linspace(0, √(0.8T), steps)²⌋.

    Returns:
      int32 [steps], ascending, from 0 to about 0.8·T.

    Raises:
      ValueError: unless 1 <= steps <= T, and where rounding would repeat a timestep.
    """
    _check_steps(T, steps)
    timesteps = (np.linspace(0, np.sqrt(T * 0.8), steps) ** 2).astype(np.int32)
    if len(np.unique(timesteps)) < steps:
        raise ValueError(
            f"steps={steps} repeats a timestep in quadratic spacing over T={T}; use fewer steps or uniform spacing"
        )
    return timesteps


def linspace_timesteps(T: int, steps: int) -> np.ndarray:
    """Timesteps from the first to the last, both included ("linear" of Analytic-DPM: linspace 1 … T).

    Returns:
      int32 [steps], ascending, counted from 0: 0 to T−1.

    Raises:
      ValueError: unless 2 <= steps <= T.
    """
    _check_steps(T, steps)
    if steps < 2:
        raise ValueError("steps=1 is too few for linspace spacing: it has the first and the last timestep")
    return (np.round(1 + np.arange(steps) * (T - 1) / (steps - 1)) - 1).astype(np.int32)


SPACING_FUNCTIONS = {
    "uniform": uniform_timesteps,
    "quadratic": quadratic_timesteps,
    "linspace": linspace_timesteps,
}
SPACINGS = (*SPACING_FUNCTIONS, "optimal")


def check_timesteps(T: int, timesteps: ArrayLike) -> np.ndarray:
    """A list of timesteps, checked.

    Returns:
      int32 [S], ascending.

    Raises:
      ValueError: unless `timesteps` are 1 to T integers in [0, T), each above the one before it.
    """
    array = np.asarray(timesteps)
    if array.ndim != 1:
        raise ValueError(f"timesteps has shape {array.shape}; it must be a 1-D list")
    _check_steps(T, len(array))
    if array.dtype.kind not in "iuf" or (array != np.floor(array)).any():
        raise ValueError(f"timesteps={array.tolist()} are not integers")
    if array.min() < 0 or array.max() >= T:
        raise ValueError(f"timesteps go from {array.min()} to {array.max()}; T={T} allows 0 to {T - 1}")
    if (np.diff(array) <= 0).any():
        raise ValueError(f"timesteps={array.tolist()} are not in ascending order without repeats")
    return array.astype(np.int32)


def check_published_pndm(T: int, last: int) -> None:
    """Checks that PNDM's published convention can run timesteps that end at `last`.

    Raises:
      ValueError: if `last` is T−1, for which the released code's table has no entry.
    """
    if last == T - 1:
        raise ValueError(
            "pndm_convention='published' reads alpha_bar one timestep later: the timesteps must end below "
            f"T−1={T - 1}; pndm_convention='corrected' has no such limit"
        )


def _check_steps(T: int, steps: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is out of range: T={T} allows 1 to {T}")


def choose_timesteps(T: int, sampler: str, spec: TimestepSpec) -> np.ndarray:
    """The timesteps that a sampler visits.

    Args:
      T: number of timesteps of the schedule.
      sampler: one of `specs.SAMPLERS`.
      spec: the request.

    Returns:
      int32 [S], ascending.

    Raises:
      ValueError: for an unknown sampler or spacing, a number of steps that the sampler, the spacing or T does
        not allow, a bad list, or fields that contradict one another.
    """
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


def plan_timesteps(T: int, sampler: str, spec: TimestepSpec, **options: Any) -> np.ndarray:
    """`choose_timesteps` for a sampler with these options, both checked, alone and together.

    Raises:
      ValueError: as `choose_timesteps` and `check_options`, and for a PNDM convention that the timesteps do
        not suit.
    """
    check_options(sampler, **options)
    timesteps = choose_timesteps(T, sampler, spec)
    if options.get("pndm_convention") == "published":
        check_published_pndm(T, timesteps[-1])
    return timesteps
