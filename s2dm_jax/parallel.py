"""One program on one device, on several, and on several hosts.

Batches are split over all devices. Everything else is whole on each, or, if asked for, the weights, their
average and the optimizer's moments are split as well (ZeRO; Rajbhandari et al. 2020).
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s2dm_jax.config import UserError

Tree = TypeVar("Tree")

_IMAGES_PER_CPU_DEVICE = 16
# Smaller arrays are not worth the traffic of splitting them.
_LEAST_ELEMENTS = 2**12
# The processes leave together; one that failed does not keep the others longer than this.
_SECONDS_TO_LEAVE = 60
# What the launchers that `jax.distributed` knows leave in the environment of each of several processes.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def join_hosts(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run, before JAX's first computation; alone, does nothing.

    Without arguments the processes are found under Slurm, Open MPI, and on TPU pods (GCE and GKE).

    Args:
      coordinator: "host:port" of process 0.
      num_processes: how many in all.
      process_id: which of them this is.

    Raises:
      UserError: if the others do not come.
    """
    if coordinator:
        known: dict[str, Any] = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    elif _has_companions() or _on_tpu_vm():
        known = {}
    else:
        return
    try:
        jax.distributed.initialize(**known, shutdown_timeout_seconds=_SECONDS_TO_LEAVE)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and not coordinator and not _has_companions():
            # A TPU on its own, as in a notebook: there is no cluster to find.
            return
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the processes of this run did not find each other ({reason}); start all of them together, or "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I to each"
        ) from error


def _has_companions() -> bool:
    """Whether a launcher says that this is one of several processes."""
    environment = os.environ
    slurm = all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    # GKE sets these.
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def _on_tpu_vm() -> bool:
    """Whether this may be a host of a TPU pod of GCE, which only its metadata server knows."""
    devices = "/dev/accel0", "/dev/vfio/0"
    return importlib.util.find_spec("libtpu") is not None and any(map(os.path.exists, devices))


def is_lead() -> bool:
    """Whether this is the process that prints, and writes the run's files."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; waits for all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def stop_together(received: list[int]) -> Callable[[], bool]:
    """A function, to call before every chunk, of whether to stop: whether any process received a signal.

    With several processes the answer is that to the call before, so that none waits for the others while
    the devices could work; all stop before the same chunk.
    """
    if jax.process_count() == 1:
        return lambda: bool(received)
    vote = np.zeros((), bool)
    count = jax.jit(lambda flags: flags.any(), out_shardings=on_all())

    def stop():
        nonlocal vote
        agreed = bool(np.asarray(vote))
        mine = np.full(jax.local_device_count(), bool(received))
        vote = count(
            jax.make_array_from_process_local_data(NamedSharding(data_mesh(), PartitionSpec("data")), mine)
        )
        return agreed

    return stop


def data_mesh() -> Mesh:
    """All devices in one row, the axis "data"."""
    # Explicit axes, JAX's default, refuse the reshapes of the UNet's upsampling.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def on_all() -> NamedSharding:
    """The sharding of an array that is whole on every device."""
    return NamedSharding(data_mesh(), PartitionSpec())


def copy_to_all(tree: Tree) -> Tree:
    """The arrays of `tree`, whole on every device; each process has the same values."""
    return jax.device_put(tree, on_all())


def key_on_all(key: jax.Array) -> jax.Array:
    """A random key, on every device."""
    # `device_put` refuses keys where another process owns some of the devices.
    data = jax.device_put(np.asarray(jax.random.key_data(key)), on_all())
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def gather(tree: Tree) -> Tree:
    """The arrays of `tree`, split or not, whole on every device."""
    if all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.jit(lambda x: x, out_shardings=on_all())(tree)


def fetch(x: jax.Array) -> np.ndarray:
    """An array that is split over devices, on every host."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def split_batch(x: jax.Array | np.ndarray, axis: int = 0) -> jax.Array:
    """`x` with `axis` split evenly over the devices; whole on every one where that does not go evenly."""
    spec = (
        PartitionSpec(*[None] * axis, "data") if x.shape[axis] % jax.device_count() == 0 else PartitionSpec()
    )
    return jax.device_put(x, NamedSharding(data_mesh(), spec))


def state_shardings(state: Tree, split: bool) -> Tree:
    """Each array's sharding: whole on every device, or split along the longest axis that goes evenly.

    Args:
      state: pytree of arrays or `jax.ShapeDtypeStruct`.
      split: whether to split the arrays that are large enough.
    """
    mesh = data_mesh()

    def sharding(leaf):
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not split or leaf.size < _LEAST_ELEMENTS or not fitting:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(sharding, state)


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
