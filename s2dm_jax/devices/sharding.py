"""One program on one device, on several, and on several hosts.

Batches are split over all devices. All else is replicated, or, with `train.shard_state`, the weights, their EMA and the
optimizer's moments are split as well (ZeRO; Rajbhandari et al. 2020).
"""

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

# Smaller arrays are not worth the traffic of splitting them.
_MIN_SHARDED_SIZE = 2**12


def data_mesh() -> Mesh:
    """All devices in one row, the axis "data"."""
    # Explicit axes, JAX's default, refuse the reshapes of the UNet's upsampling.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated() -> NamedSharding:
    """The sharding of an array of which every device has a copy."""
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
    """`x` with `axis` split evenly over the devices; replicated if their number does not divide it."""
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
