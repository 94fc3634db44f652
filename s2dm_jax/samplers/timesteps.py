"""Which timesteps a sampler visits. Imports no jax."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from s2dm_jax.samplers.specs import check_options, nfe_of, steps_for_nfe

DEFAULT_NFE = 10


def uniform_timesteps(T: int, steps: int) -> np.ndarray:
    """Equally spaced levels from 0 up, "uniform" of the DDIM code.

    Where `steps` does not divide T the published grid has more levels than asked for (400 gives 500);
    this one has exactly `steps`.

    Returns:
      int32 [steps], ascending, first entry 0.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    _check_steps(T, steps)
    return (np.arange(steps) * T // steps).astype(np.int32)


def quadratic_timesteps(T: int, steps: int) -> np.ndarray:
    """Levels dense near the image, "quad" of the DDIM code: ⌊linspace(0, √(0.8T), steps)²⌋.

    Returns:
      int32 [steps], ascending, from 0 to about 0.8·T.

    Raises:
      ValueError: unless 1 <= steps <= T, and where rounding would repeat a level.
    """
    _check_steps(T, steps)
    grid = (np.linspace(0, np.sqrt(T * 0.8), steps) ** 2).astype(np.int32)
    if len(np.unique(grid)) < steps:
        raise ValueError(
            f"steps={steps} repeats a level in a quadratic grid over T={T}; use fewer steps or a uniform grid"
        )
    return grid


def linspace_timesteps(T: int, steps: int) -> np.ndarray:
    """Levels from the first to the last, both included ("linear" of Analytic-DPM: linspace 1 … T).

    Returns:
      int32 [steps], ascending, in our count (from 0 to T−1).

    Raises:
      ValueError: unless 2 <= steps <= T.
    """
    _check_steps(T, steps)
    if steps < 2:
        raise ValueError("steps=1 is too few for a linspace grid: it holds the first and the last level")
    return (np.round(1 + np.arange(steps) * (T - 1) / (steps - 1)) - 1).astype(np.int32)


_SPACING_FUNCTIONS = {
    "uniform": uniform_timesteps,
    "quadratic": quadratic_timesteps,
    "linspace": linspace_timesteps,
}
SPACINGS = (*_SPACING_FUNCTIONS, "optimal")


def check_timesteps(T: int, timesteps: ArrayLike) -> np.ndarray:
    """Your own list of levels, checked.

    Returns:
      int32 [S], ascending.

    Raises:
      ValueError: unless `timesteps` are 1 to T whole numbers in [0, T), each above the one before it.
    """
    levels = np.asarray(timesteps)
    if levels.ndim != 1:
        raise ValueError(f"timesteps has shape {levels.shape}; a grid is a 1-D list of levels")
    _check_steps(T, len(levels))
    if levels.dtype.kind not in "iuf" or (levels != np.floor(levels)).any():
        raise ValueError(f"timesteps={levels.tolist()} are not whole numbers")
    if levels.min() < 0 or levels.max() >= T:
        raise ValueError(f"timesteps go from {levels.min()} to {levels.max()}; T={T} allows 0 to {T - 1}")
    if (np.diff(levels) <= 0).any():
        raise ValueError(f"timesteps={levels.tolist()} are not in ascending order without repeats")
    return levels.astype(np.int32)


def _check_steps(T: int, steps: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is not a number of steps that T={T} levels allow: 1 to {T}")


def choose_timesteps(
    T: int,
    sampler: str,
    *,
    steps: int = 0,
    nfe: int = 0,
    timestep_spacing: str = "uniform",
    timesteps: Sequence[int] = (),
) -> np.ndarray:
    """The levels that a sampler visits, from whichever is given of their number, a budget, and your own list.

    Args:
      T: noise levels of the schedule.
      sampler: one of FACTS.
      steps: number of levels; 0 where it follows from the others.
      nfe: network evaluations; 0 where they follow from the others, or 10 where nothing is given.
      timestep_spacing: one of GRID_NAMES; not used where `timesteps` are given. "optimal" depends on the
        network (`analytic.optimal_timesteps`): here it stands for as many levels of "uniform".
      timesteps: your own levels, ascending; empty for a grid.

    Returns:
      int32 [S], ascending.

    Raises:
      ValueError: for an unknown sampler or grid, a number of steps that the sampler, the grid or T does not
        allow, a bad list, or values that contradict one another.
    """
    if timestep_spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing={timestep_spacing!r} is not one of {', '.join(SPACINGS)}")
    if len(timesteps):
        levels = check_timesteps(T, timesteps)
        if steps and steps != len(levels):
            raise ValueError(
                f"steps={steps} contradicts timesteps, which are {len(levels)}; give one of the two"
            )
    else:
        from_nfe = not steps
        steps = steps or steps_for_nfe(sampler, nfe or DEFAULT_NFE)
        try:
            levels = _SPACING_FUNCTIONS["uniform" if timestep_spacing == "optimal" else timestep_spacing](
                T, steps
            )
        except ValueError as error:
            asked = f"nfe={nfe or DEFAULT_NFE} cannot be had: " if from_nfe else ""
            raise ValueError(f"{asked}{error}") from error
    evaluations = nfe_of(sampler, len(levels))
    if nfe and nfe != evaluations:
        given = "timesteps" if len(timesteps) else f"steps={steps}"
        raise ValueError(
            f"nfe={nfe} contradicts {given}: {len(levels)} steps of {sampler} make {evaluations} "
            "evaluations; give one of the two"
        )
    return levels


def plan_timesteps(
    T: int,
    sampler: str,
    *,
    steps: int = 0,
    nfe: int = 0,
    timestep_spacing: str = "uniform",
    timesteps: Sequence[int] = (),
    **options: Any,
) -> np.ndarray:
    """`choose_timesteps` for a sampler with these options, both checked, alone and together.

    Raises:
      ValueError: as `choose_timesteps` and `check_options`, and for a convention that the levels do not suit.
    """
    check_options(sampler, **options)
    levels = choose_timesteps(
        T, sampler, steps=steps, nfe=nfe, timestep_spacing=timestep_spacing, timesteps=timesteps
    )
    if options.get("pndm_convention") == "published" and levels[-1] == T - 1:
        raise ValueError(
            "pndm_convention='published' reads alpha_bar one level above each timestep: its grid must end "
            f"below T−1={T - 1}; pndm_convention='corrected' runs this one"
        )
    return levels
