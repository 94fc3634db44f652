"""Samplers: pure functions (eps_fn, x_T, schedule, timesteps, …) -> x_0, each a `lax.scan` over the levels.

`timesteps` is an ascending array of levels: its length is part of the compiled program, its values are not,
so a new grid of the same length compiles nothing. The step from the lowest level always arrives at the clean
image (level −1, alpha_bar = 1). Arithmetic is in x_T's dtype, whatever dtype the network answers in.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from s2dm_jax.covariance import analytic, npr, sn
from s2dm_jax.multistep import deis, dpmpp_2m, unipc
from s2dm_jax.pndm import f_pndm, s_pndm
from s2dm_jax.schedule import NoiseSchedule, log_alpha_bar
from s2dm_jax.steps import EpsFn, NoiseFn, Sampled, descend, evaluate, predict_x0, signal_and_sigma

# Streams of a sampling seed. Training folds its step number into its seed: these are numbers that no run
# reaches, so that sampling with the training's seed does not draw the training's noise again.
_X_T_STREAM = np.uint32(2**32 - 1)
_STEP_STREAM = np.uint32(2**32 - 2)


def initial_noise(
    seed: int | jax.Array,
    indices: jax.Array | np.ndarray,
    shape: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """x_T of the images with these indices: standard normal, image i depends on (seed, i) alone.

    Args:
      indices: int [B].
      shape: one image's, (H, W, C).

    Returns:
      dtype [B, H, W, C].
    """
    stream = jax.random.fold_in(jax.random.key(seed), _X_T_STREAM)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(stream, i), shape, dtype))(indices)


def image_keys(seed: int | jax.Array, indices: jax.Array | np.ndarray) -> jax.Array:
    """Keys [B] for `per_image_noise`: key i depends on (seed, i) alone, apart from x_T's noise."""
    stream = jax.random.fold_in(jax.random.key(seed), _STEP_STREAM)
    return jax.vmap(lambda i: jax.random.fold_in(stream, i))(indices)


def per_image_noise(keys: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> NoiseFn:
    """A `noise_fn` for the stochastic samplers: the draw for image i at step j depends on (keys[i], j) alone.

    Args:
      keys: key array [B].
      shape: one image's, (H, W, C).

    Returns:
      Function of the step index j, counted from 0 in the order of sampling, giving dtype [B, H, W, C].
    """

    def noise_fn(step):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, dtype))(keys)

    return noise_fn


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
) -> Sampled:
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

    t, t_next = descend(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, level, x_T.dtype) for level in (t, t_next))
    signal, sigma = signal_and_sigma(log_ab)
    signal_next, sigma_next = signal_and_sigma(log_ab_next)
    # The share of the new level's variance that is fresh: eq. 16 over 1−alpha_bar_next. It is 1 at most,
    # and the step to the clean image reaches that: rounding must not root a negative number there.
    fresh = jnp.asarray(eta, x_T.dtype) ** 2 * jnp.expm1(log_ab - log_ab_next) / jnp.expm1(log_ab)
    sigma_fresh = sigma_next * jnp.sqrt(fresh)
    sigma_kept = sigma_next * jnp.sqrt(jnp.maximum(1 - fresh, 0))

    def step(x, at):
        index, t, signal, sigma, signal_next, sigma_kept, sigma_fresh = at
        eps = evaluate(eps_fn, x, t)
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
) -> Sampled:
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
    t, t_next = descend(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, level, x_T.dtype) for level in (t, t_next))
    signal, sigma = signal_and_sigma(log_ab)
    signal_next, sigma_next = signal_and_sigma(log_ab_next)
    # Skipping levels makes one step of many: its alpha is alpha_bar/alpha_bar_next.
    beta = -jnp.expm1(log_ab - log_ab_next)
    posterior_x0 = signal_next * beta / sigma**2
    posterior_x = signal / signal_next * (sigma_next / sigma) ** 2
    std = jnp.sqrt(beta) if variance == "large" else jnp.sqrt(beta) * sigma_next / sigma
    std = jnp.where(t_next < 0, 0, std)

    def step(x, at):
        index, t, signal, sigma, posterior_x0, posterior_x, std = at
        x0 = predict_x0(x, evaluate(eps_fn, x, t), signal, sigma)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
        # Draw from q(x_next | x, x_0) with the prediction in the place of x_0.
        x = posterior_x0 * x0 + posterior_x * x + std * noise_fn(index).astype(x.dtype)
        return x, x0 if return_x0 else None

    steps = (jnp.arange(len(t)), t, signal, sigma, posterior_x0, posterior_x, std)
    x_0, predictions = jax.lax.scan(step, x_T, steps)
    return (x_0, predictions) if return_x0 else x_0


METHODS: dict[str, Callable[..., Sampled]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "f_pndm": f_pndm,
    "s_pndm": s_pndm,
    "deis": deis,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "analytic": analytic,
    "sn": sn,
    "npr": npr,
}


def scale_eps(eps_fn: EpsFn, scale: np.ndarray | jax.Array) -> EpsFn:
    """The network with its output times a number per level: S²-DM's optimum in closed form, for any network.

    Args:
      scale: float [T]; a fractional level gets what lies linearly between its neighbours.

    Raises:
      ValueError: if `scale` is not 1-D.
    """
    if np.ndim(scale) != 1:
        raise ValueError(f"scale has shape {np.shape(scale)}; it is one number per level, shape [T]")

    def scaled(x, t):
        factor = jnp.interp(t, jnp.arange(len(scale)), jnp.asarray(scale, x.dtype)).astype(x.dtype)
        return eps_fn(x, t).astype(x.dtype) * factor.reshape(factor.shape + (1,) * (x.ndim - 1))

    return scaled


def slerp(x_a: jax.Array, x_b: jax.Array, weight: float | jax.Array) -> jax.Array:
    """Spherical interpolation between noise images (DDIM, eq. 67), each pair along its own great circle.

    Args:
      x_a, x_b: [..., H, W, C]; the straight line joins two that are parallel or opposite.
      weight: 0 gives x_a, 1 gives x_b; a scalar, or any shape that broadcasts with the axes before H.

    Returns:
      Array of the shape that the three broadcast to.
    """
    image = (-3, -2, -1)
    weight = jnp.expand_dims(jnp.asarray(weight, x_a.dtype), image)

    def inner(a, b):
        return jnp.sum(a * b, axis=image, keepdims=True)

    cosine = inner(x_a, x_b) / jnp.sqrt(inner(x_a, x_a) * inner(x_b, x_b))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    # Where the sine is 0 the circle is not defined, and the quotient would be 0/0.
    parallel = jnp.sin(angle) < 1e-6
    sine = jnp.where(parallel, 1, jnp.sin(angle))
    share_a = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * angle) / sine)
    share_b = jnp.where(parallel, weight, jnp.sin(weight * angle) / sine)
    return share_a * x_a + share_b * x_b
