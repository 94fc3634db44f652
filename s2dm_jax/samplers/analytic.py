"""Sampling with the optimal covariance: Analytic-DPM (Bao et al. 2022a), SN- and NPR-DPM (Bao et al. 2022b).

All three estimate the variance of x_0 given x_t, per pixel and at most 1 (data in [−1, 1]), and each reverse step has
the variance that follows from it. Analytic-DPM has one number per timestep, from the mean square of the predicted
noise; SN and NPR have a variance head of the network, with an output for every pixel.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, EpsVarianceFn, NoiseFn, SamplerOutput
from s2dm_jax.samplers.common import call_network, check_concrete_options, scan_sampler, timestep_pairs
from s2dm_jax.samplers.thresholding import threshold_x0
from s2dm_jax.samplers.timesteps import check_steps

# The last noisy step's noise may have this mean absolute value at most, in grey values (reference code).
CLIP_PIXEL = {"ddpm": 2.0, "ddim": 1.0}
# Below this alpha_bar/(1−alpha_bar), x_t leaves x_0 as uncertain as without it, but for 3 % of its variance at most.
_ALMOST_NO_SIGNAL = 0.03
# Variance of x_0 given x_t, per pixel, of ε̂, the variance head's output and (1−ᾱ)/ᾱ.
HEAD_COV_X0 = {
    "sn": lambda eps, head, odds: jnp.clip(odds * (head - eps**2), 0, 1),
    "npr": lambda eps, head, odds: jnp.clip(odds * head, 0, 1),
}


def cov_x0(schedule: NoiseSchedule, ms_eps: np.ndarray) -> np.ndarray:
    """Mean variance of x_0 given x_t, per pixel: (1−ᾱ)/ᾱ·(1 − ms_eps) in [0, 1] (Analytic-DPM, theorem 1); float64 [T].

    `ms_eps` [T] is the mean square of the predicted noise at each timestep; a ValueError unless it is T finite numbers.
    """
    return np.clip(_unbounded_cov_x0(schedule, ms_eps), 0, 1)


def _unbounded_cov_x0(schedule, ms_eps):
    ms_eps = np.asarray(ms_eps, np.float64)
    if ms_eps.shape != (schedule.T,) or not np.isfinite(ms_eps).all():
        raise ValueError(f"ms_eps must be {schedule.T} finite numbers, got shape {ms_eps.shape}")
    return (1 - schedule.alpha_bar) / schedule.alpha_bar * (1 - ms_eps)


def reverse_coefficients(
    log_ab: jax.Array, log_ab_next: jax.Array, mean: str, eta: float | jax.Array
) -> tuple[jax.Array, ...]:
    """a, b, base_var, cov_gain [S] of the steps x_next = a·x̂_0 + b·y + noise, from log alpha_bar at both ends [S].

    y is x_t for mean "ddpm" (DDPM, eq. 7), the predicted noise for mean "ddim" (DDIM, eq. 12). The noise has variance
    base_var + cov_gain·cov(x_0 | x_t).
    """
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    beta = -jnp.expm1(log_ab - log_ab_next)
    posterior = beta * (sigma_next / sigma) ** 2
    if mean == "ddpm":
        a = signal_next * beta / sigma**2
        return a, signal / signal_next * (sigma_next / sigma) ** 2, posterior, a**2
    base_var = eta**2 * posterior
    b = jnp.sqrt(jnp.maximum(sigma_next**2 - base_var, 0))
    return signal_next, b, base_var, (signal_next - b * signal / sigma) ** 2


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
    dynamic_threshold: float | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """Analytic-DPM (Bao et al. 2022a): sampling with the optimal variance. Contract: `s2dm_jax.samplers`.

    Args:
      timesteps: published tables use `timesteps.linspace_timesteps`.
      cov_x0: float [T], from the function of that name.
      mean: "ddpm" for ancestral sampling, "ddim" for DDIM's.
      eta: of mean "ddim", from 0 to 1; may be traced.
      clip_pixel: bound on the noise of the last step that adds any, in grey values of 255, mean absolute value; None
        for 2 (mean "ddpm") or 1 (mean "ddim"; also right for the cosine schedule), inf for none.
    """
    if np.shape(cov_x0) != (schedule.T,):
        raise ValueError(f"cov_x0 must be {schedule.T} numbers, one for each timestep, got {np.shape(cov_x0)}")
    table = jnp.asarray(cov_x0, x_T.dtype)

    def predict(x, t, odds):
        return call_network(eps_fn, x, t), table[t.astype(jnp.int32)]

    bounds = clip_x0, dynamic_threshold
    return _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, bounds, return_x0)


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
    dynamic_threshold: float | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """SN-DPM (Bao et al. 2022b): the variance head predicts E[ε²|x_t], and cov(ε|x_t) = E[ε²|x_t] − ε̂².

    `eps_variance_fn` is (x [B, H, W, C], t [B]) → ε̂ and the variance head's output, both [B, H, W, C]; the other
    arguments, the result and the errors are those of `analytic`.
    """

    def predict(x, t, odds):
        eps, eps_squared = call_network(eps_variance_fn, x, t)
        return eps, HEAD_COV_X0["sn"](eps, eps_squared, odds)

    bounds = clip_x0, dynamic_threshold
    return _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, bounds, return_x0)


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
    dynamic_threshold: float | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """NPR-DPM (Bao et al. 2022b): the variance head predicts E[(ε−ε̂)²|x_t], the residual of ε̂ as it is.

    `eps_variance_fn` is (x [B, H, W, C], t [B]) → ε̂ and the variance head's output, both [B, H, W, C]; the other
    arguments, the result and the errors are those of `analytic`.
    """

    def predict(x, t, odds):
        eps, residual = call_network(eps_variance_fn, x, t)
        return eps, HEAD_COV_X0["npr"](eps, residual, odds)

    bounds = clip_x0, dynamic_threshold
    return _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, bounds, return_x0)


def _optimal(predict, x_T, schedule, timesteps, noise_fn, mean, eta, clip_pixel, bounds, return_x0):
    """The sampler of all three; predict: (x, t, (1−ᾱ)/ᾱ) → ε̂ and cov(x_0 | x), per pixel or one number."""
    check_concrete_options("analytic", mean=mean, eta=eta, dynamic_threshold=bounds[1])
    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, s, x_T.dtype) for s in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    a, b, base_var, cov_gain = reverse_coefficients(log_ab, log_ab_next, mean, jnp.asarray(eta, x_T.dtype))
    # Mean |noise| of y grey values: std = y·(2/255)·√(π/2), in units of [−1, 1].
    pixels = CLIP_PIXEL[mean] if clip_pixel is None else clip_pixel
    max_var = jnp.full(len(t), jnp.inf, x_T.dtype)
    # The step before the last is the last that adds noise: what it adds stays visible.
    max_var = max_var.at[-2:].set((pixels * 2 / 255) ** 2 * math.pi / 2).at[-1].set(0)

    def step(x, inputs):
        index, t, signal, sigma, a, b, base_var, cov_gain, max_var = inputs
        eps, cov = predict(x, t, (sigma / signal) ** 2)
        x0 = threshold_x0(predict_x0(x, eps, signal, sigma), *bounds)
        std = jnp.sqrt(jnp.minimum(base_var + cov_gain * cov, max_var))
        # As in the reference code, ε̂ stays the network's output where x_0 is clipped.
        return a * x0 + b * (x if mean == "ddpm" else eps) + std * noise_fn(index).astype(x.dtype), x0

    steps = (jnp.arange(len(t)), t, signal, sigma, a, b, base_var, cov_gain, max_var)
    return scan_sampler(step, x_T, steps, return_x0)


def optimal_timesteps(schedule: NoiseSchedule, ms_eps: np.ndarray, steps: int) -> np.ndarray:
    """The timesteps that minimise the variational bound with the optimal variance (Analytic-DPM, section 4).

    A step from timestep r to s costs log(1 − β_{s→r}·ms_eps_r/(1−ᾱ_r)), where 1 − β_{s→r} = ᾱ_r/ᾱ_s; dynamic
    programming finds the cheapest path from T−1 to the clean image. x_0 is no less uncertain at a later timestep:
    estimates of which it were are pooled with their neighbours, or the path would go through the timesteps whose
    ms_eps is too large by chance.

    Args:
      ms_eps: float [T], mean square of the predicted noise at each timestep.
      steps: number of timesteps, 1 to T.

    Returns:
      int32 [steps], ascending, the last one T−1.

    Raises:
      ValueError: for another number of steps, or an `ms_eps` that is not T finite numbers.
    """
    T = schedule.T
    check_steps(T, steps)
    cost = np.ascontiguousarray(step_costs(schedule, ms_eps).T)  # [r, s]
    # best[r]: the least cost from timestep r−1 to the clean image (r = 0) in k steps.
    best = np.concatenate([[0.0], np.full(T, np.inf)])
    next_on_path = np.zeros((steps, T + 1), np.int32)
    for k in range(steps):
        totals = best + cost  # [r, s]
        next_on_path[k] = totals.argmin(1)
        best = totals[np.arange(T + 1), next_on_path[k]]
    path, r = [], T
    for k in reversed(range(steps)):
        path.append(r - 1)
        r = next_on_path[k, r]
    return np.array(path[::-1], np.int32)


def step_costs(schedule: NoiseSchedule, ms_eps: np.ndarray) -> np.ndarray:
    """Costs for `optimal_timesteps`: entry (s, r) [T+1, T+1] is the step from timestep r−1 to s−1, inf unless s < r."""
    cov = np.clip(_ascending_cov_x0(schedule, ms_eps), 1e-12, 1)
    ab = schedule.alpha_bar_with_x0
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = ab[None, 1:] / ab[:, None]  # [T+1, T]: of the step from column's to row's timestep
        # ms_eps/(1−ᾱ) again, from the covariance as it counts here.
        score = (1 - cov * ab[1:] / (1 - ab[1:])) / (1 - ab[1:])
        cost = np.log(1 - (1 - alpha) * score)
    s, r = np.indices(cost.shape)
    cost = np.where(s <= r, cost, np.inf)
    return np.concatenate([np.full((len(ab), 1), np.inf), cost], axis=1)  # [T+1, T+1]


def _ascending_cov_x0(schedule, ms_eps):
    """The mean variance of x_0 given x_t from noisy estimates: as it never descends in t, the nearest that does not."""
    # Its import takes half a second, which only these timesteps need.
    from sklearn.isotonic import isotonic_regression

    cov, snr = _unbounded_cov_x0(schedule, ms_eps), schedule.alpha_bar / (1 - schedule.alpha_bar)
    late = snr < _ALMOST_NO_SIGNAL
    # The last estimates are the noisiest, and nothing beyond them holds them down.
    if (np.diff(cov[late]) < 0).any():
        cov[late] = np.average(cov[late], weights=snr[late] ** 2)
    # 1/snr multiplies the error of ms_eps.
    return isotonic_regression(cov, sample_weight=snr**2)
