"""Noise schedules and timestep grids: the one place that says what `t` means.

`t` counts 0 … T−1. `beta[t]`, `alpha[t] = 1 − beta[t]` belong to the single step that ends at level t;
`alpha_bar[t]` is the product of alpha[0..t], so that x_t = √alpha_bar[t]·x_0 + √(1−alpha_bar[t])·ε.
The clean image is level −1, with alpha_bar = 1. The papers count 1 … T: their t is ours plus one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving forward process (DDPM, Ho et al. 2020, eq. 2 and 4).

    Arrays live in float64 on the host; `lookup` moves the entries that a computation needs to the device.

    Attributes:
      beta: float64 [T], variance added by each step, in (0, 1).
    """

    beta: np.ndarray

    def __post_init__(self):
        beta = np.asarray(self.beta, np.float64)
        if beta.ndim != 1 or beta.size == 0 or not ((beta > 0) & (beta < 1)).all():
            raise ValueError("a noise schedule needs a non-empty 1-D array of betas strictly between 0 and 1")
        object.__setattr__(self, "beta", beta)

    @property
    def T(self) -> int:
        """Number of noise levels."""
        return len(self.beta)

    @functools.cached_property
    def alpha(self) -> np.ndarray:
        """float64 [T]: 1 − beta, one step."""
        return 1.0 - self.beta

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """float64 [T]: product of alpha up to and including each level."""
        return np.cumprod(self.alpha)

    @functools.cached_property
    def alpha_bar_from_clean(self) -> np.ndarray:
        """float64 [T+1]: alpha_bar preceded by the clean image's 1; entry t+1 belongs to level t."""
        return np.concatenate([[1.0], self.alpha_bar])

    @functools.cached_property
    def log_alpha_bar_from_clean(self) -> np.ndarray:
        """float64 [T+1]: logarithm of `alpha_bar_from_clean`, from 0 down."""
        return np.concatenate([[0.0], np.cumsum(np.log1p(-self.beta))])


def lookup(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """`table[t]` in the dtype of `like`, with trailing axes so that it multiplies images.

    Args:
      table: float64 [N] on the host.
      t: integer array of any shape, entries in [0, N).
      like: array whose leading axes are those of `t`.

    Returns:
      Array of shape t.shape + (1, …), as many axes as `like`.
    """
    values = jnp.asarray(table, like.dtype)[t]
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def log_alpha_bar(schedule: NoiseSchedule, t: jax.Array, dtype=jnp.float32) -> jax.Array:
    """log alpha_bar at any level, linear between whole ones: a forward SDE of constant rate within each step.

    Samplers take √alpha_bar and √(1−alpha_bar) from it as exp(½·) and √(−expm1(·)), which loses nothing to
    rounding where alpha_bar is almost 1.

    Args:
      t: levels in [−1, T−1], of any shape, whole or fractional; −1 is the clean image.

    Returns:
      Array of t's shape, at most 0.
    """
    table = jnp.asarray(schedule.log_alpha_bar_from_clean, dtype)
    u = jnp.asarray(t) + 1
    below = jnp.floor(u).astype(jnp.int32)
    above = jnp.minimum(below + 1, schedule.T)
    return table[below] + (u - below).astype(dtype) * (table[above] - table[below])


def add_noise(schedule: NoiseSchedule, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t = √alpha_bar_t·x_0 + √(1−alpha_bar_t)·ε (DDPM, eq. 4; SA-DPM, eq. 1).

    Args:
      x0: images in [−1, 1], broadcastable to `noise`.
      t: int array, the leading axes of `noise`, levels in [0, T).
      noise: standard normal [..., H, W, C].
    """
    signal = lookup(np.sqrt(schedule.alpha_bar), t, noise)
    sigma = lookup(np.sqrt(1.0 - schedule.alpha_bar), t, noise)
    return signal * x0 + sigma * noise


def linear_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> NoiseSchedule:
    """beta linear in t (DDPM, section 4), the schedule of every published S²-DM and of SA-DPM's "LS"."""
    return NoiseSchedule(np.linspace(beta_start, beta_end, T, dtype=np.float64))


def quad_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> NoiseSchedule:
    """√beta linear in t ("quad" of the DDIM code)."""
    return NoiseSchedule(np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2)


def const_schedule(T: int = 1000, beta_end: float = 2e-2) -> NoiseSchedule:
    """The same beta at every step ("const" of the DDIM code)."""
    return NoiseSchedule(np.full(T, beta_end, np.float64))


def sigmoid_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> NoiseSchedule:
    """beta follows a logistic curve over [−6, 6] ("sigmoid" of the DDIM code)."""
    return NoiseSchedule(beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6, 6, T))))


