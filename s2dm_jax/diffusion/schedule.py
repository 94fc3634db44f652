"""Noise schedules, and the definition of the timestep `t`.

A timestep `t` counts 0 … T−1. `beta[t]`, `alpha[t] = 1 − beta[t]` belong to the single step that ends at timestep t;
`alpha_bar[t]` is the product of alpha[0..t], so that x_t = √alpha_bar[t]·x_0 + √(1−alpha_bar[t])·ε. The clean image
is t = −1, with alpha_bar = 1. The papers count 1 … T: their t is one more than here.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from s2dm_jax.diffusion import betas
from s2dm_jax.diffusion.betas import ScheduleSpec, cosine_betas, schedule_betas


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving forward process (DDPM, Ho et al. 2020, eq. 2 and 4).

    Attributes:
      beta: float64 [T] on the host, variance added by each step, in (0, 1).
    """

    beta: np.ndarray

    def __post_init__(self):
        beta = np.asarray(self.beta, np.float64)
        if beta.ndim != 1 or beta.size == 0 or not ((beta > 0) & (beta < 1)).all():
            raise ValueError("a noise schedule needs a non-empty 1-D array of betas strictly between 0 and 1")
        object.__setattr__(self, "beta", beta)

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.beta)

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        """float64 [T]: 1 − beta, one step."""
        return 1.0 - self.beta

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """float64 [T]: product of alpha up to and including each timestep."""
        return np.cumprod(self.alpha)

    @functools.cached_property
    def alpha_bar_with_x0(self) -> np.ndarray:
        """float64 [T+1]: alpha_bar preceded by the clean image's 1; entry t+1 belongs to timestep t."""
        return np.concatenate([[1.0], self.alpha_bar])

    @functools.cached_property
    def log_alpha_bar_with_x0(self) -> np.ndarray:
        """float64 [T+1]: logarithm of `alpha_bar_with_x0`, from 0 down."""
        return betas.log_alpha_bar_with_x0(self.beta)

    @functools.cached_property
    def log_snr(self) -> np.ndarray:
        """float64 [T]: λ = log(alpha/sigma), half the log of the signal-to-noise ratio (Lu et al. 2022), descending."""
        return betas.log_snr(self.beta)


def extract(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """`table[t]` on the device, in the dtype and with as many axes as `like`, whose leading axes are those of t."""
    values = jnp.asarray(table, like.dtype)[t]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))  # [*t.shape, 1, …]


def log_alpha_bar(schedule: NoiseSchedule, t: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """log alpha_bar at timesteps t in [−1, T−1], of any shape, with −1 for the clean image.

    Between integers it is linear: a forward SDE of constant rate within each step.
    """
    table = jnp.asarray(schedule.log_alpha_bar_with_x0, dtype)
    u = jnp.asarray(t) + 1
    below = jnp.floor(u).astype(jnp.int32)
    above = jnp.minimum(below + 1, schedule.T)
    return table[below] + (u - below).astype(dtype) * (table[above] - table[below])


def alpha_sigma(log_alpha_bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    """√alpha_bar and √(1−alpha_bar): x_t = alpha·x_0 + sigma·ε (DDPM, eq. 4).

    From the logarithm, because 1−alpha_bar loses digits where alpha_bar is almost 1.
    """
    # abs, not minus: the clean image's sigma must not be −0, which a division would turn into −∞.
    return jnp.exp(log_alpha_bar / 2), jnp.sqrt(jnp.abs(jnp.expm1(log_alpha_bar)))


def add_noise(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t = √alpha_bar_t·x_0 + √(1−alpha_bar_t)·ε (DDPM, eq. 4; SA-DPM, eq. 1).

    Args:
      x0: images in [−1, 1], broadcastable to `noise`.
      t: int array, the leading axes of `noise`, timesteps in [0, T).
      noise: standard normal [..., H, W, C].
    """
    signal = extract(np.sqrt(schedule.alpha_bar), t, noise)
    sigma = extract(np.sqrt(1.0 - schedule.alpha_bar), t, noise)
    return signal * x0 + sigma * noise


def linear_schedule(T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
    """beta linear in t (DDPM, section 4), the schedule of every published S²-DM and of SA-DPM's "LS".

    Args:
      beta_start, beta_end: of the first and the last step; None for 1e-4 and 0.02 scaled by 1000/T, with which
        alpha_bar at the last timestep is about the same for every T (Nichol & Dhariwal 2021, code).
    """
    return NoiseSchedule(schedule_betas(ScheduleSpec("linear", T, beta_start, beta_end)))


def quadratic_schedule(T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
    """√beta linear in t ("quad" of the DDIM code); its ends are as in `linear_schedule`."""
    return NoiseSchedule(schedule_betas(ScheduleSpec("quadratic", T, beta_start, beta_end)))


def const_schedule(T: int = 1000, beta_end: float | None = None) -> NoiseSchedule:
    """The same beta at every step ("const" of the DDIM code); beta_end is as in `linear_schedule`."""
    return NoiseSchedule(schedule_betas(ScheduleSpec("const", T, None, beta_end)))


def sigmoid_schedule(T: int = 1000, beta_start: float | None = None, beta_end: float | None = None) -> NoiseSchedule:
    """beta follows a logistic curve over [−6, 6] ("sigmoid" of the DDIM code); its ends are as in `linear_schedule`."""
    return NoiseSchedule(schedule_betas(ScheduleSpec("sigmoid", T, beta_start, beta_end)))


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar(u) = cos²((u+s)/(1+s)·π/2), beta capped (Nichol & Dhariwal 2021, eq. 17): SA-DPM's "CS"."""
    return NoiseSchedule(cosine_betas(T, s, max_beta))


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "quadratic": quadratic_schedule,
    "const": const_schedule,
    "sigmoid": sigmoid_schedule,
}
