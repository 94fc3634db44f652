"""Heun's method for the probability-flow ODE."""

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, SamplerOutput
from s2dm_jax.samplers.common import call_network, scan_sampler, timestep_pairs
from s2dm_jax.samplers.thresholding import with_thresholding


@with_thresholding
def heun(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    return_x0: bool = False,
) -> SamplerOutput:
    """Heun's second-order method (Karras et al. 2022, algorithm 1, deterministic) for a network trained with noise that
    preserves variance; NFE 2S − 1. Contract: `s2dm_jax.samplers`.

    In x/alpha and ρ = sigma/alpha the ODE is d(x/alpha) = ε dρ. A step goes along ε at its start, and again along the
    mean of that and ε where it arrived; the step to the clean image, where ε is not defined, is Euler's.

    Args:
      return_x0: the predictions are those of the first evaluation of every step.
    """
    t, t_next = timestep_pairs(schedule, timesteps)
    # Evaluations in turn, [2S - 1]: at the start of a step, at its end. The last step has the first alone.
    first = jnp.arange(2 * len(t) - 1) % 2 == 0
    start, end = (jnp.repeat(each, 2)[:-1] for each in (t, t_next))
    signal, sigma = alpha_sigma(log_alpha_bar(schedule, start, x_T.dtype))
    signal_end, sigma_end = alpha_sigma(log_alpha_bar(schedule, end, x_T.dtype))
    h = sigma_end / signal_end - sigma / signal
    at = jnp.where(first, start, end)

    def evaluation(state, inputs):
        x, origin, slope = state
        first, at, signal, sigma, signal_end, h = inputs
        eps = call_network(eps_fn, x, at)
        origin = jnp.where(first, x / signal, origin)
        slope = jnp.where(first, eps, (slope + eps) / 2)
        return (signal_end * (origin + h * slope), origin, slope), predict_x0(x, eps, signal, sigma)

    zeros = jnp.zeros_like(x_T)
    output = scan_sampler(evaluation, (x_T, zeros, zeros), (first, at, signal, sigma, signal_end, h), return_x0)
    # alpha and sigma are those of first evaluations, and so the predictions are theirs alone.
    return (output[0], output[1][::2]) if return_x0 else output
