"""The source of a step's images: an array on the devices if it fits, else a mapped file that the host prefetches."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from s2dm_jax.common.errors import UserError
from s2dm_jax.data.batches import batch_indices
from s2dm_jax.devices.sharding import data_mesh, replicated, shard_batch

# Datasets smaller than this fraction of a device's memory are replicated: no traffic between devices.
_REPLICATED_FRACTION = 0.05


class Feed(NamedTuple):
    """The images of a run's steps.

    Attributes:
      placement: where the images are: all on every device, sharded over the devices, or on the host.
      images: uint8 [N, H, W, C] on the devices, or None if the host reads.
      batches: function of (first step, number of steps) giving what a chunk loops over: rows [n, B] of `images`, or,
        where that is None, the images themselves, uint8 [n, B, H, W, C]; zeros for steps after the run's last one.
      summary: size and placement, in one line.
    """

    placement: Literal["replicated", "sharded", "host"]
    images: jax.Array | None
    batches: Callable[[int, int], jax.Array]
    summary: str


def make_feed(
    images: np.ndarray, key: jax.Array, batch_size: int, steps: int, max_fraction: float, memory: int | None = None
) -> Feed:
    """Places the images wherever they fit: on every device, sharded over the devices, or on the host.

    Args:
      images: uint8 [N, H, W, C], in memory or mapped.
      key: key of the data order, `batches.run_keys`.
      steps: train steps of the run, beyond which nothing is prefetched.
      max_fraction: of a device's memory, the most that the images may take.
      memory: bytes of a device; None to ask the device.
    """
    memory = memory or _device_memory()
    size, devices = images.nbytes, jax.device_count()

    def rows(first, length):
        return shard_batch(batch_indices(key, first, length, batch_size, len(images)), axis=1)

    if size <= min(_REPLICATED_FRACTION, max_fraction) * memory:
        on_device = _place(images, len(images), replicated())
        return Feed("replicated", on_device, rows, f"{_size(size)}, replicated on every device")
    if size <= max_fraction * memory * devices:
        # The rows of the padding are never read.
        padded = -(-len(images) // devices) * devices
        on_device = _place(images, padded, NamedSharding(data_mesh(), PartitionSpec("data")))
        return Feed("sharded", on_device, rows, f"{_size(size)}, sharded over {devices} device(s)")
    summary = (
        f"{_size(size)}, prefetched by the host: more than "
        f"config.data.max_device_memory_fraction={max_fraction:g} of {devices} × {_size(memory)}"
    )
    return Feed("host", None, _prefetch(images, key, batch_size, steps, max_fraction, memory), summary)


def _device_memory() -> int:
    """Bytes of memory of one device that JAX may use."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _place(images, count, sharding):
    """The images on the devices, padded with zeros to `count`; each process reads what its devices hold."""

    def part(index):
        start, stop, _ = index[0].indices(count)
        rows = np.asarray(images[start:stop])
        return np.pad(rows, [(0, stop - start - len(rows)), *[(0, 0)] * (rows.ndim - 1)])

    return jax.make_array_from_callback((count, *images.shape[1:]), sharding, part)


def _prefetch(images, key, batch_size, steps, max_fraction, memory):
    """The function `batches` of a feed that gathers a chunk's images while the one before it runs."""
    sharding = NamedSharding(data_mesh(), PartitionSpec(None, "data"))
    reader = ThreadPoolExecutor(1, "images")
    ahead: dict[tuple[int, int], Future] = {}

    def gather(rows):
        rows = np.asarray(rows)  # [n, B]

        def part(index):
            return images[rows[index[0], index[1]]]

        return jax.make_array_from_callback((*rows.shape, *images.shape[1:]), sharding, part)

    # The last chunk has the shape of the others, whose program it runs in.
    @functools.partial(jax.jit, static_argnums=1, out_shardings=sharding)
    def pad(chunk, length):
        return jnp.zeros((length, *chunk.shape[1:]), chunk.dtype).at[: len(chunk)].set(chunk)

    def start(first, length):
        # The indices are computed now: later they would wait behind the chunk that the device is about to run.
        return reader.submit(gather, batch_indices(key, first, length, batch_size, len(images)))

    def batches(first, length):
        # This chunk and the next are in memory at once.
        needed = 2 * length * batch_size * images[0].nbytes // jax.device_count()
        if needed > max(max_fraction, _REPLICATED_FRACTION) * memory:
            raise UserError(
                f"config.train.log_every={length} steps of config.train.batch_size={batch_size} images need "
                f"{_size(needed)} on each device of {_size(memory)}; lower config.train.log_every"
            )
        count = min(length, steps - first)
        chunk = ahead.pop((first, count), None) or start(first, count)
        following = first + length, min(length, steps - first - length)
        if following not in ahead:
            ahead.clear()
            if following[1] > 0:
                ahead[following] = start(*following)
        return chunk.result() if count == length else pad(chunk.result(), length)

    return batches


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
