"""Which timesteps a sampler visits. Imports no jax; error messages begin with the name of the argument."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from s2dm_jax.samplers.guards import MIN_LOG_SNR, beyond_bound, check_step_lengths, num_visitable
from s2dm_jax.samplers.specs import check_options, clips_x0, nfe_of, spec_of, steps_for_nfe

DEFAULT_NFE = 10
# Of Karras et al. 2022.
_RHO = 7
# Where `truncated_log_snr_timesteps` begins.
_LEAST_LOG_SNR = -3.2


class TimestepSpec(NamedTuple):
    """A request for timesteps, by their number, an NFE budget, or a list; 0 and () stand for not set.

    Attributes:
      steps: number of timesteps.
      nfe: network evaluations; 10 if nothing is set.
      timestep_spacing: one of SPACINGS; ignored with `timesteps`. "auto" is the sampler's own (`auto_spacing`).
        "optimal" depends on the network (`analytic.optimal_timesteps`): here it stands for as many timesteps of
        "uniform".
      timesteps: a list, ascending.
      min_log_snr: the lowest λ = log(alpha/sigma) of a timestep that is visited by a sampler that divides the network's
        error by alpha without clipping x_0 (`num_visitable`); −inf for no bound.
    """

    steps: int = 0
    nfe: int = 0
    timestep_spacing: str = "auto"
    timesteps: Sequence[int] = ()
    min_log_snr: float = MIN_LOG_SNR


def split_timestep_spec(options: Mapping[str, Any]) -> tuple[TimestepSpec, dict[str, Any]]:
    """The `TimestepSpec` in a user's keyword arguments, and the other arguments."""
    fields = {name: options[name] for name in TimestepSpec._fields if name in options}
    return TimestepSpec(**fields), {name: value for name, value in options.items() if name not in fields}


