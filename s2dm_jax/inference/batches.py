"""Any number of images through a compiled program of one batch size."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from s2dm_jax.common.progress import progress_bar
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.sharding import to_host

_CPU_BATCH = 16


def device_batch_size(batch_size: int) -> int:
    """Images per batch on the devices: on CPU a number that does not depend on `batch_size`.

    Rounding depends on the shapes of a computation, and the byte of one pixel in 30,000 on the rounding. On a GPU that
    is the price of speed; on CPU larger batches are no faster.
    """
    if jax.default_backend() != "cpu":
        return batch_size
    return -(-_CPU_BATCH // jax.device_count()) * jax.device_count()


def map_batches(
    compute: Callable[[np.ndarray], Any], num_images: int, batch_size: int, progress: bool = True
) -> Iterator[Any]:
    """`compute` of the indices 0 … num_images−1, a batch at a time on the host; its arguments are `sample_batches`'s.

    `compute` is a function of indices int [B] → array [B, …] on the device, or a tuple of them; B is the same in every
    call, so that one compiled program suffices, and the results for indices from num_images on are dropped.
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} is out of range: it must be at least 1")
    batch_size = min(batch_size, num_images)
    with progress_bar(num_images, "images", shown=progress and is_main_process()) as advance:
        firsts = range(0, num_images, batch_size)
        pending = compute(np.arange(batch_size))
        for first in firsts[1:]:
            computing = compute(first + np.arange(batch_size))
            # The previous batch is fetched while this one is computed.
            yield jax.tree.map(to_host, pending)
            advance(batch_size)
            pending = computing
        yield jax.tree.map(lambda array: to_host(array)[: num_images - firsts[-1]], pending)
