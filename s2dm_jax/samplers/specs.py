"""The table of samplers: each one's module, options and NFE (number of function evaluations).

Imports no jax, so that wrong options are reported before it is. Error messages begin with the name of the argument.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class SamplerSpec(NamedTuple):
    """A sampler's module, options and cost.

    Attributes:
      module: file of this folder that defines the function of the sampler's name.
      options: keyword arguments that not every sampler has: "eta" and names of OPTIONS.
      evaluations_per_step, extra_evaluations: S steps make S·evaluations_per_step + extra_evaluations calls of the
        network.
      min_steps: smallest number of steps.
      stochastic: draws noise at every step, whatever the options.
      clips_x0: clips the prediction of x_0 by default.
      max_step: the longest step in λ = log(alpha/sigma), where sigma is far above alpha, that does not multiply the
        network's error in an unclipped sampler (`guards.check_step_lengths`); measured on Gaussian and two-mode
        data with an error of 1 % (tests/samplers/test_guards.py).
      requires: input besides the weights: "ms_eps" (Analytic-DPM's statistic), or a variance head's kind ("sn", "npr").
      auto_spacing: what timestep_spacing="auto" is, by measurement (docs/samplers.md), for a schedule that is almost
        noise at 0.8·T, such as the linear one, and for others, such as the cosine one.
    """

    module: str
    options: tuple[str, ...] = ()
    evaluations_per_step: int = 1
    extra_evaluations: int = 0
    min_steps: int = 1
    stochastic: bool = False
    clips_x0: bool = False
    max_step: float = math.inf
    requires: str = ""
    auto_spacing: tuple[str, str] = ("quadratic", "truncated_logsnr")


_QUADRATIC_OR_UNIFORM = ("quadratic", "uniform")
_LOG_SNR_SOLVER = SamplerSpec("multistep", auto_spacing=("truncated_logsnr",) * 2)
_ANALYTIC_OPTIONS = ("mean", "eta", "clip_pixel")
_ANALYTIC = SamplerSpec(
    "analytic", _ANALYTIC_OPTIONS, stochastic=True, clips_x0=True, auto_spacing=_QUADRATIC_OR_UNIFORM
)

SAMPLERS = {
    "ddim": SamplerSpec("ddim", ("eta", "raw_eps"), auto_spacing=_QUADRATIC_OR_UNIFORM),
    "ddpm": SamplerSpec("ddim", ("variance",), stochastic=True, clips_x0=True, auto_spacing=_QUADRATIC_OR_UNIFORM),
    "f_pndm": SamplerSpec("pndm", ("pndm_convention",), extra_evaluations=9, min_steps=4, max_step=2.3),
    "s_pndm": SamplerSpec("pndm", ("pndm_convention",), extra_evaluations=1, min_steps=2, max_step=2.8),
    "deis": SamplerSpec("multistep", ("order",)),
    "dpmpp": _LOG_SNR_SOLVER._replace(options=("order",)),
    "dpmpp_2m": _LOG_SNR_SOLVER,
    "dpmpp_3m": _LOG_SNR_SOLVER._replace(max_step=2.45),
    "unipc": _LOG_SNR_SOLVER._replace(options=("order", "variant")),
    "heun": SamplerSpec("heun", evaluations_per_step=2, extra_evaluations=-1, max_step=2.4),
    "analytic": _ANALYTIC._replace(requires="ms_eps"),
    "sn": _ANALYTIC._replace(requires="sn"),
    "npr": _ANALYTIC._replace(requires="npr"),
}

# Every sampler can clip its prediction of x_0.
_CLIPPING = ("clip_x0", "dynamic_threshold")
SAMPLERS = {name: spec._replace(options=(*spec.options, *_CLIPPING)) for name, spec in SAMPLERS.items()}

# The choices of each option; None: any number above 0. eta is apart: 0 suits every sampler.
OPTIONS: dict[str, tuple | None] = {
    "clip_x0": (False, True),
    "dynamic_threshold": None,
    "raw_eps": (False, True),
    "variance": ("large", "small", "learned"),
    "pndm_convention": ("corrected", "published"),
    "order": (1, 2, 3),
    "variant": ("bh1", "bh2"),
    "mean": ("ddpm", "ddim"),
    "clip_pixel": None,
}


def sampler_name(name: str) -> str:
    """The name in SAMPLERS of a sampler with several names: PNDM's papers call F-PNDM pndm."""
    return "f_pndm" if name == "pndm" else name


def spec_of(sampler: str) -> SamplerSpec:
    """SAMPLERS[sampler], or a ValueError that lists the names."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]


def get_sampler(name: str) -> Callable[..., Any]:
    """The function of SAMPLERS[name], imported on use, and jax with it.

    Raises:
      ValueError: for an unknown name.
    """
    module = importlib.import_module(f"s2dm_jax.samplers.{spec_of(name).module}")
    return getattr(module, name)


def nfe_of(sampler: str, steps: int) -> int:
    """Calls of the network that a sampler makes: S + 9 for F-PNDM, S + 1 for S-PNDM, 2S − 1 for Heun, else S.

    Raises:
      ValueError: for an unknown sampler, or fewer steps than its smallest number.
    """
    spec = spec_of(sampler)
    if steps < spec.min_steps:
        raise ValueError(f"steps={steps} is too few for {sampler}: it needs at least {spec.min_steps}")
    return steps * spec.evaluations_per_step + spec.extra_evaluations


def steps_for_nfe(sampler: str, nfe: int) -> int:
    """The number of steps for which the sampler makes `nfe` evaluations, the inverse of `nfe_of`.

    Raises:
      ValueError: as `nfe_of`, and if no number of steps makes exactly `nfe` evaluations.
    """
    spec = spec_of(sampler)
    fewest = nfe_of(sampler, spec.min_steps)
    if nfe < fewest:
        raise ValueError(f"nfe={nfe} is too few for {sampler}: its smallest number of steps makes {fewest} evaluations")
    steps, left = divmod(nfe - spec.extra_evaluations, spec.evaluations_per_step)
    if left:
        raise ValueError(f"nfe={nfe} is not possible with {sampler}: {steps} steps make {nfe - left} evaluations")
    return steps


def check_options(sampler: str, **options: Any) -> None:
    """Checks the options that not every sampler has: "eta" and those of OPTIONS; eta 0 suits every sampler.

    Raises:
      ValueError: for an option that does not exist or that the sampler does not have, or a value outside its choices.
    """
    spec = spec_of(sampler)
    for name, value in options.items():
        _check_value(name, value)
        if name not in spec.options and not (name == "eta" and value == 0):
            owners = ", ".join(other for other, spec in SAMPLERS.items() if name in spec.options)
            raise ValueError(f"{name}={value!r} is not an option of {sampler}, only of {owners}")
    if options.get("raw_eps") and not clips_x0(sampler, **options):
        raise ValueError("raw_eps=True has no effect without clip_x0=True: without clipping, ε is the network's")
    if options.get("eta") and "mean" in spec.options and options.get("mean", "ddpm") == "ddpm":
        raise ValueError(f"eta={options['eta']} is not an option of mean='ddpm', only of mean='ddim'")


def clips_x0(sampler: str, **options: Any) -> bool:
    """Whether a sampler with these options bounds its prediction of x_0, by clip_x0 or a dynamic threshold."""
    if options.get("dynamic_threshold") is not None:
        return True
    clip = options.get("clip_x0")
    return spec_of(sampler).clips_x0 if clip is None else bool(clip)


def _check_value(name: str, value: Any) -> None:
    if name == "eta":
        if not 0 <= value <= 1:
            raise ValueError(
                f"eta={value} is not allowed: it must be from 0 (deterministic) to 1 (DDPM's posterior variance)"
            )
    elif name not in OPTIONS:
        raise ValueError(f"{name}={value!r} is not an option of any sampler; choose among eta, {', '.join(OPTIONS)}")
    elif name == "dynamic_threshold":
        if value is not None and not 0 < value <= 1:
            raise ValueError(
                f"{name}={value!r} is not allowed: it must be a fraction of an image's values up to 1, such as 0.995"
            )
    elif (choices := OPTIONS[name]) is None:
        if not value > 0:
            raise ValueError(f"{name}={value!r} is not allowed: it must be a number above 0, or inf")
    elif value not in choices:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {' or '.join(map(repr, choices))}")
