"""From what a user says about sampling to the levels, factors and options that a sampler takes."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax import losses
from s2dm_jax.covariance import optimal_grid
from s2dm_jax.heads import Head
from s2dm_jax.methods import plan
from s2dm_jax.schedule import NoiseSchedule

# The fields of the config's group `sample` that say how to sample; the others say what to make of it.
HOW = (
    "method",
    "steps",
    "nfe",
    "grid",
    "timesteps",
    "eta",
    "clip_x0",
    "variance",
    "convention",
    "order",
    "form",
    "clip_pixel",
    "skip_scale",
    "skip_scale_tau",
    "skip_scale_preset",
)


def how(sample: ConfigDict) -> dict:
    """The keyword arguments of `configure` that a config's group `sample` stands for."""
    return {name: sample[name] for name in HOW}


def resolve(
    schedule: NoiseSchedule,
    method: str = "ddim",
    *,
    steps: int = 0,
    nfe: int = 0,
    grid: str = "uniform",
    timesteps: Sequence[int] = (),
    skip_scale: int | np.ndarray | None = None,
    skip_scale_tau: float = 0.99,
    skip_scale_preset: str = "paper",
    ms_eps: np.ndarray | None = None,
    head: Head | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """What a sampler is told, from what a user says.

    Args:
      schedule: the forward process.
      method: one of `samplers.METHODS`.
      steps, nfe, grid, timesteps: as for `methods.choose_timesteps`; grid "optimal" is `optimal_grid`.
      skip_scale: the factor on the network's output that L_skip would train into it (`losses.skip_scale`): a
        skip, or your own float [T]; None or 0 for no factor.
      skip_scale_tau, skip_scale_preset: tau and preset of that skip.
      ms_eps, head: as for `make_sampler`; "optimal" needs ms_eps, too.
      **options: eta and the method's own, as for `make_sampler`; None stands for the method's default.

    Returns:
      The levels int32 [S], ascending; the factors float [T], or None; the options that are not None.

    Raises:
      ValueError: for an unknown method, and for values that are not allowed or contradict one another.
    """
    options = {name: value for name, value in options.items() if value is not None}
    levels = plan(schedule.T, method, steps=steps, nfe=nfe, grid=grid, timesteps=timesteps, **options)
    if grid == "optimal" and not len(timesteps):
        if ms_eps is None:
            raise ValueError(
                "grid='optimal' needs ms_eps, the network's statistic; moments.estimate makes it"
            )
        levels = optimal_grid(schedule, ms_eps, len(levels))
    scale = None
    if skip_scale is None or np.ndim(skip_scale) == 0:
        skip = operator.index(skip_scale or 0)
        if not 0 <= skip < schedule.T:
            raise ValueError(f"skip_scale={skip} is out of range: a skip is from 0 to T−1={schedule.T - 1}")
        if skip:
            scale = losses.skip_scale(schedule, skip, skip_scale_tau, skip_scale_preset)
    elif np.shape(skip_scale) != (schedule.T,):
        raise ValueError(
            f"skip_scale has shape {np.shape(skip_scale)}; it is a skip, or one number per level, "
            f"shape ({schedule.T},)"
        )
    else:
        scale = np.asarray(skip_scale)
    return levels, scale, options
