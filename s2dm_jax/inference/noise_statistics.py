"""Analytic-DPM's statistic: the mean square of the predicted noise at every level, over training images."""

import functools
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.files import atomic_path
from s2dm_jax.common.hashing import sha256_of_arrays
from s2dm_jax.common.images import to_unit
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.sharding import replicate, shard_batch
from s2dm_jax.diffusion.schedule import NoiseSchedule, add_noise
from s2dm_jax.models import unet
from s2dm_jax.models.unet import UNet
from s2dm_jax.samplers.noise import initial_noise


def statistics_folder(workdir: str | os.PathLike) -> Path:
    """Where the statistics of a run are kept."""
    return Path(workdir) / "ms_eps"


# Levels between two saves of what is known so far.
_TIMESTEPS_AT_ONCE = 20


class NoiseStatistics(NamedTuple):
    """The statistic and how well it is known.

    Attributes:
      ms_eps: float64 [T], E‖ε̂‖²/dim at each level.
      standard_error: float64 [T], of ms_eps over the images.
      num_images: images behind each level.
    """

    ms_eps: np.ndarray
    standard_error: np.ndarray
    num_images: int


def estimate_noise_statistics(
    network: UNet,
    schedule: NoiseSchedule,
    params: dict,
    images: np.ndarray,
    folder: str | os.PathLike,
    *,
    num_images: int = 100,
    seed: int = 0,
    batch_size: int = 500,
) -> NoiseStatistics:
    """E‖ε̂(x_t, t)‖²/dim (Analytic-DPM, eq. 8), one noise for each image and level; kept, and read if kept.

    The file's name holds the weights' hash, so that another network never uses it. What an interrupted call
    has done is kept, too.

    Args:
      network: the network that `params` belong to.
      schedule: the forward process.
      params: weights that will sample, as a rule the moving average.
      images: uint8 [N, H, W, C], training images.
      folder: where the statistic is kept.
      num_images: how many of the images, drawn by `seed`; all where there are fewer.
      seed: of the choice and of the noise: that of image i at level t depends on (seed, t, i) alone.
      batch_size: images at once.

    Raises:
      OSError: if the folder cannot be written to.
    """
    num_images = min(num_images, len(images))
    rows = np.random.default_rng(seed).permutation(len(images))[:num_images]
    path = _path(folder, schedule, params, num_images, seed)
    mean, standard_error = _read(path)
    params = replicate(params)
    with progress_bar(schedule.T, "levels", done=len(mean), shown=is_main_process()) as advance:
        while len(mean) < schedule.T:
            # The last piece is filled up and cut, so that every piece is one program.
            levels = np.minimum(len(mean) + np.arange(_TIMESTEPS_AT_ONCE), schedule.T - 1)
            pieces = []
            for first in range(0, num_images, batch_size):
                at = (first + np.arange(min(batch_size, num_images))) % num_images
                batch = shard_batch(images[rows[at]]), shard_batch(at)
                piece = _squares(network, schedule, params, *batch, levels, seed)
                pieces.append(np.asarray(piece, np.float64)[:, : num_images - first])
            squares = np.concatenate(pieces, axis=1)[: schedule.T - len(mean)]
            mean = np.append(mean, squares.mean(1))
            spread = squares.std(1, ddof=1) / np.sqrt(num_images)
            standard_error = np.append(standard_error, spread)
            _write(path, mean, standard_error, num_images, seed)
            advance(len(squares))
    return NoiseStatistics(mean, standard_error, num_images)


def load_cached(
    schedule: NoiseSchedule, params: dict, folder: str | os.PathLike, num_images: int | None = None
) -> NoiseStatistics | None:
    """What `estimate_noise_statistics` has kept of these weights, of most images unless `num_images` is
    given; or None.
    """
    folder, found = Path(folder), []
    # Most runs have no statistic: the weights are hashed only where there is one to compare with.
    paths = folder.glob(f"{_stem(schedule, params)}_*.npz") if any(folder.glob("*.npz")) else ()
    for path in paths:
        mean, standard_error = _read(path)
        count = int(path.stem.split("_")[1])
        if len(mean) == schedule.T and num_images in (None, count):
            found.append(NoiseStatistics(mean, standard_error, count))
    return max(found, key=lambda moments: moments.num_images, default=None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _squares(network, schedule, params, images, indices, levels, seed):
    """‖ε̂‖²/dim, [levels, images]."""
    x0 = to_unit(images)

    def at_level(t):
        # Each level has its own noise: one seed of `initial_noise` for each.
        level_seed = jax.random.bits(jax.random.fold_in(jax.random.key(seed), t), dtype=jnp.uint32)
        noise = initial_noise(level_seed, indices, x0.shape[1:])
        t = jnp.full(len(x0), t)
        eps = unet.apply(network, params, add_noise(schedule, x0, t, noise), t)
        return jnp.square(eps).mean((1, 2, 3))

    return jax.lax.map(at_level, levels)


def _stem(schedule, params):
    return sha256_of_arrays([schedule.beta, *jax.tree.leaves(params)])


def _path(folder, schedule, params, num_images, seed):
    return Path(folder) / f"{_stem(schedule, params)}_{num_images}_seed{seed}.npz"


def _read(path):
    """Mean and standard error of the levels that are known so far."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["ms_eps"], arrays["standard_error"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        # No file, or a damaged one: it can be made again.
        return np.zeros(0), np.zeros(0)


def _write(path, mean, standard_error, num_images, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = json.dumps({"num_images": num_images, "seed": seed, "timesteps": len(mean)})
    with atomic_path(path) as temporary:
        np.savez(temporary, ms_eps=mean, standard_error=standard_error, metadata=metadata)