def cosine_schedule(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar(u) = cos²((u+s)/(1+s)·π/2), beta capped (Nichol & Dhariwal 2021, eq. 17): SA-DPM's "CS"."""

    def alpha_bar(u):
        return np.cos((u + s) / (1 + s) * np.pi / 2) ** 2

    u = np.arange(T, dtype=np.float64) / T
    return NoiseSchedule(np.minimum(1 - alpha_bar(u + 1 / T) / alpha_bar(u), max_beta))


SCHEDULES = {
    "linear": linear_schedule,
    "cosine": cosine_schedule,
    "quad": quad_schedule,
    "const": const_schedule,
    "sigmoid": sigmoid_schedule,
}


def uniform_grid(T: int, steps: int) -> np.ndarray:
    """Equally spaced levels from 0 up, "uniform" of the DDIM code.

    Where `steps` does not divide T the published grid has more levels than asked for (400 gives 500);
    this one has exactly `steps`.

    Returns:
      int32 [steps], ascending, first entry 0.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    _check_steps(T, steps)
    return (np.arange(steps) * T // steps).astype(np.int32)


def quadratic_grid(T: int, steps: int) -> np.ndarray:
    """Levels dense near the image, "quad" of the DDIM code: ⌊linspace(0, √(0.8T), steps)²⌋.

    Returns:
      int32 [steps], ascending, from 0 to about 0.8·T.

    Raises:
      ValueError: unless 1 <= steps <= T, and where rounding would repeat a level.
    """
    _check_steps(T, steps)
    grid = (np.linspace(0, np.sqrt(T * 0.8), steps) ** 2).astype(np.int32)
    if len(np.unique(grid)) < steps:
        raise ValueError(
            f"a quadratic grid of {steps} steps over T={T} repeats a level; use fewer steps or a uniform grid"
        )
    return grid


def linspace_grid(T: int, steps: int) -> np.ndarray:
    """Levels from the first to the last, both included ("linear" of Analytic-DPM: linspace 1 … T).

    Returns:
      int32 [steps], ascending, in our count (from 0 to T−1).

    Raises:
      ValueError: unless 2 <= steps <= T.
    """
    _check_steps(T, steps)
    if steps < 2:
        raise ValueError("a linspace grid holds the first and the last level: steps must be at least 2")
    return (np.round(1 + np.arange(steps) * (T - 1) / (steps - 1)) - 1).astype(np.int32)


GRIDS = {"uniform": uniform_grid, "quadratic": quadratic_grid, "linspace": linspace_grid}


def check_grid(T: int, timesteps) -> np.ndarray:
    """Your own list of levels, checked.

    Returns:
      int32 [S], ascending.

    Raises:
      ValueError: unless `timesteps` are 1 to T whole numbers in [0, T), each above the one before it.
    """
    levels = np.asarray(timesteps)
    if levels.ndim != 1:
        raise ValueError(f"timesteps has shape {levels.shape}; a grid is a 1-D list of levels")
    _check_steps(T, len(levels))
    if levels.dtype.kind not in "iuf" or (levels != np.floor(levels)).any():
        raise ValueError(f"timesteps={levels.tolist()} are not whole numbers")
    if levels.min() < 0 or levels.max() >= T:
        raise ValueError(f"timesteps go from {levels.min()} to {levels.max()}; T={T} allows 0 to {T - 1}")
    if (np.diff(levels) <= 0).any():
        raise ValueError(f"timesteps={levels.tolist()} are not in ascending order without repeats")
    return levels.astype(np.int32)


def _check_steps(T: int, steps: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is not a number of steps that T={T} levels allow: 1 to {T}")
