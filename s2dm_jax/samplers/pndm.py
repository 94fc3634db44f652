"""PNDM: classical Runge-Kutta and linear multistep formulas with the DDIM step in place of x + h·f.

The multistep history is part of the scan's state.
"""

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, SamplerOutput
from s2dm_jax.samplers.common import (
    call_network,
    check_concrete_options,
    ddim_step,
    scan_sampler,
    timestep_pairs,
    weighted_sum,
)
from s2dm_jax.samplers.specs import nfe_of
from s2dm_jax.samplers.thresholding import bounded_eps, threshold_eps
from s2dm_jax.samplers.timesteps import check_published_pndm

# Where in a starting step the network is called, from 0 (its timestep) to 1 (the next one); the weights of these
# evaluations in the step's ε; the weights of a multistep formula's evaluations, the newest first.
_FORMULAS = {
    "f_pndm": ((0, 1 / 2, 1 / 2, 1), (1 / 6, 2 / 6, 2 / 6, 1 / 6), (55 / 24, -59 / 24, 37 / 24, -9 / 24)),
    "s_pndm": ((0, 1), (1 / 2, 1 / 2), (3 / 2, -1 / 2)),
}


def f_pndm(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    pndm_convention: str = "corrected",
    clip_x0: bool = False,
    dynamic_threshold: float | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """F-PNDM (Liu et al. 2022, algorithm 2); NFE S + 9. Contract: `s2dm_jax.samplers`.

    Three pseudo Runge-Kutta steps of four evaluations each, then the four-step linear multistep formula.

    Args:
      timesteps: equally spaced; S at least 4.
      pndm_convention: "corrected" takes alpha_bar of the timestep that the network gets, and ends at the clean image;
        half-way timesteps may be fractional, for the network and for alpha_bar (see `log_alpha_bar`). "published" is
        the released code: alpha_bar one timestep later, the end at alpha_bar[0], half-way timesteps truncated for
        alpha_bar; it cannot run timesteps that contain T−1.
      clip_x0, dynamic_threshold: bound the x_0 of each evaluation, with alpha_bar in the PNDM convention.
      return_x0: the predictions are those of the first evaluation of every step.
    """
    bounds = clip_x0, dynamic_threshold
    return _pndm("f_pndm", eps_fn, x_T, schedule, timesteps, pndm_convention, bounds, return_x0)


def s_pndm(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    pndm_convention: str = "corrected",
    clip_x0: bool = False,
    dynamic_threshold: float | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """S-PNDM (Liu et al. 2022); NFE S + 1. Contract: `s2dm_jax.samplers`.

    One improved Euler step, then the two-step linear multistep formula.

    Args:
      timesteps: equally spaced; S at least 2.
      pndm_convention: as for `f_pndm`; no timestep is fractional.
    """
    bounds = clip_x0, dynamic_threshold
    return _pndm("s_pndm", eps_fn, x_T, schedule, timesteps, pndm_convention, bounds, return_x0)


def _pndm(sampler, eps_fn, x_T, schedule, timesteps, pndm_convention, bounds, return_x0):
    """Steps of several evaluations until the multistep formula has its history, then the formula."""
    check_concrete_options(sampler, pndm_convention=pndm_convention, dynamic_threshold=bounds[1])
    t, t_next = timestep_pairs(schedule, timesteps)
    # With fewer steps a starting step would reach the clean image, and call the network at t = −1.
    nfe_of(sampler, len(t))
    stages, stage_weights, multistep_weights = _FORMULAS[sampler]
    start = len(multistep_weights) - 1
    log_ab_at = _log_alpha_bar_of(schedule, timesteps, pndm_convention, x_T.dtype)
    # What is bounded is the x_0 of the sampler's own steps, in its convention: that of each evaluation, and that of the
    # ε that a formula makes of them.
    eps_fn = threshold_eps(eps_fn, log_ab_at, *bounds)

    def combined_step(x, weights, slopes, log_ab, log_ab_next):
        eps = bounded_eps(x, weighted_sum(weights, slopes), log_ab, *bounds)
        return ddim_step(x, eps, log_ab, log_ab_next)

    t_stages = t[:, None] + jnp.asarray(stages, t.dtype) * (t_next - t)[:, None]  # [S, stages]
    log_ab, log_ab_next, log_ab_stages = (log_ab_at(s) for s in (t, t_next, t_stages))

    def starting_step(x, inputs):
        log_ab, log_ab_next, t_stages, log_ab_stages = inputs

        def stage(eps, inputs):
            # Each stage starts from x and follows the noise that the stage before it predicted.
            t_stage, log_ab_stage = inputs
            eps = call_network(eps_fn, ddim_step(x, eps, log_ab, log_ab_stage), t_stage)
            return eps, eps

        _, slopes = jax.lax.scan(stage, jnp.zeros_like(x), (t_stages, log_ab_stages))  # [stages, B, H, W, C]
        x_next = combined_step(x, stage_weights, slopes, log_ab, log_ab_next)
        # Only the first evaluation is at this timestep on this path: it alone enters the history.
        prediction = predict_x0(x, slopes[0], *alpha_sigma(log_ab)) if return_x0 else None
        return x_next, (slopes[0], prediction)

    def multistep(state, inputs):
        x, history = state
        t, log_ab, log_ab_next = inputs
        eps = call_network(eps_fn, x, t)
        slopes = jnp.concatenate([eps[None], history])  # [start + 1, B, H, W, C]
        x_next = combined_step(x, multistep_weights, slopes, log_ab, log_ab_next)
        return (x_next, slopes[:-1]), predict_x0(x, eps, *alpha_sigma(log_ab))

    # Two scans, so that no step makes evaluations that it does not use.
    x, (slopes, first) = jax.lax.scan(
        starting_step, x_T, (log_ab[:start], log_ab_next[:start], t_stages[:start], log_ab_stages[:start])
    )
    steps = (t[start:], log_ab[start:], log_ab_next[start:])
    output = scan_sampler(multistep, (x, slopes[::-1]), steps, return_x0)
    return (output[0], jnp.concatenate([first, output[1]])) if return_x0 else output


def _log_alpha_bar_of(schedule, timesteps, pndm_convention, dtype):
    """Function from timesteps to log alpha_bar in the PNDM convention."""
    if pndm_convention == "corrected":
        return lambda t: log_alpha_bar(schedule, t, dtype)
    # S traced timesteps end at S−1 or later.
    last = len(timesteps) - 1 if isinstance(timesteps, jax.core.Tracer) else int(timesteps[-1])
    check_published_pndm(schedule.T, last)
    table = jnp.asarray(schedule.log_alpha_bar_with_x0[1:], dtype)
    return lambda t: table[t.astype(jnp.int32) + 1]
