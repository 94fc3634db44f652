"""Samplers: pure functions (eps_fn, x_T, schedule, timesteps, …) -> x_0, each a `lax.scan` over the levels.

`timesteps` is an ascending array of levels: its length is part of the compiled program, its values are not,
so a new grid of the same length compiles nothing. The step from the lowest level always arrives at the clean
image (level −1, alpha_bar = 1). Arithmetic is in x_T's dtype, whatever dtype the network answers in.
"""

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.schedule import NoiseSchedule, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, NoiseFn, SamplerOutput
from s2dm_jax.samplers.common import alpha_sigma, call_network, predict_x0, timestep_pairs


def ddim(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    eta: float | jax.Array = 0.0,
    noise_fn: NoiseFn | None = None,
    clip_x0: bool = False,
    return_x0: bool = False,
) -> SamplerOutput:
    """DDIM (Song et al. 2020, eq. 12 and 16; `generalized_steps` of its code).

    Args:
      x_T: [B, H, W, C].
      timesteps: int [S], ascending levels in [0, T).
      eta: 0 is deterministic, 1 has the posterior variance of DDPM; may be traced.
      noise_fn: step index -> standard normal [B, H, W, C]; needed unless eta is 0.
      clip_x0: clip each prediction of x_0 to [−1, 1], and let the step's ε be the one that agrees with it.
      return_x0: also return every step's prediction of x_0.

    Returns:
      x_0 [B, H, W, C]; with `return_x0` also the predictions [S, B, H, W, C], the noisiest level's first.

    Raises:
      ValueError: for a bad grid, eta outside [0, 1], or eta without `noise_fn`.
    """
    eta_is_traced = isinstance(eta, jax.core.Tracer)
    if not eta_is_traced and not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} is not allowed: 0 (deterministic) to 1 (DDPM's posterior variance)")
    if not eta_is_traced and eta == 0:
        noise_fn = None
    elif noise_fn is None:
        raise ValueError("ddim with eta above 0 draws noise at every step: noise_fn must say from where")

    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, level, x_T.dtype) for level in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    # The share of the new level's variance that is fresh: eq. 16 over 1−alpha_bar_next. It is 1 at most,
    # and the step to the clean image reaches that: rounding must not root a negative number there.
    fresh = jnp.asarray(eta, x_T.dtype) ** 2 * jnp.expm1(log_ab - log_ab_next) / jnp.expm1(log_ab)
    sigma_fresh = sigma_next * jnp.sqrt(fresh)
    sigma_kept = sigma_next * jnp.sqrt(jnp.maximum(1 - fresh, 0))

    def step(x, at):
        index, t, signal, sigma, signal_next, sigma_kept, sigma_fresh = at
        eps = call_network(eps_fn, x, t)
        x0 = predict_x0(x, eps, signal, sigma)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
            eps = (x - signal * x0) / sigma
        # Move to the next level along the predicted noise, then replace a part of it by fresh noise.
        x = signal_next * x0 + sigma_kept * eps
        if noise_fn is not None:
            x += sigma_fresh * noise_fn(index).astype(x.dtype)
        return x, x0 if return_x0 else None

    steps = (jnp.arange(len(t)), t, signal, sigma, signal_next, sigma_kept, sigma_fresh)
    x_0, predictions = jax.lax.scan(step, x_T, steps)
    return (x_0, predictions) if return_x0 else x_0


def ddpm(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    noise_fn: NoiseFn,
    variance: str = "large",
    clip_x0: bool = True,
    return_x0: bool = False,
) -> SamplerOutput:
    """DDPM's ancestral sampling over some of the levels (Ho et al. 2020, eq. 6, 7; DDIM code's `ddpm_steps`).

    Args:
      x_T: [B, H, W, C].
      timesteps: int [S], ascending levels in [0, T).
      noise_fn: step index -> standard normal [B, H, W, C]. The step to the clean image adds none.
      variance: of each step: "large" is beta, "small" the posterior's, beta·(1−alpha_bar_next)/(1−alpha_bar).
      clip_x0: clip each prediction of x_0 to [−1, 1].
      return_x0: also return every step's prediction of x_0.

    Returns:
      x_0 [B, H, W, C]; with `return_x0` also the predictions [S, B, H, W, C], the noisiest level's first.

    Raises:
      ValueError: for a bad grid or an unknown `variance`.
    """
    if variance not in ("large", "small"):
        raise ValueError(f"variance={variance!r} is not allowed: 'large' or 'small'")
    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, level, x_T.dtype) for level in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    # Skipping levels makes one step of many: its alpha is alpha_bar/alpha_bar_next.
    beta = -jnp.expm1(log_ab - log_ab_next)
    posterior_x0 = signal_next * beta / sigma**2
    posterior_x = signal / signal_next * (sigma_next / sigma) ** 2
    std = jnp.sqrt(beta) if variance == "large" else jnp.sqrt(beta) * sigma_next / sigma
    std = jnp.where(t_next < 0, 0, std)

    def step(x, at):
        index, t, signal, sigma, posterior_x0, posterior_x, std = at
        x0 = predict_x0(x, call_network(eps_fn, x, t), signal, sigma)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
        # Draw from q(x_next | x, x_0) with the prediction in the place of x_0.
        x = posterior_x0 * x0 + posterior_x * x + std * noise_fn(index).astype(x.dtype)
        return x, x0 if return_x0 else None

    steps = (jnp.arange(len(t)), t, signal, sigma, posterior_x0, posterior_x, std)
    x_0, predictions = jax.lax.scan(step, x_T, steps)
    return (x_0, predictions) if return_x0 else x_0
