"""What is known of each sampler before it runs: its options, its network evaluations, its levels.

No jax, so that a mistake is told before jax is imported. Messages begin with the name of the argument.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from s2dm_jax.grids import GRIDS, check_grid

DEFAULT_NFE = 10
GRID_NAMES = (*GRIDS, "optimal")


class Method(NamedTuple):
    """Facts about a sampler.

    Attributes:
      options: names of the keyword arguments that only some samplers have.
      more_evaluations: network evaluations beyond one a step.
      fewest_steps: fewer cannot be made.
      draws_noise: at every step, whatever the options.
      needs: what must be known of the network besides its weights: "ms_eps" (Analytic-DPM's statistic), or
        which second head ("sn", "npr").
    """

    options: tuple[str, ...] = ()
    more_evaluations: int = 0
    fewest_steps: int = 1
    draws_noise: bool = False
    needs: str = ""


_OPTIMAL = ("form", "eta", "clip_pixel", "clip_x0")
FACTS = {
    "ddim": Method(("eta", "clip_x0")),
    "ddpm": Method(("variance", "clip_x0"), draws_noise=True),
    "f_pndm": Method(("convention",), more_evaluations=9, fewest_steps=4),
    "s_pndm": Method(("convention",), more_evaluations=1, fewest_steps=2),
    "deis": Method(("order",)),
    "dpmpp_2m": Method(),
    "unipc": Method(),
    "analytic": Method(_OPTIMAL, draws_noise=True, needs="ms_eps"),
    "sn": Method(_OPTIMAL, draws_noise=True, needs="sn"),
    "npr": Method(_OPTIMAL, draws_noise=True, needs="npr"),
}
# The values that an option may have; None: any number above 0.
OPTIONS: dict[str, tuple | None] = {
    "clip_x0": (False, True),
    "variance": ("large", "small"),
    "convention": ("corrected", "published"),
    "order": (1, 2, 3),
    "form": ("ddpm", "ddim"),
    "clip_pixel": None,
}


def num_evaluations(method: str, steps: int) -> int:
    """Calls of the network that a sampler makes: S + 9 for F-PNDM, S + 1 for S-PNDM (PNDM), else S.

    Raises:
      ValueError: for an unknown method, or fewer steps than it can make.
    """
    facts = _facts(method)
    if steps < facts.fewest_steps:
        raise ValueError(f"steps={steps} is too few for {method}: it needs at least {facts.fewest_steps}")
    return steps + facts.more_evaluations


def steps_for_budget(method: str, nfe: int) -> int:
    """The largest number of steps whose `num_evaluations` are at most `nfe`.

    Raises:
      ValueError: for an unknown method, or a budget below its fewest steps.
    """
    facts = _facts(method)
    fewest = facts.fewest_steps + facts.more_evaluations
    if nfe < fewest:
        raise ValueError(f"nfe={nfe} is too few for {method}: its fewest steps make {fewest} evaluations")
    return nfe - facts.more_evaluations


def choose_timesteps(
    T: int,
    method: str,
    *,
    steps: int = 0,
    nfe: int = 0,
    grid: str = "uniform",
    timesteps: Sequence[int] = (),
) -> np.ndarray:
    """The levels that a sampler visits, from whichever is given of their number, a budget, and your own list.

    Args:
      T: noise levels of the schedule.
      method: one of FACTS.
      steps: number of levels; 0 where it follows from the others.
      nfe: network evaluations; 0 where they follow from the others, or 10 where nothing is given.
      grid: one of GRID_NAMES; not used where `timesteps` are given. "optimal" depends on the network
        (`covariance.optimal_grid`): here it stands for as many levels of "uniform".
      timesteps: your own levels, ascending; empty for a grid.

    Returns:
      int32 [S], ascending.

    Raises:
      ValueError: for an unknown method or grid, a number of steps that the method, the grid or T does not
        allow, a bad list, or values that contradict one another.
    """
    if grid not in GRID_NAMES:
        raise ValueError(f"grid={grid!r} is not one of {', '.join(GRID_NAMES)}")
    if len(timesteps):
        levels = check_grid(T, timesteps)
        if steps and steps != len(levels):
            raise ValueError(
                f"steps={steps} contradicts timesteps, which are {len(levels)}; give one of the two"
            )
    else:
        from_nfe = not steps
        steps = steps or steps_for_budget(method, nfe or DEFAULT_NFE)
        try:
            levels = GRIDS["uniform" if grid == "optimal" else grid](T, steps)
        except ValueError as error:
            asked = f"nfe={nfe or DEFAULT_NFE} cannot be had: " if from_nfe else ""
            raise ValueError(f"{asked}{error}") from error
    evaluations = num_evaluations(method, len(levels))
    if nfe and nfe != evaluations:
        given = "timesteps" if len(timesteps) else f"steps={steps}"
        raise ValueError(
            f"nfe={nfe} contradicts {given}: {len(levels)} steps of {method} make {evaluations} evaluations; "
            "give one of the two"
        )
    return levels


def check_options(method: str, **options: Any) -> None:
    """Checks the keyword arguments that only some samplers have.

    Args:
      method: one of FACTS.
      **options: "eta" and those of OPTIONS; eta 0 suits every method.

    Raises:
      ValueError: for an option that does not exist or that the method does not have, or a bad value.
    """
    facts = _facts(method)
    for name, value in options.items():
        if name == "eta":
            if not 0 <= value <= 1:
                raise ValueError(
                    f"eta={value} is not allowed: 0 (deterministic) to 1 (DDPM's posterior variance)"
                )
            if value == 0:
                continue
        elif name not in OPTIONS:
            raise ValueError(
                f"{name}={value!r} is no option of a sampler; there are eta, {', '.join(OPTIONS)}"
            )
        elif (allowed := OPTIONS[name]) is None:
            if not value > 0:
                raise ValueError(f"{name}={value!r} is not allowed: a number above 0, or inf")
        elif value not in allowed:
            raise ValueError(f"{name}={value!r} is not allowed: {' or '.join(map(repr, allowed))}")
        if name not in facts.options:
            have = ", ".join(other for other, its in FACTS.items() if name in its.options)
            raise ValueError(f"{name}={value!r} is no option of {method}, only of {have}")
    if options.get("eta") and "form" in facts.options and options.get("form", "ddpm") == "ddpm":
        raise ValueError(f"eta={options['eta']} is no option of form='ddpm', only of form='ddim'")


def plan(
    T: int,
    method: str,
    *,
    steps: int = 0,
    nfe: int = 0,
    grid: str = "uniform",
    timesteps: Sequence[int] = (),
    **options: Any,
) -> np.ndarray:
    """`choose_timesteps` for a method with these options, both checked, alone and together.

    Raises:
      ValueError: as `choose_timesteps` and `check_options`, and for a convention that the levels do not suit.
    """
    check_options(method, **options)
    levels = choose_timesteps(T, method, steps=steps, nfe=nfe, grid=grid, timesteps=timesteps)
    if options.get("convention") == "published" and levels[-1] == T - 1:
        raise ValueError(
            f"convention='published' reads alpha_bar one level above each timestep: its grid must end below "
            f"T−1={T - 1}; convention='corrected' runs this one"
        )
    return levels


def _facts(method: str) -> Method:
    if method not in FACTS:
        raise ValueError(f"method={method!r} is not one of {', '.join(FACTS)}")
    return FACTS[method]
