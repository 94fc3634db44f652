"""Analytic-DPM's statistic: the mean square of the predicted noise at each timestep, over training images."""

import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.common.images import to_unit
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.hardware import jit_network, numerics
from s2dm_jax.devices.sharding import replicate, shard_batch
from s2dm_jax.diffusion.schedule import NoiseSchedule, add_noise
from s2dm_jax.models.network import Network
from s2dm_jax.samplers.noise import initial_noise, seed_key
from s2dm_jax.workdir.folder import output_folder

# Timesteps between two saves.
_TIMESTEPS_PER_CHUNK = 20


def statistics_folder(workdir: str | os.PathLike) -> Path:
    """The folder of a run's statistics, or of an exported sampler's, beside its file."""
    return output_folder(workdir, "", "ms_eps")


class NoiseStatistics(NamedTuple):
    """The statistic and its standard error.

    Attributes:
      ms_eps: float64 [T], E‖ε̂‖²/dim at each timestep.
      standard_error: float64 [T], of ms_eps over the images.
      num_images: number of images at each timestep.
    """

    ms_eps: np.ndarray
    standard_error: np.ndarray
    num_images: int


def estimate_noise_statistics(
    network: Network,
    schedule: NoiseSchedule,
    params: dict,
    images: np.ndarray,
    folder: str | os.PathLike,
    *,
    num_images: int = 100,
    seed: int = 0,
    batch_size: int = 500,
) -> NoiseStatistics:
    """E‖ε̂(x_t, t)‖²/dim (Analytic-DPM, eq. 8), with one noise for each image and timestep; cached.

    The file's name holds a hash of the weights and of `numerics`, so that another network never uses it. An interrupted
    estimate resumes where it stopped.

    Args:
      params: the network's weights to sample with, usually the EMA.
      images: uint8 [N, H, W, C], training images.
      folder: of the cache, from `statistics_folder`.
      num_images: how many of the images, drawn by `seed`; all if there are fewer.
      seed: of the choice and of the noise: that of image i at timestep t depends on (seed, t, i) alone.
      batch_size: images per batch.

    Raises:
      UserError: for a network whose output is not finite.
    """
    num_images = min(num_images, len(images))
    rows = np.random.default_rng(seed).permutation(len(images))[:num_images]
    path = Path(folder) / f"{_stem(schedule, params)}_{num_images}_seed{seed}.npz"
    mean, standard_error = _read(path)
    params = replicate(params)
    with progress_bar(schedule.T, "timesteps", done=len(mean), shown=is_main_process()) as advance:
        while len(mean) < schedule.T:
            # The last chunk is padded and cut, so that one program serves every chunk.
            timesteps = np.minimum(len(mean) + np.arange(_TIMESTEPS_PER_CHUNK), schedule.T - 1)
            batches = []
            for first in range(0, num_images, batch_size):
                indices = (first + np.arange(min(batch_size, num_images))) % num_images
                batch = shard_batch(images[rows[indices]]), shard_batch(indices)
                squares = _squares(network, schedule, params, *batch, timesteps, seed)
                batches.append(np.asarray(squares, np.float64)[:, : num_images - first])
            squares = np.concatenate(batches, axis=1)[: schedule.T - len(mean)]  # [timesteps, images]
            if not np.isfinite(squares).all():
                bad = len(mean) + int(np.argmin(np.isfinite(squares).all(1)))
                raise UserError(
                    f"the network's output at timestep {bad} is not finite for some training images, so that "
                    "Analytic-DPM's statistic cannot be estimated; try model.dtype=float32, or an earlier checkpoint"
                )
            mean = np.append(mean, squares.mean(1))
            standard_error = np.append(standard_error, squares.std(1, ddof=1) / np.sqrt(num_images))
            _write(path, mean, standard_error, num_images, seed)
            advance(len(squares))
    return NoiseStatistics(mean, standard_error, num_images)


def load_cached(
    schedule: NoiseSchedule, params: dict, folder: str | os.PathLike, num_images: int | None = None
) -> NoiseStatistics | None:
    """The cached statistic of these weights: that of `num_images`, or else of the most images; or None."""
    folder, found = Path(folder), []
    # Most runs have no statistic: the weights are hashed only where a file exists.
    for path in folder.glob(f"{_stem(schedule, params)}_*.npz") if any(folder.glob("*.npz")) else ():
        mean, standard_error = _read(path)
        count = int(path.stem.split("_")[1])
        if len(mean) == schedule.T and num_images in (None, count):
            found.append(NoiseStatistics(mean, standard_error, count))
    return max(found, key=lambda statistics: statistics.num_images, default=None)


@jit_network(static_argnums=(0, 1))
def _squares(network, schedule, params, images, indices, timesteps, seed):
    """‖ε̂‖²/dim, [timesteps, images]."""
    x0 = to_unit(images)

    def at_timestep(t):
        # Each timestep has its own noise: one seed of `initial_noise` for each.
        noise_seed = jax.random.bits(jax.random.fold_in(seed_key(seed), t), dtype=jnp.uint32)
        noise = initial_noise(noise_seed, indices, x0.shape[1:])
        t = jnp.full(len(x0), t)
        eps = network.eps_fn(params, schedule)(add_noise(schedule, x0, t, noise), t)
        return jnp.square(eps).mean((1, 2, 3))

    return jax.lax.map(at_timestep, timesteps)


def _stem(schedule, params):
    digest, settings = sha256_of_arrays([schedule.beta, *jax.tree.leaves(params)]), numerics()
    return sha256_of_json([digest, settings], digits=len(digest)) if settings else digest


def _read(path):
    """Mean and standard error of the timesteps that are saved so far."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, standard_error = arrays["ms_eps"], arrays["standard_error"]
            # Before 0.3, NaN was stored as well.
            return (mean, standard_error) if np.isfinite(mean).all() else (np.zeros(0), np.zeros(0))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        # A missing or damaged file is made again.
        return np.zeros(0), np.zeros(0)


def _write(path, mean, standard_error, num_images, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = json.dumps({"num_images": num_images, "seed": seed, "timesteps": len(mean)})
    with atomic_path(path) as temporary:
        np.savez(temporary, ms_eps=mean, standard_error=standard_error, metadata=metadata)
