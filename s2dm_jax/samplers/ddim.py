"""DDIM and DDPM's ancestral sampling."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, EpsVarianceFn, NoiseFn, SamplerOutput
from s2dm_jax.samplers.common import call_network, check_concrete_options, scan_sampler, timestep_pairs
from s2dm_jax.samplers.thresholding import threshold_x0


def ddim(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    eta: float | jax.Array = 0.0,
    noise_fn: NoiseFn | None = None,
    clip_x0: bool = False,
    dynamic_threshold: float | None = None,
    raw_eps: bool = False,
    return_x0: bool = False,
) -> SamplerOutput:
    """DDIM (Song et al. 2020, eq. 12 and 16; `generalized_steps` of its code). Contract: `s2dm_jax.samplers`.

    Args:
      eta: 0 is deterministic, 1 has the posterior variance of DDPM; may be traced.
      noise_fn: needed unless eta is 0.
      clip_x0, dynamic_threshold: also make the step's ε agree with the bounded prediction, unless `raw_eps`.
      raw_eps: whether ε stays the network's when the prediction is clipped, as in the plain DDIM of Analytic-DPM's
        code (Bao et al. 2022a), which produced SA-DPM's CelebA results; needs one of the two.
    """
    bounds = clip_x0, dynamic_threshold
    options = {"clip_x0": clip_x0, "dynamic_threshold": dynamic_threshold, "raw_eps": raw_eps}
    check_concrete_options("ddim", eta=eta, **options)
    if not isinstance(eta, jax.core.Tracer) and eta == 0:
        noise_fn = None
    elif noise_fn is None:
        raise ValueError("eta above 0 draws noise at every step of ddim: give noise_fn")

    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, s, x_T.dtype) for s in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    # The share of the next timestep's variance that is fresh: eq. 16 over 1−alpha_bar_next. It is 1 at most, and the
    # step to the clean image reaches that: rounding must not root a negative number there.
    fresh = jnp.asarray(eta, x_T.dtype) ** 2 * jnp.expm1(log_ab - log_ab_next) / jnp.expm1(log_ab)
    sigma_fresh = sigma_next * jnp.sqrt(fresh)
    sigma_eps = sigma_next * jnp.sqrt(jnp.maximum(1 - fresh, 0))

    def step(x, inputs):
        index, t, signal, sigma, signal_next, sigma_eps, sigma_fresh = inputs
        eps = call_network(eps_fn, x, t)
        x0 = predict_x0(x, eps, signal, sigma)
        x0 = threshold_x0(x0, *bounds)
        if (clip_x0 or dynamic_threshold is not None) and not raw_eps:
            eps = (x - signal * x0) / sigma
        # Move to the next timestep along the predicted noise, a part of which is replaced by fresh noise.
        x = signal_next * x0 + sigma_eps * eps
        if noise_fn is not None:
            x += sigma_fresh * noise_fn(index).astype(x.dtype)
        return x, x0

    steps = (jnp.arange(len(t)), t, signal, sigma, signal_next, sigma_eps, sigma_fresh)
    return scan_sampler(step, x_T, steps, return_x0)


def ddpm(
    eps_fn: EpsFn | EpsVarianceFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    noise_fn: NoiseFn,
    variance: str = "large",
    clip_x0: bool = True,
    dynamic_threshold: float | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """DDPM's ancestral sampling (Ho et al. 2020, eq. 6, 7; DDIM code's `ddpm_steps`). Contract: `s2dm_jax.samplers`.

    The learned variance is eq. 15 of Nichol & Dhariwal (2021), log Σ = (1+v)/2·log β + (1−v)/2·log of the posterior's.

    Args:
      variance: of each step: "large" is beta, "small" the posterior's, beta·(1−alpha_bar_next)/(1−alpha_bar); "learned"
        is between them by the network's second output v in [−1, 1], for each pixel: `eps_fn` gives ε and v.
    """
    bounds = clip_x0, dynamic_threshold
    check_concrete_options("ddpm", variance=variance, clip_x0=clip_x0, dynamic_threshold=dynamic_threshold)
    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, s, x_T.dtype) for s in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    # Skipping timesteps makes one step of many: its alpha is alpha_bar/alpha_bar_next.
    beta = -jnp.expm1(log_ab - log_ab_next)
    posterior_x0 = signal_next * beta / sigma**2
    posterior_x = signal / signal_next * (sigma_next / sigma) ** 2
    std = jnp.sqrt(beta) * sigma_next / sigma if variance == "small" else jnp.sqrt(beta)
    std = jnp.where(t_next < 0, 0, std)
    # The last step adds no noise, and there the ratio's logarithm is infinite.
    log_ratio = 2 * jnp.log(jnp.where(t_next < 0, 1, sigma_next / sigma)) if variance == "learned" else None

    def step(x, inputs):
        index, t, signal, sigma, posterior_x0, posterior_x, std, log_ratio = inputs
        eps: Any = call_network(eps_fn, x, t)
        if variance == "learned":
            eps, v = eps
            std = std * jnp.exp((1 - v) / 4 * log_ratio)
        x0 = threshold_x0(predict_x0(x, eps, signal, sigma), *bounds)
        # Draw from q(x_next | x, x_0) with the prediction in the place of x_0.
        return posterior_x0 * x0 + posterior_x * x + std * noise_fn(index).astype(x.dtype), x0

    steps = (jnp.arange(len(t)), t, signal, sigma, posterior_x0, posterior_x, std, log_ratio)
    return scan_sampler(step, x_T, steps, return_x0)
