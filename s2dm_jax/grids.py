"""Timestep grids: which levels a sampler visits. No jax, so that a bad grid is told before jax is imported.

Levels count as in `schedule.py`, from 0 (next to the clean image) to T−1.
"""

import numpy as np
from numpy.typing import ArrayLike


def uniform_grid(T: int, steps: int) -> np.ndarray:
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


def quadratic_grid(T: int, steps: int) -> np.ndarray:
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


def linspace_grid(T: int, steps: int) -> np.ndarray:
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


GRIDS = {"uniform": uniform_grid, "quadratic": quadratic_grid, "linspace": linspace_grid}


def check_grid(T: int, timesteps: ArrayLike) -> np.ndarray:
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
