"""The parts that every sampler is made of: pairs of timesteps, one network call, x̂_0, the scan over steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.diffusion.types import EpsFn, Output, SamplerOutput
from s2dm_jax.samplers.specs import check_options
from s2dm_jax.samplers.timesteps import check_timesteps


def timestep_pairs(schedule: NoiseSchedule, timesteps: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The timesteps in the order of sampling, and the one that each step arrives at: at last −1, the clean
    image.

    Args:
      timesteps: int [S], ascending, in [0, T); may be traced.

    Returns:
      t, t_next: float32 [S].

    Raises:
      ValueError: as `check_timesteps`; of traced timesteps only the shape can be checked.
    """
    if isinstance(timesteps, jax.core.Tracer):
        if timesteps.ndim != 1 or not 1 <= len(timesteps) <= schedule.T:
            raise ValueError(f"timesteps has shape {timesteps.shape}; it must be 1-D, of 1 to T={schedule.T} timesteps")
    else:
        timesteps = check_timesteps(schedule.T, timesteps)
    t = jnp.asarray(timesteps, jnp.float32)[::-1]
    return t, jnp.append(t[1:], -1.0)


def check_concrete_options(sampler: str, **options: Any) -> None:
    """`check_options` for those that are not traced: the values of the others are unknown here.

    Raises:
      ValueError: as `check_options`.
    """
    check_options(
        sampler,
        **{name: value for name, value in options.items() if not isinstance(value, jax.core.Tracer)},
    )


def scan_sampler(
    step: Callable[[Any, Any], tuple[Any, jax.Array]], x_T: Any, xs: Any, return_x0: bool
) -> SamplerOutput:
    """Runs a sampler's steps in one `lax.scan`.

    Args:
      step: (state, its entries of xs) → the next state, and the prediction x̂_0 [B, H, W, C].
      x_T: the first state: x_T [B, H, W, C], or a tuple that begins with it, followed by the sampler's
        history.
      xs: arrays [S, …], one entry per step.
      return_x0: also return the predictions.

    Returns:
      x_0 [B, H, W, C]; with `return_x0` a pair of it and the predictions [S, B, H, W, C].
    """

    def body(state, inputs):
        state, x0 = step(state, inputs)
        return state, x0 if return_x0 else None

    state, predictions = jax.lax.scan(body, x_T, xs)
    x_0 = state[0] if isinstance(state, tuple) else state
    return (x_0, predictions) if return_x0 else x_0


def alpha_sigma(log_alpha_bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    """√alpha_bar and √(1−alpha_bar): x_t = signal·x_0 + sigma·ε (DDPM, eq. 4)."""
    # abs, not minus: the clean image's sigma must not be −0, which a division would turn into −∞.
    return jnp.exp(log_alpha_bar / 2), jnp.sqrt(jnp.abs(jnp.expm1(log_alpha_bar)))


def call_network(eps_fn: Callable[[jax.Array, jax.Array], Output], x: jax.Array, t: jax.Array) -> Output:
    """One call of the network at one timestep t [], its output in x's dtype: x stays float32 around bfloat16.

    Of a network with a variance head, both outputs.
    """
    output = eps_fn(x, jnp.full(x.shape[:1], t, jnp.float32))
    return jax.tree.map(lambda array: array.astype(x.dtype), output)


def predict_x0(x: jax.Array, eps: jax.Array, signal: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_0 that x would have been made from if its noise were eps (DDIM, Song et al. 2020, eq. 9)."""
    return (x - sigma * eps) / signal


def ddim_step(x: jax.Array, eps: jax.Array, log_alpha_bar: jax.Array, log_alpha_bar_next: jax.Array) -> jax.Array:
    """x at another timestep if its noise is eps: the deterministic DDIM step (DDIM, eq. 13; PNDM, eq. 11)."""
    signal_next, sigma_next = alpha_sigma(log_alpha_bar_next)
    return signal_next * predict_x0(x, eps, *alpha_sigma(log_alpha_bar)) + sigma_next * eps


def weighted_sum(weights: jax.Array, arrays: jax.Array) -> jax.Array:
    """Sum of weights[k]·arrays[k] in the arrays' dtype."""
    return sum(weight * array for weight, array in zip(jnp.asarray(weights, arrays.dtype), arrays, strict=True))


def scale_eps(eps_fn: EpsFn, scale: np.ndarray | jax.Array) -> EpsFn:
    """The network with its output multiplied by a factor per timestep: S²-DM's optimum in closed form.

    Args:
      scale: float [T]; a fractional timestep gets the linear interpolation of its neighbours.

    Raises:
      ValueError: if `scale` is not 1-D.
    """
    if np.ndim(scale) != 1:
        raise ValueError(f"scale has shape {np.shape(scale)}; it is one number per timestep, shape [T]")

    def scaled(x, t):
        factor = jnp.interp(t, jnp.arange(len(scale)), jnp.asarray(scale, x.dtype)).astype(x.dtype)  # [B]
        return eps_fn(x, t).astype(x.dtype) * factor.reshape(factor.shape + (1,) * (x.ndim - 1))

    return scaled
