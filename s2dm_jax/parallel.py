"""Data parallelism: batches are split over all devices, everything else is copied to each."""

import os
from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

_IMAGES_PER_CPU_DEVICE = 16


def data_mesh() -> Mesh:
    """All devices in one row, the axis "data"."""
    # Explicit axes, JAX's default, refuse the reshapes of the UNet's upsampling.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def on_all() -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(data_mesh(), PartitionSpec())


def copy_to_all(tree: Tree) -> Tree:
    """The arrays of `tree`, whole on every device."""
    return jax.device_put(tree, on_all())


def split_batch(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x` with `axis` split evenly over the devices; whole on every one where that does not go evenly."""
    spec = (
        PartitionSpec(*[None] * axis, "data") if x.shape[axis] % jax.device_count() == 0 else PartitionSpec()
    )
    return jax.device_put(x, NamedSharding(data_mesh(), spec))


def use_all_cores(batch_size: int) -> None:
    """Makes JAX, before its first computation, see a CPU as several devices that can share a batch.

    Two devices of one core each do a step in about 0.7 of the time that one device of two cores needs: small
    operations do not split well over threads. A number of devices set in XLA_FLAGS stays as it is.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(1, min(cores, batch_size // _IMAGES_PER_CPU_DEVICE))
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, most + 1) if batch_size % n == 0))
