"""Where a step's images come from: an array on the devices, or a mapped file read ahead by the host.

Both give the same images at the same step. The device path costs no transfer and no host time; it is taken
wherever the set fits into a stated share of a device's memory.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from s2dm_jax.common.errors import UserError
from s2dm_jax.data.batches import batch_indices
from s2dm_jax.devices.sharding import data_mesh, replicated, shard_batch

# Sets smaller than this share of a device's memory lie whole on every device: no traffic between devices.
_REPLICATED_FRACTION = 0.05


class Feed(NamedTuple):
    """The images of a run's steps.

    Attributes:
      images: uint8 [N, H, W, C] on the devices, or None where the host reads.
      batches: function of (first step, number of steps) giving what a chunk scans over: rows [n, B] of
        `images`, or, where that is None, the images themselves, uint8 [n, B, H, W, C].
      summary: where the images are, in one line.
    """

    images: jax.Array | None
    batches: Callable[[int, int], jax.Array]
    summary: str


def make_feed(
    images: np.ndarray, key: jax.Array, batch_size: int, steps: int, share: float, memory: int | None = None
) -> Feed:
    """Puts the images where they fit: whole on every device, spread over the devices, or left to the host.

    Args:
      images: uint8 [N, H, W, C], in memory or mapped.
      key: key of the data order.
      batch_size: images per step.
      steps: steps of the whole run: nothing is read ahead past them.
      share: largest share of a device's memory that the images may take.
      memory: bytes of a device; None to ask it.
    """
    memory = memory or device_memory()
    count, size = len(images), images.nbytes

    def rows(first, length):
        return shard_batch(batch_indices(key, first, length, batch_size, count), axis=1)

    if size <= min(_REPLICATED_FRACTION, share) * memory:
        return Feed(_place(images, count, replicated()), rows, f"{_gb(size)}, whole on every device")
    devices = jax.device_count()
    if size <= share * memory * devices:
        # A row beyond the last is never asked for.
        padded = -(-count // devices) * devices
        on_device = _place(images, padded, NamedSharding(data_mesh(), PartitionSpec("data")))
        return Feed(on_device, rows, f"{_gb(size)}, spread over {devices} device(s)")
    summary = (
        f"{_gb(size)}, read by the host as training goes: more than "
        f"config.data.max_device_memory_fraction={share:g} of {devices} × {_gb(memory)}"
    )
    return Feed(None, _prefetch(images, key, batch_size, steps, share, memory), summary)


def device_memory() -> int:
    """Bytes of memory of one device that JAX may use."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _place(images, count, sharding):
    """The images on the devices, padded with zeros to `count`; each process reads what its devices hold."""

    def part(index):
        start, stop, _ = index[0].indices(count)
        held = np.asarray(images[start:stop])
        return np.pad(held, [(0, stop - start - len(held)), *[(0, 0)] * (held.ndim - 1)])

    return jax.make_array_from_callback((count, *images.shape[1:]), sharding, part)


def _prefetch(images, key, batch_size, steps, share, memory):
    """The function `batches` of a feed that gathers a chunk's images while the one before it runs."""
    sharding = NamedSharding(data_mesh(), PartitionSpec(None, "data"))
    reader = ThreadPoolExecutor(1, "images")
    ahead: dict[tuple[int, int], Future] = {}

    def gather(rows):
        rows = np.asarray(rows)

        def part(index):
            return images[rows[index[0], index[1]]]

        return jax.make_array_from_callback((*rows.shape, *images.shape[1:]), sharding, part)

    def start(first, length):
        # Asked for at once: later it would wait behind the chunk that the device is about to run.
        return reader.submit(gather, batch_indices(key, first, length, batch_size, len(images)))

    def batches(first, length):
        # This chunk and the next are held at once.
        needed = 2 * length * batch_size * images[0].nbytes // jax.device_count()
        if needed > max(share, _REPLICATED_FRACTION) * memory:
            raise UserError(
                f"config.train.log_every={length} steps of config.train.batch_size={batch_size} images need "
                f"{_gb(needed)} on each device of {_gb(memory)}; lower config.train.log_every"
            )
        chunk = ahead.pop((first, length), None) or start(first, length)
        following = first + length, min(length, steps - first - length)
        if following not in ahead:
            ahead.clear()
            if following[1] > 0:
                ahead[following] = start(*following)
        return chunk.result()

    return batches


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
