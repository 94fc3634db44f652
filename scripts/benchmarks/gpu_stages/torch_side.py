"""PyTorch's side of a comparison: worker processes whose failure is a note, never a failed measurement."""

import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from workers import Worker, WorkerFailed, torch_settings

from gpu_stages.parts import Settings
from gpu_stages.programs import interleave

# Whether PyTorch compiles the network.
VARIANTS = {"torch.compile": True, "torch eager": False}
# What a worker may take for the steps of a round; in the first cuDNN measures its algorithms.
_MOST_SECONDS, _LEAST_SECONDS = 40.0, 5.0


@contextmanager
def torch_workers(settings: Settings, config: Any, variants: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """Workers with the train step of a config, which get ready at the same time; stopped at the end."""
    workers: dict[str, Worker] = {}
    # A cache of its own makes `torch.compile` as cold as our compilation is.
    environment = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="inductor_", dir=settings.scratch)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in variants:
                options = torch_settings(config, settings.device, channels_last=True, compile=VARIANTS[name])
                with open(f"{folder}/{name}", "w", encoding="utf-8") as errors:
                    workers[name] = Worker(sys.executable, "torch_worker.py", options, environment, errors)
            yield workers
        finally:
            for worker in workers.values():
                worker.stop()


def wait_until_ready(workers: dict[str, Worker], parameters: int, stop_at: float) -> dict[str, str]:
    """Waits until `time.time()` is `stop_at` at most; takes out the workers that failed, and gives the reasons."""
    notes = {}
    for worker in list(workers.values()):
        try:
            found = worker.ready(max(1.0, stop_at - time.time()))["parameters"]
            if found != parameters:
                raise WorkerFailed(worker, f"it has {found:,} parameters, s2dm_jax {parameters:,}")
        except WorkerFailed as failure:
            notes |= _take_out(workers, failure)
    return notes


def interleave_with_torch(
    ours: Callable[[], float], workers: dict[str, Worker], steps: int, rounds: int, deadline: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of "s2dm_jax", our run, and of `steps` of each worker, by `interleave`, and what failed, with reasons.

    Workers that hang one after the other leave time for our own rounds: they are waited for until `deadline` at most,
    but `_LEAST_SECONDS` each. 0 is that of a rehearsal, which waits.
    """
    notes: dict[str, str] = {}

    def run(worker: Worker) -> float:
        left = deadline - time.time() if deadline else _MOST_SECONDS
        return worker.run(steps, min(_MOST_SECONDS, max(_LEAST_SECONDS, left)))

    while True:
        runs = {name: functools.partial(run, worker) for name, worker in workers.items()}
        try:
            return interleave({"s2dm_jax": ours, **runs}, rounds, deadline), notes
        except WorkerFailed as failure:
            notes |= _take_out(workers, failure)


def _take_out(workers, failure):
    name = next(name for name, worker in workers.items() if worker is failure.worker)
    workers.pop(name).stop()
    reason = str(failure)
    return {name: "PyTorch is not installed" if "No module named 'torch'" in reason else reason[:300]}
