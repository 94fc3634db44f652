"""Noise schedules as arrays of betas. Imports no jax, so that a config's schedule is checked before it is.

A timestep t counts 0 … T−1, as in `schedule`. Error messages begin with the name of an argument.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# DDPM's ends at T = 1000; for another T they are scaled by 1000/T, as in the improved-DDPM code's
# `get_named_beta_schedule`: alpha_bar at the last timestep stays about the same.
_T, _BETA_START, _BETA_END = 1000, 1e-4, 2e-2


class ScheduleSpec(NamedTuple):
    """The parameters that define a noise schedule, as in a config's group `diffusion`.

    Attributes:
      schedule: one of BETAS.
      T: number of timesteps.
      beta_start, beta_end: beta of the first and the last step, taken literally; None for 1e-4 and 0.02 scaled by
        1000/T.
    """

    schedule: str
    T: int = _T
    beta_start: float | None = None
    beta_end: float | None = None


def linear_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """beta linear in t (DDPM, Ho et al. 2020, section 4): float64 [T]."""
    return np.linspace(beta_start, beta_end, T, dtype=np.float64)


def quadratic_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """√beta linear in t ("quad" of the DDIM code, "scaled_linear" of diffusers): float64 [T]."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2


def const_betas(T: int, beta_end: float) -> np.ndarray:
    """The same beta at every step ("const" of the DDIM code): float64 [T]."""
    return np.full(T, beta_end, np.float64)


def sigmoid_betas(T: int, beta_start: float, beta_end: float) -> np.ndarray:
    """beta follows a logistic curve over [−6, 6] ("sigmoid" of the DDIM code): float64 [T]."""
    return beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6, 6, T)))


def cosine_betas(T: int, s: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """alpha_bar(u) = cos²((u+s)/(1+s)·π/2), beta capped (Nichol & Dhariwal 2021, eq. 17): float64 [T]."""

    def alpha_bar(u):
        return np.cos((u + s) / (1 + s) * np.pi / 2) ** 2

    u = np.arange(T, dtype=np.float64) / T
    return np.minimum(1 - alpha_bar(u + 1 / T) / alpha_bar(u), max_beta)


BETAS: dict[str, Callable[..., np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "quadratic": quadratic_betas,
    "const": const_betas,
    "sigmoid": sigmoid_betas,
}
# The ends that a schedule has.
_ENDS = {"cosine": (), "const": ("beta_end",)}


def schedule_betas(spec: ScheduleSpec) -> np.ndarray:
    """The betas of a schedule: float64 [T], strictly between 0 and 1.

    Raises:
      ValueError: for an unknown schedule, ends that it does not have, or betas that are not between 0 and 1.
    """
    if spec.schedule not in BETAS:
        raise ValueError(f"schedule={spec.schedule!r} is not one of {', '.join(BETAS)}")
    has = _ENDS.get(spec.schedule, ("beta_start", "beta_end"))
    ends = {"beta_start": spec.beta_start, "beta_end": spec.beta_end}
    for name, value in ends.items():
        if value is None:
            continue
        if name not in has:
            raise ValueError(f"{name}={value} is not a field of the {spec.schedule} schedule; leave it None")
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} is out of range: a beta is between 0 and 1")
    scale = _T / spec.T
    beta_start = scale * _BETA_START if spec.beta_start is None else spec.beta_start
    beta_end = scale * _BETA_END if spec.beta_end is None else spec.beta_end
    if "beta_end" in has and beta_end >= 1:
        raise ValueError(
            f"T={spec.T} is too small for the {spec.schedule} schedule: beta_end, {_BETA_END} scaled by {_T}/T, is "
            f"{beta_end:g} and must be below 1; give a T of at least {int(_T * _BETA_END) + 1}, or set beta_end, such "
            "as beta_end=0.5"
        )
    if "beta_start" in has and beta_start > beta_end:
        raise ValueError(f"beta_start={beta_start:g} is above beta_end={beta_end:g}; noise must grow with the timestep")
    values = {"beta_start": beta_start, "beta_end": beta_end}
    return BETAS[spec.schedule](spec.T, **{name: values[name] for name in has})


def same_betas(spec: ScheduleSpec, other: ScheduleSpec) -> bool:
    """Whether two specs stand for the same betas, up to the rounding of float32."""
    betas, others = schedule_betas(spec), schedule_betas(other)
    return betas.shape == others.shape and np.allclose(betas, others, rtol=1e-5, atol=0)


def log_alpha_bar_with_x0(beta: np.ndarray) -> np.ndarray:
    """log alpha_bar after 0 … T steps, from the clean image's 0 down: float64 [T+1], from betas [T]."""
    return np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])


def log_snr(beta: np.ndarray) -> np.ndarray:
    """λ = log(alpha/sigma) of each timestep, half the log of the signal-to-noise ratio (Lu et al. 2022): float64 [T],
    descending, from betas [T].
    """
    log_ab = log_alpha_bar_with_x0(beta)[1:]
    return (log_ab - np.log(-np.expm1(log_ab))) / 2
