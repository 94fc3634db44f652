"""What is known of each sampler before it runs: its options, its network evaluations, its levels.

No jax, so that a mistake is told before jax is imported. Messages begin with the name of the argument.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class SamplerSpec(NamedTuple):
    """Facts about a sampler.

    Attributes:
      module: file of this folder that has the function of the sampler's name.
      options: names of the keyword arguments that only some samplers have.
      extra_evaluations: network evaluations beyond one a step.
      min_steps: fewer cannot be made.
      stochastic: at every step, whatever the options.
      requires: what must be known of the network besides its weights: "ms_eps" (Analytic-DPM's statistic), or
        which second head ("sn", "npr").
    """

    module: str
    options: tuple[str, ...] = ()
    extra_evaluations: int = 0
    min_steps: int = 1
    stochastic: bool = False
    requires: str = ""


_OPTIMAL = ("mean", "eta", "clip_pixel", "clip_x0")

SAMPLERS = {
    "ddim": SamplerSpec("ddim", ("eta", "clip_x0")),
    "ddpm": SamplerSpec("ddim", ("variance", "clip_x0"), stochastic=True),
    "f_pndm": SamplerSpec("pndm", ("pndm_convention",), extra_evaluations=9, min_steps=4),
    "s_pndm": SamplerSpec("pndm", ("pndm_convention",), extra_evaluations=1, min_steps=2),
    "deis": SamplerSpec("multistep", ("order",)),
    "dpmpp_2m": SamplerSpec("multistep"),
    "unipc": SamplerSpec("multistep"),
    "analytic": SamplerSpec("analytic", _OPTIMAL, stochastic=True, requires="ms_eps"),
    "sn": SamplerSpec("analytic", _OPTIMAL, stochastic=True, requires="sn"),
    "npr": SamplerSpec("analytic", _OPTIMAL, stochastic=True, requires="npr"),
}

# The values that an option may have; None: any number above 0.
OPTIONS: dict[str, tuple | None] = {
    "clip_x0": (False, True),
    "variance": ("large", "small"),
    "pndm_convention": ("corrected", "published"),
    "order": (1, 2, 3),
    "mean": ("ddpm", "ddim"),
    "clip_pixel": None,
}


def get_sampler(name: str) -> Callable[..., Any]:
    """The function of SAMPLERS[name]; imports jax.

    Raises:
      ValueError: for an unknown name.
    """
    module = importlib.import_module(f"s2dm_jax.samplers.{spec_of(name).module}")
    return getattr(module, name)


def nfe_of(sampler: str, steps: int) -> int:
    """Calls of the network that a sampler makes: S + 9 for F-PNDM, S + 1 for S-PNDM (PNDM), else S.

    Raises:
      ValueError: for an unknown sampler, or fewer steps than it can make.
    """
    facts = spec_of(sampler)
    if steps < facts.min_steps:
        raise ValueError(f"steps={steps} is too few for {sampler}: it needs at least {facts.min_steps}")
    return steps + facts.extra_evaluations


def steps_for_nfe(sampler: str, nfe: int) -> int:
    """The largest number of steps whose `nfe_of` are at most `nfe`.

    Raises:
      ValueError: for an unknown sampler, or a budget below its fewest steps.
    """
    facts = spec_of(sampler)
    fewest = facts.min_steps + facts.extra_evaluations
    if nfe < fewest:
        raise ValueError(f"nfe={nfe} is too few for {sampler}: its fewest steps make {fewest} evaluations")
    return nfe - facts.extra_evaluations


def check_options(sampler: str, **options: Any) -> None:
    """Checks the keyword arguments that only some samplers have.

    Args:
      sampler: one of FACTS.
      **options: "eta" and those of OPTIONS; eta 0 suits every sampler.

    Raises:
      ValueError: for an option that does not exist or that the sampler does not have, or a bad value.
    """
    facts = spec_of(sampler)
    for name, value in options.items():
        if name == "eta":
            if not 0 <= value <= 1:
                raise ValueError(
                    f"eta={value} is not allowed: 0 (deterministic) to 1 (DDPM's posterior variance)"
                )
            if value == 0:
                continue
        elif name not in OPTIONS:
            raise ValueError(
                f"{name}={value!r} is no option of a sampler; there are eta, {', '.join(OPTIONS)}"
            )
        elif (allowed := OPTIONS[name]) is None:
            if not value > 0:
                raise ValueError(f"{name}={value!r} is not allowed: a number above 0, or inf")
        elif value not in allowed:
            raise ValueError(f"{name}={value!r} is not allowed: {' or '.join(map(repr, allowed))}")
        if name not in facts.options:
            have = ", ".join(other for other, its in SAMPLERS.items() if name in its.options)
            raise ValueError(f"{name}={value!r} is no option of {sampler}, only of {have}")
    if options.get("eta") and "mean" in facts.options and options.get("mean", "ddpm") == "ddpm":
        raise ValueError(f"eta={options['eta']} is no option of mean='ddpm', only of mean='ddim'")


def spec_of(sampler: str) -> SamplerSpec:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]
