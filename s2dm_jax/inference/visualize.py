"""Rows of images: between two noises, along the denoising, the same noise through several runs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.progress import progress_bar
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.saturation import Report, ends_of, warn
from s2dm_jax.samplers.noise import initial_noise, slerp
from s2dm_jax.samplers.specs import SAMPLERS


def interpolate(
    model: Model,
    starts: Sequence[int],
    ends: Sequence[int],
    num_images: int = 11,
    *,
    seed: int = 0,
    end_seed: int | None = None,
    sampler: str = "ddim",
    report: Report = warn,
    **options: Any,
) -> np.ndarray:
    """Samples from noise on the great circle between two images' noise (DDIM, eq. 67; S²-DMs, Figure 6).

    Args:
      model: what to sample from.
      starts, ends: indices, one pair for each row; a row's ends are the plain samples of its pair.
      num_images: images in a row, at least 2; the weights are equally spaced, 11 gives 0, 0.1, … 1.
      seed: of the starts.
      end_seed: of the ends, by default the same.
      sampler: a deterministic sampler.
      report: is called if the images are nonsense, as in `Model.sample`.
      **options: as for `sampler.configure_sampler`; eta stays 0.

    Returns:
      uint8 [rows, num_images, H, W, C].

    Raises:
      ValueError: for a stochastic sampler, fewer than 2 images, or unequal numbers of ends.
    """
    if options.get("eta") or (sampler in SAMPLERS and SAMPLERS[sampler].stochastic):
        raise ValueError(
            f"{sampler} with eta={options.get('eta', 0)} is stochastic; interpolation needs a deterministic sampler"
        )
    if num_images < 2:
        raise ValueError(f"num_images={num_images} is out of range: it must be at least 2")
    sample_fn, timesteps = model.sampler(sampler, **options)
    weights = jnp.linspace(0, 1, num_images)
    seeds = (seed, seed if end_seed is None else end_seed)
    rows: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    with progress_bar(len(starts), "rows") as advance:
        for pair in zip(starts, ends, strict=True):
            x_T = _noise_between(model.image_shape, seeds, pair, weights)  # [num_images, H, W, C]
            # With x_T given and no noise at the steps, the indices have no effect.
            row = sample_fn.with_counts(model.ema_params, timesteps, 0, np.arange(num_images), x_T=x_T)
            for array, arrays in zip(row, (rows, counts), strict=True):
                arrays.append(np.asarray(array))
            advance(1)
    if fault := model.fault_of(ends_of(counts, model.image_shape), sampler, **options):
        report(fault)
    return np.stack(rows)


@functools.partial(jax.jit, static_argnums=0)
def _noise_between(shape, seeds, pair, weights):
    x_a, x_b = (initial_noise(seed, jnp.array([index]), shape) for seed, index in zip(seeds, pair, strict=True))
    return slerp(x_a, x_b, weights)


def trajectory(
    model: Model, indices: Sequence[int], *, seed: int = 0, report: Report = warn, **options: Any
) -> np.ndarray:
    """The prediction of x_0 at each timestep on the way to an image.

    Args:
      model: what to sample from.
      indices: of the images; all of them are computed at once.
      seed: of the noise.
      report: is called if the images are nonsense, as in `Model.sample`.
      **options: as for `sampler.configure_sampler`.

    Returns:
      uint8 [len(indices), S, H, W, C], the noisiest timestep first, with the image itself in place of the last.

    Raises:
      ValueError: as `sampler.configure_sampler`.
    """
    sample_fn, timesteps = model.sampler(**options)
    where = model.ema_params, timesteps, seed, np.asarray(indices)
    images, counts = sample_fn.with_counts(*where, trajectory=True)
    if fault := model.fault_of(ends_of([np.asarray(counts)], model.image_shape), **options):
        report(fault)
    return np.asarray(images)


def compare(models: Sequence[Model], n: int, *, seed: int = 0, **options: Any) -> np.ndarray:
    """The same noise through several models of one image shape (S²-DMs, Figures 4 and 5).

    Args:
      models: one for each row.
      n: number of images in a row.
      seed: of the noise.
      **options: as for `Model.sample`.

    Returns:
      uint8 [len(models), n, H, W, C].

    Raises:
      ValueError: for models of different image shapes, and as `Model.sample`.
    """
    shapes = {model.image_shape for model in models}
    if len(shapes) > 1:
        raise ValueError(f"the models make images of different shapes: {sorted(shapes)}")
    return np.stack([model.sample(n, seed=seed, **options) for model in models])
