"""Which timesteps an unclipped sampler may visit, so that the network's error stays small. Imports no jax."""

from typing import Any

import numpy as np

from s2dm_jax.samplers.specs import SAMPLERS, clips_x0

# The bound of DPM-Solver's authors for the cosine schedule, where alpha is 0.006 (`lambda_min_clipped` of diffusers);
# the linear schedule of 1000 timesteps ends at −5.06.
MIN_LOG_SNR = -5.1
# λ below which `check_step_lengths` applies: sigma is 4.5 times alpha.
_STEEP = -1.5


def num_visitable(T: int, sampler: str, min_log_snr: float, log_snr: np.ndarray | None, **options: Any) -> int:
    """How many timesteps, from 0 on, a sampler with these options may visit: those with λ of `min_log_snr` and more.

    The prediction x_0 = (x − sigma·ε)/alpha multiplies the network's error by sigma/alpha = e^(−λ). Where x_0 is
    clipped this does no harm, and all T may be visited.
    """
    if log_snr is None or clips_x0(sampler, **options):
        return T
    allowed = int(np.count_nonzero(log_snr >= min_log_snr))
    # The published PNDM reads alpha_bar one timestep later.
    return allowed - (options.get("pndm_convention") == "published" and allowed < T)


def check_step_lengths(sampler: str, timesteps: np.ndarray, log_snr: np.ndarray, **options: Any) -> None:
    """Refuses timesteps between which an unclipped sampler takes a longer step in λ, [T], than its `max_step`.

    Runge-Kutta and multistep formulas of ε are unstable there: an error of 1 % at λ = −5 grows to tens of standard
    deviations of the data. Where λ is above `_STEEP` a long step is merely inaccurate.
    """
    spec, start = SAMPLERS[sampler], log_snr[timesteps[1:]]
    steps = np.where(start < _STEEP, log_snr[timesteps[:-1]] - start, 0)
    if spec.evaluations_per_step == 1 and not spec.extra_evaluations:
        # Without a history the first step of a multistep solver is DDIM's.
        steps[-1:] = 0
    named = "dpmpp_3m" if sampler == "dpmpp" and options.get("order") == 3 else sampler
    longest, limit = np.argmax(steps) if len(steps) else 0, SAMPLERS[named].max_step
    if len(steps) and steps[longest] > limit:
        raise ValueError(
            f"timesteps {timesteps[longest + 1]} and {timesteps[longest]} are {steps[longest]:.1f} apart in "
            f"log(alpha/sigma), and {sampler} multiplies the network's error in steps above {limit:g}; give "
            "clip_x0=True, dynamic_threshold=0.995, more steps or another timestep_spacing"
        )


def beyond_bound(sampler: str, min_log_snr: float, visitable: int) -> str:
    """Why timesteps from `visitable` on are not visited, and what to do about it, as the end of a sentence."""
    last = f"timestep {visitable - 1}" if visitable else "none"
    return (
        f", but the last with log(alpha/sigma) of min_log_snr={min_log_snr:g} or more is {last}, and {sampler} "
        "divides by alpha without clipping; leave the later ones out, or give clip_x0=True, dynamic_threshold=0.995 or "
        "a lower min_log_snr"
    )
