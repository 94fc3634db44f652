"""What a network's output means: the one place that turns it into ε and x̂_0, whatever the network predicts.

With x_t = α·x_0 + σ·ε (α = √alpha_bar, σ = √(1−alpha_bar)), a network predicts ε (DDPM), v = α·ε − σ·x_0
(Salimans & Ho 2022, appendix D) or x_0. Losses, samplers and statistics see ε alone.
"""

from collections.abc import Callable

import jax

from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn

# Functions to ε of the network's output and x, [B, H, W, C], and of α and σ, [B, 1, 1, 1].
PREDICTIONS: dict[str, Callable[..., jax.Array]] = {
    "epsilon": lambda output, x, alpha, sigma: output,
    "v": lambda output, x, alpha, sigma: alpha * output + sigma * x,
    "x0": lambda output, x, alpha, sigma: (x - alpha * output) / sigma,
}


def predict_x0(x: jax.Array, eps: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The x_0 that x was made from if its noise is eps (DDIM, Song et al. 2020, eq. 9)."""
    return (x - sigma * eps) / alpha


def to_eps(output: jax.Array, x: jax.Array, t: jax.Array, schedule: NoiseSchedule, prediction: str) -> jax.Array:
    """ε in x [B, H, W, C] at timesteps t [B], perhaps fractional, from the output of a network of `prediction`."""
    if prediction == "epsilon":
        return output
    log_ab = log_alpha_bar(schedule, t, output.dtype).reshape(-1, *[1] * (x.ndim - 1))  # [B, 1, 1, 1]
    return PREDICTIONS[prediction](output, x, *alpha_sigma(log_ab))


def eps_fn(apply: EpsFn, schedule: NoiseSchedule, prediction: str) -> EpsFn:
    """The function (x_t, t) → ε of a network that is a function (x_t, t) → its prediction."""
    return lambda x, t: to_eps(apply(x, t), x, t, schedule, prediction)
