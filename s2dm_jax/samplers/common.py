"""Building blocks of the samplers: pairs of timesteps, the network call, the DDIM step, the scan over steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma
from s2dm_jax.diffusion.types import EpsFn, Output, SamplerOutput
from s2dm_jax.samplers.specs import check_options
from s2dm_jax.samplers.timesteps import check_timesteps


def timestep_pairs(schedule: NoiseSchedule, timesteps: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The timesteps in the order of sampling and the next one of each, at last −1, the clean image: float32 [S].

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
    """`check_options` for those that are not traced: the values of the others are unknown here."""
    concrete = {name: value for name, value in options.items() if not isinstance(value, jax.core.Tracer)}
    check_options(sampler, **concrete)


def scan_sampler(
    step: Callable[[Any, Any], tuple[Any, jax.Array]], x_T: Any, xs: Any, return_x0: bool
) -> SamplerOutput:
    """Runs a sampler's steps in one `lax.scan`, and returns what every sampler does.

    Args:
      step: (state, its entries of xs) → the next state, and the prediction x̂_0 [B, H, W, C].
      x_T: the first state: x_T [B, H, W, C], or a tuple of it and the sampler's history.
      xs: arrays [S, …], one entry per step.
      return_x0: also return the predictions, [S, B, H, W, C].
    """

    def body(state, inputs):
        state, x0 = step(state, inputs)
        return state, x0 if return_x0 else None

    state, predictions = jax.lax.scan(body, x_T, xs)
    x_0 = state[0] if isinstance(state, tuple) else state
    return (x_0, predictions) if return_x0 else x_0


def call_network(eps_fn: Callable[[jax.Array, jax.Array], Output], x: jax.Array, t: jax.Array) -> Output:
    """One call of the network at one timestep t [], with or without a variance head; its output in x's dtype."""
    output = eps_fn(x, jnp.full(x.shape[:1], t, jnp.float32))
    return jax.tree.map(lambda array: array.astype(x.dtype), output)


def ddim_step(x: jax.Array, eps: jax.Array, log_ab: jax.Array, log_ab_next: jax.Array) -> jax.Array:
    """x at another timestep if its noise is eps: the deterministic DDIM step (DDIM, eq. 13; PNDM, eq. 11)."""
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    return signal_next * predict_x0(x, eps, *alpha_sigma(log_ab)) + sigma_next * eps


def weighted_sum(weights: jax.Array | Sequence[float], arrays: jax.Array) -> jax.Array:
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
        raise ValueError(f"scale has shape {np.shape(scale)}; it must be one number per timestep, shape [T]")

    def scaled(x, t):
        factor = jnp.interp(t, jnp.arange(len(scale)), jnp.asarray(scale, x.dtype)).astype(x.dtype)  # [B]
        return eps_fn(x, t).astype(x.dtype) * factor.reshape(factor.shape + (1,) * (x.ndim - 1))

    return scaled
