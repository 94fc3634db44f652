"""SA-DPM's estimation gap: how far sampling drifts from the chain that uses the real x_0 (Figure 4)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.images import to_unit
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.diffusion.schedule import NoiseSchedule, add_noise
from s2dm_jax.diffusion.types import EpsFn, NoiseFn
from s2dm_jax.models.network import Network
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.noise import image_keys, initial_noise, per_image_noise


class Gap(NamedTuple):
    """The total gap at each timestep, in the order of sampling.

    Attributes:
      t: int32 [S], timesteps from the start down to 1, the end of Theorem 1 (the paper's step 2).
      square: float32 [S, B], mean over pixels of the gap's square, for each image.
      mean: float32 [S, H, W, C], mean over images of the gap.
    """

    t: np.ndarray
    square: jax.Array
    mean: jax.Array


def gap_coefficients(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """γ1 and γ2 of the posterior mean γ1·x_0 + γ2·x_t (SA-DPM, eq. 2).

    Both are float64 [T]. γ2 is 0 at timestep 0, where the step arrives at the clean image and discards the gap so far:
    Theorem 1 ends one timestep earlier.
    """
    a, before = schedule.alpha_bar, schedule.alpha_bar_with_x0[:-1]
    return np.sqrt(before) * schedule.beta / (1 - a), np.sqrt(schedule.alpha) * (1 - before) / (1 - a)


def accumulate(gaps: jax.Array, gamma_2: jax.Array) -> jax.Array:
    """d̄_t = d_t + γ2_t·d̄_{t+1} [S, ...] from d_t [S, ...] and γ2_t [S], the noisiest timestep first (Theorem 1)."""

    def step(total, inputs):
        gap, gamma_2 = inputs
        total = gap + gamma_2 * total
        return total, total

    return jax.lax.scan(step, jnp.zeros_like(gaps[0]), (gaps, gamma_2))[1]


def estimation_gap(
    eps_fn: EpsFn,
    schedule: NoiseSchedule,
    x0: jax.Array,
    noise: jax.Array,
    start: int,
    *,
    eta: float = 1.0,
    noise_fn: NoiseFn | None = None,
) -> Gap:
    """Noises real images, denoises them step by step, and measures the total gap (SA-DPM, Figure 4).

    With ε_t = (x_t − √ᾱ_t·x_0)/√(1−ᾱ_t), the gap of one step is
    d_t = γ1_t·√(1−ᾱ_t)/√ᾱ_t·(f(x_t, t) − ε_t) = γ1_t·(x_0 − x̂_0) (eq. 4, whose middle has the other sign).
    For eta = 1 the total d̄_t is y_{t−1} − x_{t−1}, where y is the chain that the same noise makes with x_0 itself in
    x̂_0's place. All predictions of x_0 are in memory together: S·B images.

    Args:
      eps_fn, schedule: the network and the forward process.
      x0: real images in [−1, 1], [B, H, W, C].
      noise: standard normal, [B, H, W, C], makes x_start.
      start: timestep to start from, in [1, T); S = start steps follow, down to timestep 1.
      eta: 1 for DDPM with the posterior's variance, 0 for DDIM; x_0's prediction is not clipped.
      noise_fn: step index -> standard normal [B, H, W, C]; needed unless eta is 0.

    Raises:
      ValueError: for `start` outside its range, eta outside [0, 1], or eta without `noise_fn`.
    """
    T = schedule.T
    if not 1 <= start < T:
        raise ValueError(f"start={start} is not a timestep to denoise from: T={T} allows 1 to {T - 1}")
    timesteps = np.arange(1, start + 1)
    x_start = add_noise(schedule, x0, jnp.full(len(x0), start), noise)
    # The sampler continues from timestep 1 to the clean image, but every prediction is made before that step.
    _, x0_hat = ddim(eps_fn, x_start, schedule, timesteps, eta=eta, noise_fn=noise_fn, return_x0=True)
    t = timesteps[::-1]
    gamma_1, gamma_2 = (jnp.asarray(gamma[t], x0.dtype) for gamma in gap_coefficients(schedule))
    gaps = gamma_1.reshape(-1, *[1] * x0.ndim) * (x0 - x0_hat)  # [S, B, H, W, C]
    total = accumulate(gaps, gamma_2)
    return Gap(t.astype(np.int32), jnp.square(total).mean((2, 3, 4)), total.mean(1))


def gap_curve(
    network: Network,
    params: dict,
    schedule: NoiseSchedule,
    images: np.ndarray,
    start: int,
    *,
    eta: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, np.ndarray]:
    """The total gap of a trained network on real images, uint8 [N, H, W, C], as one number for each timestep.

    The noise of image i depends on (seed, i) alone, so that two networks are compared on the same noise. Equal networks
    share a compiled program if they share the `schedule` object.

    Returns:
      "t" int32 [S]; "rms" [S], root mean square of the gap over pixels and images; "rms_of_mean" [S], root mean square
      over pixels of its mean over images: the part that all images share.
    """
    square, mean = 0.0, 0.0
    with progress_bar(len(images), "images") as advance:
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            indices = first + np.arange(len(batch))
            gap = jax.device_get(_gap_of(network, schedule, start, eta, params, seed, to_unit(batch), indices))
            fraction = len(batch) / len(images)
            square += fraction * gap.square.mean(1, dtype=np.float64)
            mean += fraction * gap.mean.astype(np.float64)
            advance(len(batch))
    return {"t": gap.t, "rms": np.sqrt(square), "rms_of_mean": np.sqrt(np.square(mean).mean((1, 2, 3)))}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gap_of(network, schedule, start, eta, params, seed, x0, indices):
    noise = initial_noise(seed, indices, x0.shape[1:])
    noise_fn = per_image_noise(image_keys(seed, indices), x0.shape[1:])
    return estimation_gap(network.eps_fn(params, schedule), schedule, x0, noise, start, eta=eta, noise_fn=noise_fn)
