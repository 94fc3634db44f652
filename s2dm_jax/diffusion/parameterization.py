"""What a network's output means: the one place that turns it into ε, whatever the network predicts.

With x_t = α·x_0 + σ·ε (α = √alpha_bar, σ = √(1−alpha_bar)), a network predicts ε (DDPM), v = α·ε − σ·x_0
(Salimans & Ho 2022, appendix D) or x_0. Losses, samplers and statistics see ε alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from s2dm_jax.diffusion.schedule import NoiseSchedule, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn

PREDICTIONS: dict[str, Callable[..., jax.Array]] = {
    "epsilon": lambda output, x, alpha, sigma: output,
    "v": lambda output, x, alpha, sigma: alpha * output + sigma * x,
    "x0": lambda output, x, alpha, sigma: (x - alpha * output) / sigma,
}


def to_eps(output: jax.Array, x: jax.Array, t: jax.Array, schedule: NoiseSchedule, prediction: str) -> jax.Array:
    """ε in x_t from what the network predicts.

    Args:
      output, x: [B, H, W, C].
      t: [B], timesteps in 0 … T−1; may be fractional.
      schedule: the forward process.
      prediction: one of PREDICTIONS.
    """
    if prediction == "epsilon":
        return output
    log_ab = log_alpha_bar(schedule, t, output.dtype).reshape(-1, *[1] * (x.ndim - 1))  # [B, 1, 1, 1]
    alpha, sigma = jnp.exp(log_ab / 2), jnp.sqrt(-jnp.expm1(log_ab))
    return PREDICTIONS[prediction](output, x, alpha, sigma)


def eps_fn(apply: EpsFn, schedule: NoiseSchedule, prediction: str) -> EpsFn:
    """The function (x_t, t) → ε of a network that is a function (x_t, t) → its prediction."""

    def eps(x: jax.Array, t: jax.Array) -> jax.Array:
        return to_eps(apply(x, t), x, t, schedule, prediction)

    return eps
