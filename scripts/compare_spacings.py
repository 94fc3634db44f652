"""Prints how far samplers are from the exact solution, by timestep spacing and number of network evaluations.

The data are numbers whose optimal network has a closed form: a Gaussian, or a mixture of two. The error of a sample
  is its
distance from the exact solution of the probability-flow ODE for the same noise; stochastic samplers are compared by the
quantiles of their samples. `timestep_spacing="auto"` was chosen by this table and by the digits.
"""

import argparse
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from s2dm_jax.common.cli import Parser
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.markdown import markdown_table
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.diffusion.schedule import SCHEDULES, NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.samplers.noise import image_keys, per_image_noise
from s2dm_jax.samplers.specs import SAMPLERS, get_sampler, nfe_of, steps_for_nfe
from s2dm_jax.samplers.timesteps import SPACINGS, TimestepSpec, plan_timesteps, resolve_spacing

NFE = (5, 8, 10, 15, 20, 30, 50, 100)
# Two Gaussians of equal weight each: mean of both, distance of either from it, standard deviation of either.
DATA = {"two modes": (0.0, 0.5, 0.1), "Gaussian": (0.2, 0.0, 0.3)}
_SAMPLES = 1024
_EXAMPLE = (
    "example:\n  python scripts/compare_spacings.py --samplers=dpmpp_2m,unipc --spacings=uniform,quadratic,logsnr"
)


def perfect_eps(schedule: NoiseSchedule, x: jax.Array, t: jax.Array) -> jax.Array:
    """The expected noise in x [B, 1, 1, len(DATA)] at t [B], one kind of data in each channel."""
    mean, mode, std = (jnp.asarray(column, x.dtype) for column in zip(*DATA.values(), strict=True))
    alpha, sigma = (table[:, None, None, None] for table in alpha_sigma(log_alpha_bar(schedule, t, x.dtype)))
    variance = (alpha * std) ** 2 + sigma**2
    centred = x - alpha * mean
    return sigma * (centred - alpha * mode * jnp.tanh(centred * alpha * mode / variance)) / variance


@functools.cache
def exact_solution() -> tuple[np.ndarray, np.ndarray]:
    """Noise at its quantiles, float64 [N, 1, 1, len(DATA)], and where the probability-flow ODE takes it.

    In one dimension the ODE keeps the order of numbers, so that it takes quantiles to quantiles.
    """
    p = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    exact = []
    for mean, mode, std in DATA.values():
        x = np.linspace(-mode - 9 * std, mode + 9 * std, 400_001)
        below = np.asarray(norm.cdf((x - mode) / std) + norm.cdf((x + mode) / std)) / 2
        exact.append(mean + np.interp(p, below, x))
    noise = np.asarray(norm.ppf(p))
    return np.stack([noise] * len(DATA), -1)[:, None, None], np.stack(exact, -1)[:, None, None]


@functools.cache
def _compiled(schedule: NoiseSchedule, sampler: str, options: tuple) -> Callable[..., jax.Array]:
    arguments = dict(options)
    if SAMPLERS[sampler].stochastic:
        arguments["noise_fn"] = per_image_noise(image_keys(0, jnp.arange(_SAMPLES)), (1, 1, len(DATA)))
    eps_fn = functools.partial(perfect_eps, schedule)
    return jax.jit(lambda x, t: get_sampler(sampler)(eps_fn, x, schedule, t, **arguments))


def rms_errors(
    schedule: NoiseSchedule, sampler: str, nfe: int, spacing: str = "auto", **options: object
) -> dict[str, float]:
    """For each kind of data the root mean square of the samples' distance from the exact solution.

    Where the sampler draws noise, samples and solution are sorted first, by their distance from the mean for two modes,
    which get as many samples as chance will have it.

    Raises:
      ValueError: where the sampler has no such NFE.
    """
    spec = TimestepSpec(nfe=nfe, timestep_spacing=spacing)
    timesteps = plan_timesteps(schedule.T, sampler, spec, log_snr=schedule.log_snr)
    x_T, exact = exact_solution()
    x = np.asarray(_compiled(schedule, sampler, tuple(sorted(options.items())))(x_T, timesteps))
    if SAMPLERS[sampler].stochastic:
        x, exact = (np.sort(np.where([mode > 0 for _, mode, _ in DATA.values()], abs(y), y), 0) for y in (x, exact))
    errors = np.sqrt(np.mean((x - exact) ** 2, (0, 1, 2)))
    return dict(zip(DATA, errors.tolist(), strict=True))


def nearest_nfe(sampler: str, nfe: int) -> int:
    """The largest NFE up to `nfe` that a sampler has: Heun's are odd.

    Raises:
      ValueError: where it has none.
    """
    per_step = SAMPLERS[sampler].evaluations_per_step
    return nfe_of(sampler, steps_for_nfe(sampler, nfe - (nfe - SAMPLERS[sampler].extra_evaluations) % per_step))


def table(schedule: NoiseSchedule, samplers: Sequence[str], spacings: Sequence[str]) -> str:
    """The errors times 1,000 in Markdown, a row for each kind of data, sampler and spacing."""
    rows = {}
    for sampler in samplers:
        for spacing in spacings:
            shown = resolve_spacing(spacing, sampler, schedule.log_snr)
            for data in DATA:
                rows[data, sampler, spacing] = [data, sampler, shown]
            for nfe in NFE:
                try:
                    errors = rms_errors(schedule, sampler, nearest_nfe(sampler, nfe), spacing)
                    cells = {data: f"{1000 * error:.3g}" for data, error in errors.items()}
                except ValueError:
                    cells = dict.fromkeys(DATA, "–")
                for data, cell in cells.items():
                    rows[data, sampler, spacing].append(cell)
    ordered = sorted(rows, key=lambda row: list(DATA).index(row[0]))
    return markdown_table(["data", "sampler", "spacing", *map(str, NFE)], [rows[row] for row in ordered])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: for an unknown name.
    """
    # Those that need no statistic and no variance head.
    samplers = [name for name, spec in SAMPLERS.items() if not spec.requires]
    spacings = [name for name in SPACINGS if name != "optimal"]
    parser = Parser(__doc__, _EXAMPLE)
    parser.add_argument("--samplers", default=",".join(samplers), help="samplers, comma-separated (default: all)")
    parser.add_argument("--spacings", default="auto", help="timestep spacings, comma-separated (default: auto)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear", help="noise schedule (default: linear)")
    args = parser.parse_args(argv)
    for flag, allowed in (("samplers", samplers), ("spacings", spacings)):
        names = [name.strip() for name in getattr(args, flag).split(",")]
        setattr(args, flag, names)
        if unknown := [name for name in names if name not in allowed]:
            raise UserError(f"--{flag} has {unknown[0]!r}; it must be of {', '.join(allowed)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Entry point; user errors are one sentence on stderr and exit status 2."""
    with report_user_errors():
        args = parse(argv)
        with jax.enable_x64(True):
            print(table(SCHEDULES[args.schedule](), args.samplers, args.spacings))


if __name__ == "__main__":
    main()
