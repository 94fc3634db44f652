"""Several processes as one run: initialization, barriers, stopping together."""

import contextlib
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from s2dm_jax.common.errors import LostProcess, UserError
from s2dm_jax.devices.sharding import replicated, split_along

# The processes leave together; they wait no longer than this for one that failed.
_SHUTDOWN_SECONDS = 60
# Those of one job start within minutes of each other.
_START_SECONDS = 300

# What Slurm sets in the environment of each process.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def initialize_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run, before JAX's first computation; alone, does nothing.

    Without `coordinator`, process 0's "host:port", they are found under Slurm, Open MPI, and on TPU pods (GCE, GKE).

    Raises:
      UserError: if the other processes do not join in time.
    """
    launched = bool(coordinator) or _has_companions()
    if not launched and not _on_tpu_vm():
        return
    if launched:
        seconds = f"for at most {_START_SECONDS} seconds"
        print(f"waiting for the other processes of this run, {seconds} …", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=_START_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and not launched:
            # A TPU on its own, as in a notebook: there is no cluster to find.
            return
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the processes of this run did not find each other ({reason}); start all of them together, or "
            "give --coordinator_address=HOST:PORT --num_processes=N --process_id=I to each"
        ) from error


def _has_companions() -> bool:
    """Whether a launcher that `jax.distributed` supports started this as one of several processes."""
    slurm = all(name in os.environ for name in _SLURM) and _number_of_processes("SLURM_NTASKS") > 1
    mpi = _number_of_processes("OMPI_COMM_WORLD_SIZE") > 1
    # GKE sets these.
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or mpi or "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def _number_of_processes(variable: str) -> int:
    value = os.environ.get(variable) or "1"
    if not value.isdecimal():
        raise UserError(f"{variable}={value} is not a number of processes; unset it, or start with srun or mpirun")
    return int(value)


def _on_tpu_vm() -> bool:
    """Whether this may be a host of a TPU pod of GCE, which only its metadata server knows."""
    devices = "/dev/accel0", "/dev/vfio/0"
    return importlib.util.find_spec("libtpu") is not None and any(map(os.path.exists, devices))


def is_main_process() -> bool:
    """Whether this is the process that prints, and writes the run's files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """Turns what JAX raises once another process of the run has ended into a `LostProcess`."""
    try:
        yield
    # Only the collectives of several processes have a connection to lose.
    except jax.errors.JaxRuntimeError as error:
        lost = re.search(r"[^\n]*(Gloo|NCCL|[Cc]onnection|peer|UNAVAILABLE|DEADLINE_EXCEEDED)[^\n]*", str(error))
        if jax.process_count() == 1 or not lost:
            raise
        raise LostProcess(
            f"another process of this run has ended, or its connection was lost ({lost[0].strip()[:120]}); start all "
            "of them again, and the run resumes from its newest checkpoint"
        ) from error


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; waits for all of them."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def agrees_with_main(read: Callable[[], str], seconds: float = 0.0) -> bool:
    """Whether what `read` returns is in every process what it is in the main one, within `seconds`."""
    if jax.process_count() == 1:
        return True

    def digest():
        return np.frombuffer(hashlib.sha256(read().encode()).digest(), np.uint8)

    expected, until = np.asarray(multihost_utils.broadcast_one_to_all(digest())), time.monotonic() + seconds
    while not (same := bool(np.array_equal(digest(), expected))) and time.monotonic() < until:
        time.sleep(0.5)
    return not any_process(not same)


def make_agreement() -> Callable[[int], int]:
    """A function that all processes call with a number each, and that returns the smallest of them to all.

    With several processes the answer is that to the call before, and 1 to the first one, so that none waits for the
    others while the devices could work.
    """
    if jax.process_count() == 1:
        return lambda number: number
    pending: jax.Array | np.ndarray = np.ones((), np.int32)
    smallest = jax.jit(lambda numbers: numbers.min(), out_shardings=replicated())

    def agree(number: int) -> int:
        nonlocal pending
        agreed = int(np.asarray(pending))
        mine = np.full(jax.local_device_count(), number, np.int32)
        pending = smallest(jax.make_array_from_process_local_data(split_along(0), mine))
        return agreed

    return agree
