"""Bounds on a sampler's prediction of x_0: clipping to [−1, 1], and dynamic thresholding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, SamplerOutput
from s2dm_jax.samplers.specs import check_options


def threshold_x0(x0: jax.Array, clip_x0: bool, dynamic_threshold: float | None = None) -> jax.Array:
    """A prediction of x_0 [B, H, W, C], bounded to [−1, 1] if one of the options says so.

    Args:
      clip_x0: clip the values.
      dynamic_threshold: which quantile of each image's |x_0| is s, at least 1: clip to [−s, s] and divide by s (Imagen,
        Saharia et al. 2022, section 2.3); instead of clipping. None for no dynamic threshold.
    """
    if dynamic_threshold is not None:
        quantile = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), dynamic_threshold, axis=1)  # [B]
        bound = jnp.maximum(quantile, 1).astype(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
        return jnp.clip(x0, -bound, bound) / bound
    return jnp.clip(x0, -1, 1) if clip_x0 else x0


def bounded_eps(
    x: jax.Array, eps: jax.Array, log_ab: jax.Array, clip_x0: bool, dynamic_threshold: float | None
) -> jax.Array:
    """ε that agrees with the bounded prediction of x_0 (`threshold_x0`) at x with log alpha_bar `log_ab`; without a
    bound it is eps.
    """
    if not clip_x0 and dynamic_threshold is None:
        return eps
    alpha, sigma = alpha_sigma(log_ab)
    return (x - alpha * threshold_x0(predict_x0(x, eps, alpha, sigma), clip_x0, dynamic_threshold)) / sigma


def threshold_eps(
    eps_fn: EpsFn,
    log_alpha_bar_at: Callable[[jax.Array], jax.Array],
    clip_x0: bool = False,
    dynamic_threshold: float | None = None,
) -> EpsFn:
    """The network whose ε agrees with its bounded prediction of x_0: (x − alpha·x_0)/sigma, as DDIM's `clip_x0`.

    Args:
      log_alpha_bar_at: log alpha_bar at timesteps [B], those that the sampler computes with; they may be fractional.
      clip_x0, dynamic_threshold: as for `threshold_x0`; without either the network is returned as it is.
    """
    if not clip_x0 and dynamic_threshold is None:
        return eps_fn

    def thresholded(x, t):
        log_ab = log_alpha_bar_at(t).astype(x.dtype)  # [B]
        log_ab = log_ab.reshape(log_ab.shape + (1,) * (x.ndim - 1))
        return bounded_eps(x, eps_fn(x, t).astype(x.dtype), log_ab, clip_x0, dynamic_threshold)

    return thresholded


def with_thresholding(sampler: Callable[..., SamplerOutput]) -> Callable[..., SamplerOutput]:
    """A sampler of ε with the options `clip_x0` and `dynamic_threshold`, applied by `threshold_eps`."""

    @functools.wraps(sampler)
    def thresholding(
        eps_fn: EpsFn,
        x_T: jax.Array,
        schedule: NoiseSchedule,
        timesteps: Any,
        *,
        clip_x0: bool = False,
        dynamic_threshold: float | None = None,
        **options: Any,
    ) -> SamplerOutput:
        check_options(sampler.__name__, dynamic_threshold=dynamic_threshold)

        def log_alpha_bar_at(t):
            return log_alpha_bar(schedule, t, x_T.dtype)

        eps_fn = threshold_eps(eps_fn, log_alpha_bar_at, clip_x0, dynamic_threshold)
        return sampler(eps_fn, x_T, schedule, timesteps, **options)

    return thresholding
