"""One program on one device, on several, and on several hosts.

Batches are split over all devices. All else is replicated, or, with `train.shard_state`, the weights, their EMA and the
optimizer's moments are split as well (ZeRO; Rajbhandari et al. 2020).
"""

import os
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s2dm_jax.common.jax_environment import xla_flags

Tree = TypeVar("Tree")

_IMAGES_PER_CPU_DEVICE = 16

# Smaller arrays are not worth the traffic of splitting them.
_MIN_SHARDED_SIZE = 2**12


def data_mesh() -> Mesh:
    """All devices in one row, the axis "data"."""
    # Explicit axes, JAX's default, refuse the reshapes of the UNet's upsampling.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
    """The sharding of an array that every device has a copy of."""
    return NamedSharding(data_mesh(), PartitionSpec())


def split_along(axis: int) -> NamedSharding:
    """The sharding of an array whose `axis` is split evenly over all devices."""
    return NamedSharding(data_mesh(), PartitionSpec(*[None] * axis, "data"))


def replicate(tree: Tree) -> Tree:
    """The arrays of `tree` copied to every device; each process has the same values."""
    return jax.device_put(tree, replicated())


def replicate_key(key: jax.Array) -> jax.Array:
    """A random key copied to every device."""
    # `device_put` refuses keys where another process owns some of the devices.
    data = jax.device_put(np.asarray(jax.random.key_data(key)), replicated())
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def unshard(tree: Tree) -> Tree:
    """The arrays of `tree`, split or not, replicated on every device."""
    if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.jit(lambda x: x, out_shardings=replicated())(tree)


def to_host(x: jax.Array) -> np.ndarray:
    """An array that is split over devices, on every host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def shard_batch(x: jax.Array | np.ndarray, axis: int = 0) -> jax.Array:
    """`x` with `axis` split evenly over the devices; replicated where their number does not divide it."""
    divisible = x.shape[axis] % jax.device_count() == 0
    return jax.device_put(x, split_along(axis) if divisible else replicated())


def state_shardings(state: Tree, split: bool) -> Tree:
    """The sharding of each array or `jax.ShapeDtypeStruct`: replicated, or, with `split` and where large, split along
    the longest axis that the number of devices divides.
    """
    num_devices = data_mesh().size

    def sharding(leaf):
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % num_devices == 0]
        if not split or leaf.size < _MIN_SHARDED_SIZE or not divisible:
            return replicated()
        return split_along(max(divisible, key=lambda axis: leaf.shape[axis]))

    return jax.tree.map(sharding, state)


def set_cpu_device_count(batch_size: int) -> None:
    """Makes JAX, before its first computation, see a CPU as several devices that can share a batch.

    Two devices of one core each do a step in about 0.7 of the time that one device of two cores needs: small operations
    do not split well over threads. A number of devices set in XLA_FLAGS or JAX_NUM_CPU_DEVICES stays as it is.
    """
    forced = any("xla_force_host_platform_device_count" in flag for flag in xla_flags())
    if forced or os.environ.get("JAX_NUM_CPU_DEVICES", "-1") != "-1":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, min(cores, batch_size // _IMAGES_PER_CPU_DEVICE))
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