def check_steps(T: int, steps: int) -> None:
    """Refuses a number of timesteps outside 1 … T."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} is out of range: T={T} allows 1 to {T}")


def uniform_timesteps(T: int, steps: int) -> np.ndarray:
    """Equally spaced timesteps from 0 up, "uniform" of the DDIM code: int32 [steps], ascending.

    Where `steps` does not divide T the DDIM code visits more timesteps than requested (400 gives 500); here there are
    exactly `steps`.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(T, steps)
    return (np.arange(steps) * T // steps).astype(np.int32)


def quadratic_timesteps(T: int, steps: int) -> np.ndarray:
    """Timesteps dense near the image, "quad" of the DDIM code: ⌊linspace(0, √(0.8T), steps)²⌋, int32 [steps].

    Where that repeats a timestep, from 30 steps on at T = 1000, the next one takes its place (`_distinct`).

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(T, steps)
    return _distinct(T, np.linspace(0, np.sqrt(T * 0.8), steps) ** 2)


def linspace_timesteps(T: int, steps: int) -> np.ndarray:
    """Timesteps from 0 to T−1, both included ("linear" of Analytic-DPM, which counts 1 … T): int32 [steps], ascending.

    Raises:
      ValueError: unless 2 <= steps <= T.
    """
    check_steps(T, steps)
    if steps < 2:
        raise ValueError("steps=1 is too few for linspace spacing, which includes the first and the last timestep")
    return (np.round(1 + np.arange(steps) * (T - 1) / (steps - 1)) - 1).astype(np.int32)


def trailing_timesteps(T: int, steps: int) -> np.ndarray:
    """Equally spaced timesteps from T−1 down (Lin et al. 2024, table 2): round(k·T/steps) − 1, k = 1 … steps.

    Returns:
      int32 [steps], ascending.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(T, steps)
    return (np.round(np.arange(1, steps + 1) * T / steps) - 1).astype(np.int32)


def log_snr_timesteps(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Timesteps equally spaced in λ = log(alpha/sigma) from T−1 to 0 (Lu et al. 2022, "logSNR" of DPM-Solver's code).

    Args:
      log_snr: λ of each timestep, float [T], descending.
      steps: 1 to T.

    Returns:
      int32 [steps], ascending; distinct where equal spacing in λ is finer than the timesteps (`_distinct`).

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(len(log_snr), steps)
    return _nearest(log_snr, np.linspace(log_snr[-1], log_snr[0], steps))


def truncated_log_snr_timesteps(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """As `log_snr_timesteps`, from the noisiest timestep with λ ≥ −3.2, where 4 % of the image is left, to 0.

    With the linear schedule that is 0.8·T, where `quadratic_timesteps` begins. Equal steps in λ from T−1 on spend a
    quarter of all evaluations above that, on next to nothing. Where it has fewer than `steps` timesteps, it begins at
    the noisiest that is needed.

    Args:
      log_snr: λ of each timestep, float [T], descending.
      steps: 1 to T.

    Returns:
      int32 [steps], ascending; distinct, as in `log_snr_timesteps`.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(len(log_snr), steps)
    return log_snr_timesteps(log_snr[: max(steps, np.sum(log_snr >= _LEAST_LOG_SNR))], steps)


def karras_timesteps(log_snr: np.ndarray, steps: int) -> np.ndarray:
    """Timesteps equally spaced in σ^(1/7), σ = sigma/alpha = e^(−λ) (Karras et al. 2022, eq. 5, ρ = 7).

    Args:
      log_snr: λ of each timestep, float [T], descending.
      steps: 1 to T.

    Returns:
      int32 [steps], ascending; distinct, as in `log_snr_timesteps`.

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    check_steps(len(log_snr), steps)
    roots = np.linspace(np.exp(-log_snr[-1] / _RHO), np.exp(-log_snr[0] / _RHO), steps)
    return _nearest(log_snr, -_RHO * np.log(roots))


def _nearest(log_snr: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The timesteps nearest to values of λ, ascending in λ: int32 [steps], ascending in t."""
    timesteps = np.interp(wanted, log_snr[::-1], np.arange(len(log_snr))[::-1])
    return _distinct(len(log_snr), np.round(timesteps)[::-1])


def _distinct(T: int, timesteps: np.ndarray) -> np.ndarray:
    """⌊timesteps⌋, float [steps] in [0, T), ascending; one that repeats another moves to the next that is free above,
    or below where there is none above. int32 [steps].
    """
    steps = len(timesteps)
    rank = np.arange(steps)
    # t − rank of distinct timesteps does not descend; the last one leaves room for none above T − 1.
    return (np.minimum(np.maximum.accumulate(np.floor(timesteps) - rank), T - steps) + rank).astype(np.int32)


SPACING_FUNCTIONS = {
    "uniform": uniform_timesteps,
    "quadratic": quadratic_timesteps,
    "linspace": linspace_timesteps,
    "trailing": trailing_timesteps,
}
# Functions of λ at each timestep in the place of T.
LOG_SNR_SPACINGS = {
    "logsnr": log_snr_timesteps,
    "truncated_logsnr": truncated_log_snr_timesteps,
    "karras": karras_timesteps,
}
SPACINGS = ("auto", *SPACING_FUNCTIONS, *LOG_SNR_SPACINGS, "optimal")
# What those that depend on more than T are checked as.
_STAND_INS = {**dict.fromkeys(LOG_SNR_SPACINGS, "trailing"), "truncated_logsnr": "uniform", "optimal": "uniform"}


# Below this λ, alpha_bar = 0.01, an image is almost noise.
_ALMOST_NOISE = -2.3


def auto_spacing(sampler: str, log_snr: np.ndarray | None = None) -> str:
    """The spacing that "auto" stands for: the sampler's best of those measured in docs/samplers.md.

    "quadratic" begins at 0.8·T, where a schedule such as the cosine one is not near noise yet: it has another.

    Args:
      sampler: a name in SAMPLERS.
      log_snr: the schedule's λ at each timestep, float [T]; None for a schedule that is near noise there.
    """
    near_noise, other = spec_of(sampler).auto_spacing
    return near_noise if log_snr is None or log_snr[int(0.8 * len(log_snr)) - 1] <= _ALMOST_NOISE else other


def resolve_spacing(spacing: str, sampler: str, log_snr: np.ndarray | None = None) -> str:
    """A spacing by its own name: what "auto" is for the sampler (`auto_spacing`), any other as it is."""
    return auto_spacing(sampler, log_snr) if spacing == "auto" else spacing


def check_timesteps(T: int, timesteps: ArrayLike) -> np.ndarray:
    """`timesteps` as int32 [S]; a ValueError unless they are 1 to T integers in [0, T), ascending without repeats."""
    array = np.asarray(timesteps)
    if array.ndim != 1:
        raise ValueError(f"timesteps has shape {array.shape}; it must be a 1-D list")
    check_steps(T, len(array))
    if array.dtype.kind not in "iuf" or (array != np.floor(array)).any():
        raise ValueError(f"timesteps={array.tolist()} are not integers")
    if array.min() < 0 or array.max() >= T:
        raise ValueError(f"timesteps go from {array.min()} to {array.max()}; T={T} allows 0 to {T - 1}")
    if (np.diff(array) <= 0).any():
        raise ValueError(f"timesteps={array.tolist()} are not in ascending order without repeats")
    return array.astype(np.int32)


def check_published_pndm(T: int, last: int) -> None:
    """Refuses timesteps that end at `last` = T−1, for which the table of PNDM's released code has no entry."""
    if last == T - 1:
        raise ValueError(
            "pndm_convention='published' reads alpha_bar one timestep later: the timesteps must end below "
            f"T−1={T - 1}; pndm_convention='corrected' has no such limit"
        )


def plan_timesteps(
    T: int, sampler: str, spec: TimestepSpec, *, log_snr: np.ndarray | None = None, **options: Any
) -> np.ndarray:
    """The timesteps int32 [S], ascending, that a sampler with these options visits, after checking all options.

    `log_snr` is the schedule's λ at each timestep, float [T]. A spacing that would visit timesteps beyond
    `num_visitable` is made over those that it allows. Without `log_snr` there is no bound, and the spacings of
    LOG_SNR_SPACINGS, which end at T−1 as "trailing" does, are checked as that.

    Raises:
      ValueError: as `check_options`; for an unknown spacing, a number of steps that the sampler, the spacing or T does
        not allow, a bad list, contradictory fields, or timesteps that the PNDM convention does not allow.
    """
    check_options(sampler, **options)
    if spec.timestep_spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing={spec.timestep_spacing!r} is not one of {', '.join(SPACINGS)}")
    visitable = num_visitable(T, sampler, spec.min_log_snr, log_snr, **options)
    if len(spec.timesteps):
        timesteps = check_timesteps(T, spec.timesteps)
        if spec.steps and spec.steps != len(timesteps):
            raise ValueError(
                f"steps={spec.steps} contradicts timesteps, which are {len(timesteps)}; give one of the two"
            )
        if timesteps[-1] >= visitable:
            raise ValueError(f"timesteps end at {timesteps[-1]}{beyond_bound(sampler, spec.min_log_snr, visitable)}")
    else:
        timesteps = _spaced_timesteps(T, sampler, spec, log_snr, visitable)
    nfe = nfe_of(sampler, len(timesteps))
    if spec.nfe and spec.nfe != nfe:
        source = "timesteps" if len(spec.timesteps) else f"steps={spec.steps}"
        raise ValueError(
            f"nfe={spec.nfe} contradicts {source}: {len(timesteps)} steps of {sampler} make {nfe} "
            "evaluations; give one of the two"
        )
    if options.get("pndm_convention") == "published":
        check_published_pndm(T, timesteps[-1])
    if log_snr is not None and not clips_x0(sampler, **options):
        try:
            check_step_lengths(sampler, timesteps, log_snr, **options)
        except ValueError as error:
            if len(spec.timesteps):
                raise
            request = f"steps={spec.steps}" if spec.steps else f"nfe={nfe}"
            raise ValueError(f"{request} is not possible: {error}") from error
    return timesteps


def _spaced_timesteps(
    T: int, sampler: str, spec: TimestepSpec, log_snr: np.ndarray | None, visitable: int
) -> np.ndarray:
    nfe = spec.nfe or DEFAULT_NFE
    steps = spec.steps or steps_for_nfe(sampler, nfe)
    spacing = resolve_spacing(spec.timestep_spacing, sampler, log_snr)
    try:
        timesteps = _spacing(T, spacing, steps, log_snr)
        if timesteps[-1] < visitable:
            return timesteps
        if steps > visitable:
            raise ValueError(
                f"steps={steps} end at {timesteps[-1]}{beyond_bound(sampler, spec.min_log_snr, visitable)}"
            )
        return _spacing(visitable, spacing, steps, None if log_snr is None else log_snr[:visitable])
    except ValueError as error:
        if spec.steps:
            raise
        raise ValueError(f"nfe={nfe} is not possible: {error}") from error


def _spacing(T: int, name: str, steps: int, log_snr: np.ndarray | None) -> np.ndarray:
    """The timesteps of a spacing over all of 0 … T−1."""
    if name in LOG_SNR_SPACINGS and log_snr is not None:
        return LOG_SNR_SPACINGS[name](log_snr, steps)
    return SPACING_FUNCTIONS[_STAND_INS.get(name, name)](T, steps)


def unvisited_note(T: int, sampler: str, spec: TimestepSpec, log_snr: np.ndarray, **options: Any) -> str:
    """One sentence if `min_log_snr` has moved a spacing away from the last timesteps, else ""."""
    visitable = num_visitable(T, sampler, spec.min_log_snr, log_snr, **options)
    if visitable == T or len(spec.timesteps):
        return ""
    # "optimal" ends at T−1, unlike what it is checked as.
    if spec.timestep_spacing != "optimal" and _spaced_timesteps(T, sampler, spec, log_snr, T)[-1] < visitable:
        return ""
    left_out = f"timestep {T - 1} is" if visitable == T - 1 else f"timesteps {visitable} to {T - 1} are"
    return (
        f"{left_out} not visited by {sampler}: log(alpha/sigma) is below min_log_snr={spec.min_log_snr:g} there, and "
        "dividing by alpha would multiply the network's error; clip_x0=True visits all"
    )
