"""The discrete variational bound on −log p(x_0) of a chain of Gaussian steps (DDPM, Ho et al. 2020, eq. 5; S²-DMs,
eq. 3), in bits per dimension: L = L_T + L_{T−1} + … + L_0.

A chain visits any timesteps of a schedule: a step from timestep r to the next one s has alpha = ᾱ_r/ᾱ_s, and that
from the first timestep to the clean image is the decoder, L_0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from numpy.typing import ArrayLike

from s2dm_jax.diffusion.schedule import NoiseSchedule

_LEVELS = 256
# Variance of rounding to 8 bits: an estimate of cov(x_0|x_t), which may be 0, counts as no less in the decoder.
_LEAST_DECODER_VARIANCE = (2 / (_LEVELS - 1)) ** 2 / 12


class ChainSteps(NamedTuple):
    """The steps of a chain, [S] each, the one to the clean image first; with r and s as above.

    Attributes:
      t: int32, the timestep r.
      log_alpha_bar: of r.
      log_posterior: logarithm of β̃ = (1−ᾱ_s)/(1−ᾱ_r)·β, the variance of q(x_s|x_r,x_0). That of the first step is 0:
        it has the second's (Nichol & Dhariwal 2021, code), or β where there is no second.
      log_range: log β − log β̃, with β = 1 − ᾱ_r/ᾱ_s.
      gain: squared weight of x_0 in the mean of q(x_s|x_r,x_0) over β̃, ᾱ_s/(1−ᾱ_s) − ᾱ_r/(1−ᾱ_r); 0 at the first.
      is_decoder: bool, whether the step is the first.
    """

    t: jax.Array
    log_alpha_bar: jax.Array
    log_posterior: jax.Array
    log_range: jax.Array
    gain: jax.Array
    is_decoder: jax.Array


def chain_steps(schedule: NoiseSchedule, timesteps: ArrayLike) -> ChainSteps:
    """The steps of the chain that visits `timesteps`, int [S], ascending; numpy, float64."""
    t = np.asarray(timesteps, np.int32)
    log_ab = schedule.log_alpha_bar_with_x0[t + 1]
    log_ab_next = np.concatenate([[0.0], log_ab[:-1]])
    log_beta = np.log(-np.expm1(log_ab - log_ab_next))
    log_noise = np.log(-np.expm1(log_ab))  # log(1 − ᾱ)
    posterior = log_beta[1:] + log_noise[:-1] - log_noise[1:]
    posterior = np.concatenate([posterior[:1] if len(t) > 1 else log_beta, posterior])
    gain = np.exp(log_ab_next[1:] + log_beta[1:] - log_noise[1:] - log_noise[:-1])
    tables: Any = t, log_ab, posterior, log_beta - posterior, np.append(0.0, gain), np.arange(len(t)) == 0
    return ChainSteps(*tables)


# The model's variance of a step as log(σ²/β̃), from the step and, of each pixel or of all, v in [−1, 1] or cov(x_0|x_t).


def small_variance(step: ChainSteps, _: Any) -> jax.Array:
    """σ² = β̃ (DDPM, section 3.2)."""
    return jnp.zeros_like(step.log_range)


def large_variance(step: ChainSteps, _: Any) -> jax.Array:
    """σ² = β (DDPM, section 3.2), in the decoder β̃ of the second step (Nichol & Dhariwal 2021, code)."""
    return jnp.where(step.is_decoder, 0, step.log_range)


def learned_variance(step: ChainSteps, v: jax.Array) -> jax.Array:
    """log σ² = (1+v)/2·log β + (1−v)/2·log β̃ (Nichol & Dhariwal 2021, eq. 15)."""
    return (1 + v) / 2 * step.log_range


def optimal_variance(step: ChainSteps, cov: jax.Array) -> jax.Array:
    """σ² = β̃ + a²·cov(x_0|x_t), a the weight of x_0 in the posterior's mean (Analytic-DPM, theorem 1).

    In the decoder it is cov(x_0|x_t) itself, at least the variance of rounding to 8 bits.
    """
    decoder = jnp.log(jnp.maximum(cov, _LEAST_DECODER_VARIANCE)) - step.log_posterior
    return jnp.where(step.is_decoder, decoder, jnp.log1p(step.gain * cov))


VARIANCES: dict[str, Callable[[ChainSteps, Any], jax.Array]] = {
    "small": small_variance,
    "large": large_variance,
    "learned": learned_variance,
    **dict.fromkeys(("analytic", "sn", "npr"), optimal_variance),
}


def prior_coefficients(schedule: NoiseSchedule, t: int) -> tuple[np.float64, np.float64]:
    """ᾱ and −log(1−ᾱ) − ᾱ of a chain's last timestep, for `prior_term`: float32 would lose the difference."""
    ab = schedule.alpha_bar[t]
    return ab, -np.log1p(-ab) - ab


def prior_term(x0: jax.Array, coefficients: tuple[jax.Array, jax.Array]) -> jax.Array:
    """L_T = KL(q(x_T|x_0) ‖ N(0, 1)) (DDPM, eq. 5), from images [B, H, W, C]; bits per dimension [B]."""
    ab, rest = coefficients
    return _bits((ab * jnp.square(x0) + rest) / 2)


def kl_term(step: ChainSteps, error: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """KL(q(x_s|x_r,x_0) ‖ p(x_s|x_r)) (DDPM, eq. 5 and 8), in bits per dimension [B].

    Args:
      step: one step of `chain_steps`, not the first.
      error: x_0 − x̂_0, [B, H, W, C].
      log_ratio: log(σ²/β̃), from one of VARIANCES; [] or [B, H, W, C].
    """
    # log r + 1/r − 1 of r almost 1 would cancel in float32.
    return _bits((log_ratio + jnp.expm1(-log_ratio) + step.gain * jnp.square(error) * jnp.exp(-log_ratio)) / 2)


def decoder_log_prob(x0: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """log of the Gaussian's integral over the bin of x_0, one of 256 levels in [−1, 1], the two at the ends unbounded
    (DDPM, eq. 13); natural logarithm, of the arguments' shape.

    The tails are exact, where published codes bound the probability by 1e-12.
    """
    half, std = 1 / (_LEVELS - 1), jnp.exp(log_variance / 2)
    below = jnp.where(x0 < -1 + half, -jnp.inf, (x0 - half - mean) / std)
    above = jnp.where(x0 > 1 - half, jnp.inf, (x0 + half - mean) / std)
    # In the lower tail Φ has all its digits: an interval in the upper one is mirrored.
    upper = x0 > mean
    low, high = jnp.where(upper, -above, below), jnp.where(upper, -below, above)
    log_high = log_ndtr(high)
    return log_high + jnp.log(-jnp.expm1(log_ndtr(low) - log_high))


def decoder_term(step: ChainSteps, x0: jax.Array, x0_hat: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """L_0 = −log p(x_0|x_1) (DDPM, eq. 13) of the first step, in bits per dimension [B]; arguments as `kl_term`'s."""
    return _bits(-decoder_log_prob(x0, x0_hat, step.log_posterior + log_ratio))


def bound_term(step: ChainSteps, x0: jax.Array, x0_hat: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """The term of any one step, `decoder_term` or `kl_term`: [B]."""
    decoder = lambda: decoder_term(step, x0, x0_hat, log_ratio)  # noqa: E731
    return jax.lax.cond(step.is_decoder, decoder, lambda: kl_term(step, x0 - x0_hat, log_ratio))


def _bits(nats: jax.Array) -> jax.Array:
    return nats.mean((1, 2, 3)) / np.log(2)
