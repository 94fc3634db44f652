"""Sampled images that are nonsense: far more values at the ends of the range than real ones, or not finite."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from s2dm_jax.samplers.guards import MIN_LOG_SNR
from s2dm_jax.samplers.specs import SAMPLERS, clips_x0, nfe_of
from s2dm_jax.samplers.timesteps import plan_timesteps, resolve_spacing, split_timestep_spec

# Where no real images are available: drawings on a plain ground may have as many, photographs never.
_LIMIT_WITHOUT_DATA = 0.95


class Ends(NamedTuple):
    """How many values of images are at the ends of the range or beyond all ranges.

    Attributes:
      images: number of images.
      saturated: share of all values that are 0 or 255.
      not_finite: number of images that have NaN or infinity.
    """

    images: int
    saturated: float
    not_finite: int


class Fault(NamedTuple):
    """What is wrong with images.

    Attributes:
      text: one sentence.
      hopeless: none of the images is finite.
    """

    text: str
    hopeless: bool


Report = Callable[[Fault], None]


def ends_of(counts: Sequence[np.ndarray], shape: tuple[int, int, int]) -> Ends:
    """Of images of a shape (H, W, C), from the counts of `sampler.sample_batches`, int [B, 2] each."""
    joined = np.concatenate(counts)  # [N, 2]
    return Ends(len(joined), float(joined[:, 0].mean() / math.prod(shape)), int((joined[:, 1] > 0).sum()))


def saturation_limit(real: float | None) -> float:
    """The largest share of values at the ends of the range that is not reported, from that of real images.

    A tenth of all values, or half as many as real images have, may be added, but no more than half of those left: 12 %
    for photographs with 2 %, 74 % for digits with 49 %, all for images in black and white.
    """
    if real is None:
        return _LIMIT_WITHOUT_DATA
    return real + min(max(0.1, real / 2), (1 - real) / 2)


def fault_of(ends: Ends, real: Callable[[], float | None], how: str, remedies: str) -> Fault | None:
    """What makes images nonsense, None for others.

    Args:
      ends: of the images.
      real: returns the share of real images; called only if it matters.
      how, remedies: from `sampling_in_words`.
    """
    if ends.not_finite:
        count = f"{ends.not_finite:,} of {ends.images:,} images have values that are not finite"
        return Fault(f"{count} ({how}); try {remedies}, an earlier checkpoint", ends.not_finite == ends.images)
    if ends.saturated <= saturation_limit(0.0):
        return None
    share = real()
    if ends.saturated <= saturation_limit(share):
        return None
    compared = (
        f"against {100 * share:.1f} % of those of real images"
        if share is not None
        else f"no real images to compare with: the limit is {100 * _LIMIT_WITHOUT_DATA:.0f} %"
    )
    text = f"{100 * ends.saturated:.1f} % of the images' values are 0 or 255, {compared} ({how}); try {remedies}"
    return Fault(text, hopeless=False)


def sampling_in_words(log_snr: np.ndarray, schedule: str, dtype: str, sampler: str, **options: Any) -> tuple[str, str]:
    """How images were sampled with `configure_sampler`'s options, and what may help if they are nonsense.

    `log_snr` is that of the schedule, float [T], and `schedule` its name.
    """
    T = len(log_snr)
    spec, others = split_timestep_spec(options)
    own = {name: value for name, value in others.items() if name in SAMPLERS[sampler].options and value is not None}
    nfe = nfe_of(sampler, len(plan_timesteps(T, sampler, spec, log_snr=log_snr, **own)))
    chosen = resolve_spacing(spec.timestep_spacing, sampler, log_snr)
    spacing = "explicit timesteps" if len(spec.timesteps) else f"timestep_spacing {chosen}"
    helps = {
        "timestep_spacing=uniform": len(spec.timesteps) or chosen != "uniform",
        "a higher nfe": nfe < T,
        "clip_x0=True": not clips_x0(sampler, **own),
        "dynamic_threshold=0.995": own.get("dynamic_threshold") is None,
        f"min_log_snr={MIN_LOG_SNR}": spec.min_log_snr < MIN_LOG_SNR and not clips_x0(sampler, **own),
        "model.dtype=float32": dtype != "float32",
        "a longer training": True,
    }
    how = f"{sampler}, {spacing}, NFE {nfe:,}, {schedule} schedule, {dtype}"
    return how, ", ".join(name for name, applies in helps.items() if applies)


def warn(fault: Fault) -> None:
    """Reports a fault to users of the Python interface."""
    warnings.warn(fault.text, RuntimeWarning, stacklevel=3)
