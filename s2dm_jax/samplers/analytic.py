"""Sampling with the optimal covariance: Analytic-DPM (Bao et al. 2022a), SN- and NPR-DPM (Bao et al. 2022b).

All three know how uncertain x_0 is given x_t, per pixel and at most 1 (data in [−1, 1]), and give each
reverse step the variance that follows from it. Analytic-DPM has one number per level, from the mean square of
the predicted noise; SN and NPR have a second head of the network that says it for every pixel.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.schedule import NoiseSchedule, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, EpsVarianceFn, NoiseFn, SamplerOutput
from s2dm_jax.samplers.common import alpha_sigma, call_network, predict_x0, timestep_pairs

# The last noisy step's noise may have this mean absolute value at most, in grey levels (reference code).
CLIP_PIXEL = {"ddpm": 2.0, "ddim": 1.0}


def cov_x0(schedule: NoiseSchedule, ms_eps: np.ndarray) -> np.ndarray:
    """Mean variance of x_0 given x_t, per pixel: (1−ᾱ)/ᾱ·(1 − ms_eps) in [0, 1] (Analytic-DPM, theorem 1).

    Args:
      schedule: the forward process.
      ms_eps: float [T], mean square of the predicted noise at each level.

    Returns:
      float64 [T].

    Raises:
      ValueError: if there is not one finite number for each level.
    """
    ms_eps = np.asarray(ms_eps, np.float64)
    if ms_eps.shape != (schedule.T,) or not np.isfinite(ms_eps).all():
        raise ValueError(f"ms_eps must be {schedule.T} finite numbers, got shape {ms_eps.shape}")
    odds = (1 - schedule.alpha_bar) / schedule.alpha_bar
    return np.clip(odds * (1 - ms_eps), 0, 1)


def reverse_coefficients(
    log_ab: jax.Array, log_ab_next: jax.Array, mean: str, eta: float | jax.Array
) -> tuple[jax.Array, ...]:
    """A reverse step x_next = a·x̂_0 + b·y + noise, of variance base + gain·cov(x_0 | x_t).

    y is x_t for form "ddpm" (DDPM, eq. 7), the predicted noise for form "ddim" (DDIM, eq. 12).

    Args:
      log_ab, log_ab_next: log alpha_bar of the level and of the next one, [S].
      mean: "ddpm" or "ddim".
      eta: of form "ddim": 0 has no variance but the covariance's.

    Returns:
      a, b, base, gain: [S].
    """
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    beta = -jnp.expm1(log_ab - log_ab_next)
    posterior = beta * (sigma_next / sigma) ** 2
    if mean == "ddpm":
        a = signal_next * beta / sigma**2
        return a, signal / signal_next * (sigma_next / sigma) ** 2, posterior, a**2
    base = eta**2 * posterior
    b = jnp.sqrt(jnp.maximum(sigma_next**2 - base, 0))
    return signal_next, b, base, (signal_next - b * signal / sigma) ** 2


def analytic(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    cov_x0: np.ndarray,
    noise_fn: NoiseFn,
    mean: str = "ddpm",
    eta: float | jax.Array = 0.0,
    clip_pixel: float | None = None,
    clip_x0: bool = True,
    return_x0: bool = False,
) -> SamplerOutput:
    """Analytic-DPM (Bao et al. 2022a): ancestral (form "ddpm") or DDIM sampling with the optimal variance.

    Args:
      x_T: [B, H, W, C].
      timesteps: int [S], ascending levels in [0, T); published tables use `timesteps.linspace_timesteps`.
      cov_x0: float [T], from the function of that name.
      noise_fn: step index -> standard normal [B, H, W, C]. The step to the clean image adds none.
      mean: "ddpm" or "ddim".
      eta: of form "ddim", from 0 to 1.
      clip_pixel: bound on the noise of the last step that adds any, in grey levels of 255, mean absolute
        value; None for 2 (form "ddpm") or 1 (form "ddim"; also right for the cosine schedule), inf for none.
      clip_x0: clip each prediction of x_0 to [−1, 1].
      return_x0: also return every step's prediction of x_0.

    Returns:
      x_0 [B, H, W, C]; with `return_x0` also the predictions [S, B, H, W, C], the noisiest level's first.

    Raises:
      ValueError: for a bad grid or table, an unknown mean, eta outside [0, 1] or without form "ddim".
    """
    if np.shape(cov_x0) != (schedule.T,):
        raise ValueError(f"cov_x0 must be {schedule.T} numbers, one for each level, got {np.shape(cov_x0)}")
    table = jnp.asarray(cov_x0, x_T.dtype)

    def predict(x, t, odds):
        return call_network(eps_fn, x, t), table[t.astype(jnp.int32)]

    return _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, clip_x0, return_x0)


def sn(
    eps_variance_fn: EpsVarianceFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    noise_fn: NoiseFn,
    mean: str = "ddpm",
    eta: float | jax.Array = 0.0,
    clip_pixel: float | None = None,
    clip_x0: bool = True,
    return_x0: bool = False,
) -> SamplerOutput:
    """SN-DPM (Bao et al. 2022b): the second head predicts E[ε²|x_t], and cov(ε|x_t) = head − ε̂².

    Arguments, result and errors as for `analytic`, without `cov_x0`.
    """

    def predict(x, t, odds):
        eps, head = call_network(eps_variance_fn, x, t)
        return eps, jnp.clip(odds * (head - eps**2), 0, 1)

    return _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, clip_x0, return_x0)


def npr(
    eps_variance_fn: EpsVarianceFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    noise_fn: NoiseFn,
    mean: str = "ddpm",
    eta: float | jax.Array = 0.0,
    clip_pixel: float | None = None,
    clip_x0: bool = True,
    return_x0: bool = False,
) -> SamplerOutput:
    """NPR-DPM (Bao et al. 2022b): the second head predicts E[(ε−ε̂)²|x_t], the residual of ε̂ as it is.

    Arguments, result and errors as for `analytic`, without `cov_x0`.
    """

    def predict(x, t, odds):
        eps, head = call_network(eps_variance_fn, x, t)
        return eps, jnp.clip(odds * head, 0, 1)

    return _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, clip_x0, return_x0)


def _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, clip_x0, return_x0):
    """The sampler of all three; predict: (x, t, (1−ᾱ)/ᾱ) -> ε̂ and cov(x_0 | x), per pixel or one number."""
    if mean not in CLIP_PIXEL:
        raise ValueError(f"mean={mean!r} is not allowed: {' or '.join(map(repr, CLIP_PIXEL))}")
    if not isinstance(eta, jax.core.Tracer):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not allowed: 0 (deterministic) to 1 (DDPM's posterior variance)")
        if eta and mean == "ddpm":
            raise ValueError(f"eta={eta} is no option of mean='ddpm', only of mean='ddim'")
    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, level, x_T.dtype) for level in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    a, b, base, gain = reverse_coefficients(log_ab, log_ab_next, mean, jnp.asarray(eta, x_T.dtype))
    # Mean |noise| of y grey levels: std = y·(2/255)·√(π/2), in units of [−1, 1].
    pixels = CLIP_PIXEL[mean] if clip_pixel is None else clip_pixel
    cap = jnp.full(len(t), jnp.inf, x_T.dtype)
    # The step before the last is the last that adds noise: what it adds stays visible.
    cap = cap.at[-2:].set((pixels * 2 / 255) ** 2 * math.pi / 2).at[-1].set(0)

    def step(x, at):
        index, t, signal, sigma, a, b, base, gain, cap = at
        eps, cov = predict(x, t, (sigma / signal) ** 2)
        x0 = predict_x0(x, eps, signal, sigma)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
        std = jnp.sqrt(jnp.minimum(base + gain * cov, cap))
        # As in the reference code, ε̂ stays what the network said where x_0 is clipped.
        x = a * x0 + b * (x if mean == "ddpm" else eps) + std * noise_fn(index).astype(x.dtype)
        return x, x0 if return_x0 else None

    steps = (jnp.arange(len(t)), t, signal, sigma, a, b, base, gain, cap)
    x_0, predictions = jax.lax.scan(step, x_T, steps)
    return (x_0, predictions) if return_x0 else x_0


def optimal_timesteps(schedule: NoiseSchedule, ms_eps: np.ndarray, steps: int) -> np.ndarray:
    """The levels that minimise the variational bound with the optimal variance, by dynamic programming.

    Analytic-DPM, section 4: a step from level r to level s costs log(1 − β_{s→r}·ms_eps_r/(1−ᾱ_r)), where
    1 − β_{s→r} = ᾱ_r/ᾱ_s; the path goes from level T−1 to the clean image. Where the estimate lets no
    variance remain (ms_eps of 1 and more, mere noise), x_0 counts as uncertain as at the level below.

    Args:
      schedule: the forward process.
      ms_eps: float [T], mean square of the predicted noise at each level.
      steps: number of levels, 1 to T.

    Returns:
      int32 [steps], ascending, the last one T−1.

    Raises:
      ValueError: for another number of steps, or a bad `ms_eps`.
    """
    T = schedule.T
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is not a number of steps that T={T} levels allow: 1 to {T}")
    cost = np.ascontiguousarray(step_costs(schedule, ms_eps).T)
    # best[r]: the least cost from level r−1 to the clean image (r = 0) in as many steps as were looked at.
    best = np.concatenate([[0.0], np.full(T, np.inf)])
    came_from = np.zeros((steps, T + 1), np.int32)
    for k in range(steps):
        totals = best + cost
        came_from[k] = totals.argmin(1)
        best = totals[np.arange(T + 1), came_from[k]]
    path, r = [], T
    for k in reversed(range(steps)):
        path.append(r - 1)
        r = came_from[k, r]
    return np.array(path[::-1], np.int32)


def step_costs(schedule: NoiseSchedule, ms_eps: np.ndarray) -> np.ndarray:
    """What a step costs in `optimal_timesteps`.

    Returns:
      float64 [T+1, T+1]: entry (s, r) is the step from level r−1 to level s−1, inf unless s < r.
    """
    cov = cov_x0(schedule, ms_eps)
    for level in np.flatnonzero(cov == 0):
        cov[level] = cov[level - 1] if level else 1e-12
    ab = schedule.alpha_bar_with_x0
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = ab[None, 1:] / ab[:, None]
        # ms_eps/(1−ᾱ) again, from the covariance as it counts here.
        score = (1 - cov * ab[1:] / (1 - ab[1:])) / (1 - ab[1:])
        cost = np.log(1 - (1 - kept) * score)
    s, r = np.indices(cost.shape)
    cost = np.where(s <= r, cost, np.inf)
    return np.concatenate([np.full((len(ab), 1), np.inf), cost], axis=1)
