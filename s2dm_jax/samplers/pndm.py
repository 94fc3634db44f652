"""PNDM: classical Runge-Kutta and linear multistep formulas with the DDIM step in the place of x + h·f.

The multistep history is part of the scan's state.
"""

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.schedule import NoiseSchedule, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, SamplerOutput
from s2dm_jax.samplers.common import (
    alpha_sigma,
    call_network,
    ddim_step,
    predict_x0,
    timestep_pairs,
    weighted_sum,
)


def f_pndm(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    pndm_convention: str = "corrected",
    return_x0: bool = False,
) -> SamplerOutput:
    """F-PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps of four evaluations each, then
    the four-step linear multistep formula; S + 9 evaluations.

    Args:
      x_T: [B, H, W, C].
      timesteps: int [S], ascending, equally spaced levels in [0, T); S at least 4.
      pndm_convention: "corrected" takes alpha_bar of the level that the network is told, and ends at the
        clean image; half-way levels may be fractional, for the network and for alpha_bar (see
        `log_alpha_bar`). "published" is the released code: alpha_bar of the level above, the end at
        alpha_bar[0], half-way levels truncated for alpha_bar; it cannot run a grid that holds level T−1.
      return_x0: also return the prediction of x_0 from the first evaluation of every step.

    Returns:
      x_0 [B, H, W, C]; with `return_x0` also the predictions [S, B, H, W, C], the noisiest level's first.

    Raises:
      ValueError: for a bad grid, too few steps, an unknown `pndm_convention`, or one that the grid does not
        suit.
    """
    return _pndm(
        eps_fn,
        x_T,
        schedule,
        timesteps,
        pndm_convention,
        return_x0,
        stages=(0, 1 / 2, 1 / 2, 1),
        stage_weights=(1 / 6, 2 / 6, 2 / 6, 1 / 6),
        multistep_weights=(55 / 24, -59 / 24, 37 / 24, -9 / 24),
    )


def s_pndm(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    pndm_convention: str = "corrected",
    return_x0: bool = False,
) -> SamplerOutput:
    """S-PNDM (Liu et al. 2022): one improved Euler step, then the two-step linear multistep formula; S + 1
    evaluations.

    Arguments, result and errors as for `f_pndm`, except that S is at least 2 and no level is fractional.
    """
    return _pndm(
        eps_fn,
        x_T,
        schedule,
        timesteps,
        pndm_convention,
        return_x0,
        stages=(0, 1),
        stage_weights=(1 / 2, 1 / 2),
        multistep_weights=(3 / 2, -1 / 2),
    )


def _pndm(
    eps_fn,
    x_T,
    schedule,
    timesteps,
    pndm_convention,
    return_x0,
    *,
    stages,
    stage_weights,
    multistep_weights,
):
    """Steps of several evaluations until the multistep formula has its history, then the formula.

    Args:
      stages: where in a starting step the network is evaluated, from 0 (its level) to 1 (the next level).
      stage_weights: of these evaluations in the step's ε.
      multistep_weights: of this step's evaluation and those of the steps before it, newest first.
    """
    t, t_next = timestep_pairs(schedule, timesteps)
    start = len(multistep_weights) - 1
    if len(t) <= start:
        # With fewer steps a starting step would reach the clean image, and ask the network about level −1.
        raise ValueError(f"steps={len(t)} is too few for this PNDM: it needs at least {start + 1}")
    alpha_bar_at = _pndm_alpha_bar(schedule, timesteps, pndm_convention, x_T.dtype)
    stages = jnp.asarray(stages, t.dtype)
    stage_t = t[:, None] + stages * (t_next - t)[:, None]
    log_ab, log_ab_next, log_ab_stages = (alpha_bar_at(level) for level in (t, t_next, stage_t))

    def prediction(x, eps, log_ab):
        return predict_x0(x, eps, *alpha_sigma(log_ab)) if return_x0 else None

    def starting_step(x, at):
        log_ab, log_ab_next, stage_t, log_ab_stages = at

        def stage(eps, at):
            # Each stage looks at the level it is for from x, along the noise that the stage before it found.
            level, log_ab_level = at
            eps = call_network(eps_fn, ddim_step(x, eps, log_ab, log_ab_level), level)
            return eps, eps

        _, slopes = jax.lax.scan(stage, jnp.zeros_like(x), (stage_t, log_ab_stages))
        x_next = ddim_step(x, weighted_sum(stage_weights, slopes), log_ab, log_ab_next)
        # Only the first evaluation is at this level on this path: it alone enters the history.
        return x_next, (slopes[0], prediction(x, slopes[0], log_ab))

    def multistep(state, at):
        x, history = state
        t, log_ab, log_ab_next = at
        eps = call_network(eps_fn, x, t)
        slopes = jnp.concatenate([eps[None], history])
        x_next = ddim_step(x, weighted_sum(multistep_weights, slopes), log_ab, log_ab_next)
        return (x_next, slopes[:-1]), prediction(x, eps, log_ab)

    # Two scans, so that no step makes evaluations that it does not use.
    x, (slopes, first) = jax.lax.scan(
        starting_step, x_T, (log_ab[:start], log_ab_next[:start], stage_t[:start], log_ab_stages[:start])
    )
    (x, _), rest = jax.lax.scan(
        multistep, (x, slopes[::-1]), (t[start:], log_ab[start:], log_ab_next[start:])
    )
    return (x, jnp.concatenate([first, rest])) if return_x0 else x


def _pndm_alpha_bar(schedule, timesteps, pndm_convention, dtype):
    """Function from levels to log alpha_bar in the asked pndm_convention."""
    if pndm_convention == "corrected":
        return lambda t: log_alpha_bar(schedule, t, dtype)
    if pndm_convention != "published":
        raise ValueError(f"pndm_convention={pndm_convention!r} is not allowed: 'corrected' or 'published'")
    values_known = not isinstance(timesteps, jax.core.Tracer)
    if len(timesteps) == schedule.T or (values_known and timesteps[-1] == schedule.T - 1):
        raise ValueError(
            "pndm_convention='published' reads alpha_bar one level above each timestep: its grid must end "
            f"below T−1={schedule.T - 1}; pndm_convention='corrected' runs this one"
        )
    table = jnp.asarray(schedule.log_alpha_bar_with_x0[1:], dtype)
    return lambda t: table[t.astype(jnp.int32) + 1]
