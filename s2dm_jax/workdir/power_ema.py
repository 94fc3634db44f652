"""Power-function EMAs (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").

Their profile at update t is p_γ,t(τ) = (γ+1)·τ^γ/t^(γ+1) on [0, t], whose standard deviation is σ_rel·t. A run stores
snapshots of two or more; a linear combination of these has nearly any other profile. Imports no jax.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import ZIP_DAMAGE, atomic_path
from s2dm_jax.config.ema import sigma_rel_name

_FOLDER = "ema_snapshots"
_NAME = re.compile(r"step_(\d+)\.npz")
# Snapshots that hardly differ are not told apart by larger coefficients, which would magnify their rounding.
_CUTOFF = 1e-9
# A share of the rounding of float32.
_NEGLIGIBLE = 1e-10
# Profiles that deviate by more are reported.
_MAX_ERROR = 0.05

Weights = dict[str, np.ndarray]


class Average(NamedTuple):
    """A power-function EMA after one step.

    Attributes:
      step: number of steps done.
      updates: t, those that were not skipped.
      sigma_rel: its relative width.
      read: gives its weights, flat, by name.
    """

    step: int
    updates: int
    sigma_rel: float
    read: Callable[[], Weights]


class Synthesis(NamedTuple):
    """A post-hoc EMA.

    Attributes:
      weights: float32 arrays by name.
      error: the deviation of its profile from p_γ,t, relative in L².
      snapshots: number of EMAs that it is a combination of.
    """

    weights: Weights
    error: float
    snapshots: int

    @property
    def note(self) -> str:
        """A sentence if the requested profile is not matched, else ""."""
        if self.error <= _MAX_ERROR:
            return ""
        return (
            f"the profile of the power-function EMA deviates by {100 * self.error:.0f} % from the requested one, the "
            f"closest that {self.snapshots} snapshots can synthesise; store more with config.train.ema_snapshot_every"
        )


def gamma_of(sigma_rel: float) -> float:
    """γ of a relative width (Algorithm 2): the largest root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻², σ = σ_rel."""
    inverse = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def profile_products(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> np.ndarray:
    """∫ p_γa,ta(τ)·p_γb,tb(τ) dτ in float64 (Algorithm 3, `p_dot_p`); the arguments are broadcast."""
    t_a, gamma_a, t_b, gamma_b = (np.asarray(value, np.float64) for value in (t_a, gamma_a, t_b, gamma_b))
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve_weights(t: np.ndarray, gamma: np.ndarray, t_r: float, gamma_r: float) -> np.ndarray:
    """The linear combination of profiles that is nearest to p_γr,tr in L² (Algorithm 3).

    Args:
      t, gamma: of the snapshots, [N] each, no two alike.
      t_r, gamma_r: of what is requested.

    Returns:
      Coefficients X, float64 [N].
    """
    requested = profile_products(t, gamma, t_r, gamma_r)
    return _solve(profile_products(t[:, None], gamma[:, None], t, gamma), requested)


def _solve(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """A⁻¹B of profiles scaled to norm 1, so that narrow and wide ones count alike."""
    norm = np.sqrt(np.diag(A))
    return np.linalg.lstsq(A / np.outer(norm, norm), B / norm, rcond=_CUTOFF)[0] / norm


def average_weights(t: np.ndarray, gamma: np.ndarray, t_r: float, gamma_r: float) -> tuple[np.ndarray, float]:
    """`solve_weights` among the combinations whose coefficients sum to 1: those that are averages.

    Algorithm 3 leaves the sum free. With tens of snapshots it is 1 to 1e-3, with three 0.93 or 0.6, and so many times
    too small would the network's weights be.

    Returns:
      Coefficients, float64 [N], and the distance of their profile from p_γr,tr, relative to the latter's norm.
    """
    X = solve_weights(t, gamma, t_r, gamma_r)
    A = profile_products(t[:, None], gamma[:, None], t, gamma)
    towards = _solve(A, np.ones(len(t)))
    X = X + (1 - X.sum()) / towards.sum() * towards
    squared = profile_products(t_r, gamma_r, t_r, gamma_r)
    remains = squared - 2 * X @ profile_products(t, gamma, t_r, gamma_r) + X @ A @ X
    return X, float(np.sqrt(max(remains, 0.0) / squared))


def snapshot_path(workdir: str | os.PathLike, step: int) -> Path:
    """The file of the snapshot after `step` steps."""
    return Path(workdir) / _FOLDER / f"step_{step:07d}.npz"


def snapshot_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of a run's snapshots, ascending."""
    folder = Path(workdir) / _FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def write_snapshot(
    workdir: str | os.PathLike, step: int, updates: int, ema: Mapping[float, Weights], dtype: str = "float32"
) -> Path:
    """Writes the power-function EMAs after `step` steps, by σ_rel, to an .npz in the run's folder.

    Its arrays are "sigma_rel=0.05/NAME", of `dtype`, and "about": step, updates and the σ_rel as JSON.
    """
    path = snapshot_path(workdir, step)
    about = {"step": step, "updates": updates, "sigma_rel": [float(sigma_rel) for sigma_rel in ema]}
    arrays: dict[str, Any] = {
        f"{sigma_rel_name(sigma_rel)}/{name}": np.asarray(value).astype(dtype)
        for sigma_rel, weights in ema.items()
        for name, value in weights.items()
    }
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)
    return path


def read_snapshots(workdir: str | os.PathLike, last: int) -> list[Average]:
    """The power-function EMAs in a run's snapshots up to step `last`; their weights are read on request.

    Raises:
      UserError: for a file that is damaged.
    """
    found = []
    for step in snapshot_steps(workdir):
        if step <= last:
            path = snapshot_path(workdir, step)
            with _as_user_error(path), np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                updates, widths = int(about["updates"]), [float(sigma_rel) for sigma_rel in about["sigma_rel"]]
            found += [Average(step, updates, width, functools.partial(_read, path, width)) for width in widths]
    return found


def _read(path: Path, sigma_rel: float) -> Weights:
    prefix = f"{sigma_rel_name(sigma_rel)}/"
    with _as_user_error(path), np.load(path, allow_pickle=False) as arrays:
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); get permission to read it") from error
    except (*ZIP_DAMAGE, TypeError) as error:
        raise UserError(
            f"{path} is damaged or not a snapshot of s2dm_jax; remove it to have the EMA synthesised from the others"
        ) from error


def synthesize(averages: Sequence[Average], sigma_rel: float, step: int) -> Synthesis:
    """The power-function EMA of any width after `step` steps (section 3.2), in float64.

    Args:
      averages: those up to this step, at least one of it; of two of one step and width the first counts.
      sigma_rel: the relative width.
      step: of the run.
    """
    now = next(one for one in averages if one.step == step)
    if not now.updates:
        # Every step was skipped: all are the initial weights.
        return Synthesis(now.read(), 0.0, 1)
    different = list({(one.updates, one.sigma_rel): one for one in reversed(averages) if one.updates}.values())
    t = np.array([one.updates for one in different])
    gamma = np.array([gamma_of(one.sigma_rel) for one in different])
    coefficients, error = average_weights(t, gamma, now.updates, gamma_of(sigma_rel))
    total: dict[str, Any] = {}
    for one, coefficient in zip(different, coefficients, strict=True):
        if abs(coefficient) > _NEGLIGIBLE:
            for name, value in one.read().items():
                total[name] = total.get(name, 0.0) + coefficient * value.astype(np.float64)
    weights = {name: value.astype(np.float32) for name, value in total.items()}
    return Synthesis(weights, error, len(different))
