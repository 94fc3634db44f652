"""Bits per dimension in an evaluation: of the chain over all timesteps, and of the chain of each row of the table."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from s2dm_jax.common.files import atomic_path
from s2dm_jax.common.hashing import sha256_of_arrays
from s2dm_jax.config.evaluation_plan import EvalPoint
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.evaluation.bound import Bound, Chain, variational_bound
from s2dm_jax.evaluation.point_cache import cached
from s2dm_jax.inference.sampler import resolve_program, sampler_inputs
from s2dm_jax.models.network import Network
from s2dm_jax.models.variance_head import Head
from s2dm_jax.samplers.analytic import HEAD_COV_X0
from s2dm_jax.samplers.specs import SAMPLERS, clips_x0

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Images for a standard error.
_MIN_IMAGES = 2


class BoundInputs(NamedTuple):
    """What all chains of an evaluation share.

    Attributes:
      network, schedule, params: what is measured; the weights to sample with.
      ms_eps, variance_head: what samplers require besides, as in `inference.model.Model`.
      images: uint8 [N, H, W, C], held-out images.
      depends_on: what every number depends on, with "seed", "num_images", and the digest of `images`.
      skip_scale: the fields skip_scale… of the config that count.
      batch_size: images per batch.
    """

    network: Network
    schedule: NoiseSchedule
    params: dict
    ms_eps: np.ndarray | None
    variance_head: Head | None
    images: np.ndarray
    depends_on: dict
    skip_scale: dict
    batch_size: int

    @property
    def indices(self) -> np.ndarray:
        """Which of the images are used, drawn by the seed."""
        order = np.random.default_rng(self.depends_on["seed"]).permutation(len(self.images))
        return order[: self.depends_on["num_images"]]


def measure_bounds(
    points: Sequence[EvalPoint], rows: Sequence[dict], inputs: BoundInputs, folders: Sequence[Path]
) -> dict:
    """Adds `bound_of_point` to each point's row and returns `bound_of_all_timesteps`, "provenance" among its keys.

    `folders` are those of the cache, as for `cached`. Without at least two images there is nothing but a note.
    """
    count = len(inputs.indices)
    if count < _MIN_IMAGES:
        for row in rows:
            row["notes"] = [*row["notes"], f"no bits_per_dim: {count} held-out image is too few"]
        return {}
    for point, row in zip(points, rows, strict=True):
        values = bound_of_point(point, inputs, folders)
        row["notes"] = [*row["notes"], *values.pop("notes", [])]
        row |= values
        if values:
            _print(f"{row['name']}, NFE {point.nfe}", values)
    whole = bound_of_all_timesteps(points, inputs, folders)
    if not whole["variances"]:
        for row in rows:
            row["notes"] = [*row["notes"], "no bits_per_dim over all timesteps: it is not finite"]
        return {}
    for name, values in whole["variances"].items():
        _print(f"all {inputs.schedule.T:,} timesteps, variance {name}", values)
    return {**whole, "provenance": {"images": f"{count} held-out images", "sha256": inputs.depends_on["images"]}}


def _print(label: str, values: dict) -> None:
    if is_main_process():
        print(f"{label}: {values['bits_per_dim']:.3f} ± {values['bits_per_dim_se']:.3f} bits/dim", flush=True)


def bound_of_all_timesteps(points: Sequence[EvalPoint], inputs: BoundInputs, folders: Sequence[Path]) -> dict:
    """The bound of the chain that visits every timestep, x̂_0 clipped as in DDPM's code: plain data.

    Returns:
      {"timesteps": T, "prior": L_T, "variances": {name: {"bits_per_dim", "bits_per_dim_se", "terms": [T], L_0 first}}},
      for β̃ ("small"), β ("large") and what the network, or one of the points' samplers, has besides.
    """
    T = inputs.schedule.T
    whole = {"steps": T, "timestep_spacing": "uniform", "clip_x0": True, **inputs.skip_scale}
    program, timesteps, arguments = resolve_program(inputs.network, inputs.schedule, "ddpm", **whole)
    required = [name for name in SAMPLERS if SAMPLERS[name].requires and any(point.sampler == name for point in points)]
    variances = ["small", "large", *required]
    scale = arguments["scale"]
    if getattr(inputs.network, "learned_variance", False) and scale is None and not set(HEAD_COV_X0) & set(required):
        variances.append("learned")
    chain = Chain(program.network, program.schedule, tuple(variances))
    values = _measured("bits_per_dim", chain, timesteps, scale, inputs, folders)
    prior = next((bound["prior"] for bound in values.values()), None)
    fields = ("bits_per_dim", "bits_per_dim_se", "terms")
    bounds = {name: {field: bound[field] for field in fields} for name, bound in values.items()}
    return {"timesteps": T, "prior": prior, "variances": bounds}


def bound_of_point(point: EvalPoint, inputs: BoundInputs, folders: Sequence[Path]) -> dict:
    """The bound of the chain that a point samples from: "bits_per_dim" and "bits_per_dim_se" of its row, and "bound",
    with the variance, the timesteps, L_T ("prior") and the other terms, L_0 first. Without one only "notes".
    """
    requested = {"nfe": point.nfe, "timestep_spacing": point.timestep_spacing, **inputs.skip_scale, **point.options}
    requires = {"ms_eps": inputs.ms_eps, "head": inputs.variance_head}
    program, timesteps, arguments = resolve_program(
        inputs.network, inputs.schedule, point.sampler, **requires, **requested
    )
    own = dict(program.options)
    variance = variance_of(point.sampler, {**own, "eta": arguments["eta"]})
    if not variance:
        reason = (
            "it is that of DDPM's Gaussian steps, which ddpm has, ddim with eta=1, and analytic, sn and npr with "
            "mean='ddpm'"
        )
        return {"notes": [f"no bits_per_dim: {reason}"]}
    bounds = bool(clips_x0(point.sampler, **own)), own.get("dynamic_threshold")
    chain = Chain(program.network, program.schedule, (variance,), *bounds)
    name = f"bits_per_dim_{point.name}_nfe{point.nfe}"
    values = _measured(name, chain, timesteps, arguments["scale"], inputs, folders)
    if not values:
        return {"notes": ["no bits_per_dim: it is not finite"]}
    bound = values[variance]
    row = {name: bound.pop(name) for name in ("bits_per_dim", "bits_per_dim_se")}
    return {**row, "bound": {"variance": variance, "timesteps": timesteps.tolist(), **bound}}


def variance_of(sampler: str, options: dict) -> str:
    """The variance of a sampler's Gaussian steps, a name in `diffusion.bound.VARIANCES`; "" where with these options it
    has no steps of DDPM's form (Ho et al. 2020, eq. 7), to which the bound belongs.
    """
    if sampler == "ddpm":
        return options.get("variance", "large")
    if sampler == "ddim":
        return "small" if options.get("eta") == 1 and not options.get("raw_eps") else ""
    return sampler if SAMPLERS[sampler].requires and options.get("mean", "ddpm") == "ddpm" else ""


def _measured(name, chain, timesteps, scale, inputs, folders):
    """{variance: {"bits_per_dim", "bits_per_dim_se", "prior", "terms"}} of the finite bounds, cached."""
    statistics = inputs.ms_eps, inputs.variance_head
    required = {
        variance: sampler_inputs(chain.schedule, variance, scale, *statistics)
        for variance in chain.variances
        if variance in SAMPLERS
    }
    depends_on = {
        **inputs.depends_on,
        **inputs.skip_scale,
        **{field: getattr(chain, field) for field in ("variances", "clip_x0", "dynamic_threshold")},
        "activations": chain.network.dtype,
        "timesteps": timesteps.tolist(),
        "inputs": {variance: sha256_of_arrays(jax.tree.leaves(values)) for variance, values in required.items()},
    }

    def compute() -> dict[str, Any]:
        what = chain, inputs.params, inputs.images, timesteps
        options = {"seed": depends_on["seed"], "batch_size": inputs.batch_size, "indices": inputs.indices}
        bounds = variational_bound(*what, inputs=required, scale=scale, **options)
        return {variance: _plain(bound) for variance, bound in bounds.items() if np.isfinite(bound.bits_per_dim)}

    return cached(folders, name, depends_on, compute)


def _plain(bound: Bound) -> dict:
    values = {"bits_per_dim": bound.bits_per_dim, "bits_per_dim_se": bound.standard_error}
    return {**values, "prior": bound.prior, "terms": bound.terms.tolist()}


def plot_terms(results: dict) -> "Figure":
    """A matplotlib figure of the terms: of the chain over all timesteps, and of the rows that have a bound."""
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if "bound" in row]
    figure = Figure(figsize=(11 if rows else 6, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if rows else 1, squeeze=False)[0]
    whole = results["bits_per_dim"]
    for name, bound in whole["variances"].items():
        counted = range(1, whole["timesteps"] + 1)
        panels[0].plot(counted, bound["terms"], label=f"{name}, {bound['bits_per_dim']:.3f} bits/dim")
    panels[0].set_title(f"all {whole['timesteps']:,} timesteps")
    for row in rows:
        label = f"{row['name']}, NFE {row['nfe']}, {row['bits_per_dim']:.3f} bits/dim"
        panels[1].plot(np.add(row["bound"]["timesteps"], 1), row["bound"]["terms"], marker=".", label=label)
        panels[1].set_title("the timesteps of each row")
    for panel in panels:
        panel.set(xlabel="timestep + 1", xscale="log", ylabel="term of the bound, bits/dim", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    return figure


def save_plot(path: Path, results: dict) -> None:
    """Writes `plot_terms` to a .png, or says in a line that matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot of the terms, which needs matplotlib: pip install 's2dm_jax[plot]'")
        return
    with atomic_path(path) as temporary:
        plot_terms(results).savefig(temporary, dpi=150, format="png")
    print(f"terms of the bound: {path}")
