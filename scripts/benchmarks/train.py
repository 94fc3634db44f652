"""`benchmark.py train`: a train step of s2dm_jax and one of plain PyTorch, each in its own process.

The two are interleaved, so that a slow moment of the machine affects both; ratios are medians over the
rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
# Resolution, ch, ch_mult, num_res_blocks, attn_resolutions, dropout: the published configs, and a small one.
NETWORKS = {
    "cifar10": (32, 128, (1, 2, 2, 2), 2, (16,), 0.1),
    "celeba": (64, 128, (1, 2, 2, 2, 4), 2, (16,), 0.1),
    "small": (16, 32, (1, 2), 1, (8,), 0.1),
}
_NAMES = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "dropout")


def add_arguments(parser) -> None:
    parser.add_argument("--network", choices=NETWORKS, default="cifar10", help="network to train (default: cifar10)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="device of both workers (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the activations (default: bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--batch", type=int, help="batch size (default: 8, on a GPU 128)")
    parser.add_argument("--K", type=int, default=1, help="timesteps per image; above 1 with L_sa (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--steps", type=int, help="steps per round (default: 5, on a GPU 50)")
    parser.add_argument("--devices", type=int, default=0, help="number of CPU devices (default: as in training)")
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        help="Python interpreter with torch installed (default: this one)",
    )
    parser.add_argument(
        "--torch",
        choices=("all", "one", "none"),
        default="all",
        help="number of PyTorch variants (default: all)",
    )


def benchmark_train(arguments) -> None:
    """Times a train step (Adam, EMA, dropout), relative to PyTorch's, and its compilation, cold and warm."""
    gpu = arguments.device == "gpu"
    s = dict(zip(_NAMES, NETWORKS[arguments.network], strict=True))
    s |= {"device": arguments.device, "K": arguments.K, "devices": arguments.devices}
    s["dtype"] = arguments.dtype or ("bfloat16" if gpu else "float32")
    s["batch"] = arguments.batch or (128 if gpu else 8)
    s["steps"] = arguments.steps or (50 if gpu else 5)
    s["threads"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    variants = {"torch": {"channels_last": gpu, "compile": gpu}}
    if arguments.torch == "all":
        variants |= {"torch eager" if gpu else "torch channels_last": {"channels_last": True, "compile": False}}
    if arguments.torch == "none":
        variants = {}
    workers = {}
    try:
        with tempfile.TemporaryDirectory() as cache:
            workers["s2dm_jax"] = Worker(sys.executable, "train.py", s, cache)
            # A second start measures compilation with a warm cache.
            warm = Worker(sys.executable, "train.py", s, cache)
            warm.stop()
        ours = workers["s2dm_jax"].ready
        print(
            f"{arguments.network}, batch {s['batch']}, K = {s['K']}, {s['dtype']}, {ours['devices']} × "
            f"{ours['device']}, {s['steps']} steps a round, {arguments.rounds} rounds"
        )
        print(
            f"trace {ours['trace']:.1f} s, compile {ours['compile']:.1f} s cold, "
            f"{warm.ready['compile']:.1f} s warm, {ours['temp_bytes'] / 2**20:,.0f} MiB of temporaries",
            flush=True,
        )
        for name, variant in variants.items():
            workers[name] = Worker(arguments.torch_python, "torch_worker.py", {**s, **variant}, None)
            found = workers[name].ready
            if found["parameters"] != ours["parameters"]:
                sys.exit(f"{name} has {found['parameters']:,} parameters, s2dm_jax {ours['parameters']:,}")
        _compare(workers, s, arguments.rounds, ours)
    finally:
        for worker in workers.values():
            worker.stop()


def _compare(workers, s, rounds, ours):
    for worker in workers.values():
        worker.run(s["steps"])
    times = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.run(s["steps"]) / s["steps"])
    base = times.get("torch", times["s2dm_jax"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        ratio = statistics.median(t / b for t, b in zip(seconds, base, strict=True))
        rate = ours["flops"] / middle
        line = f"{name:20s} {middle * 1e3:9.1f} ms  {ratio:5.3f}×  {s['batch'] / middle:8,.0f} images/s"
        line += f"  {rate / 1e12:7.2f} TFLOP/s"
        if ours["matmul_rate"]:
            line += f"  {rate / ours['matmul_rate']:.1%} of the matmul rate"
        print(line, flush=True)
    if ours["matmul_rate"]:
        print(f"matmul rate of this run: {ours['matmul_rate'] / 1e12:,.1f} TFLOP/s")


class Worker:
    """A process that reports when it is ready and then runs as many steps as requested."""

    def __init__(self, python, script, settings, cache):
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        # Neither worker imports the packages of the other.
        environment["PYTHONPATH"] = str(SCRIPTS.parents[1])
        if cache:
            environment["JAX_COMPILATION_CACHE_DIR"] = cache
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        if settings["device"] == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            [python, str(SCRIPTS / script), json.dumps(settings)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            sys.exit("a worker failed; the PyTorch side needs torch (pip install '.[torch]' or --torch-python)")
        return json.loads(line)

    def run(self, steps: int) -> float:
        """Runs steps and returns the seconds that they took."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def work(s: dict) -> None:
    """The worker of s2dm_jax: it runs the same compiled chunk of steps as training."""
    import jax
    import numpy as np

    from s2dm_jax.config.defaults import default_config
    from s2dm_jax.devices import sharding
    from s2dm_jax.models.flops import step_flops
    from s2dm_jax.models.network import num_params
    from s2dm_jax.models.unet import UNet
    from s2dm_jax.training.step import jit_step, make_train_chunk
    from s2dm_jax.workdir.state import init_state, make_optimizer

    if s["devices"]:
        jax.config.update("jax_num_cpu_devices", s["devices"])
    elif s["device"] == "cpu":
        sharding.set_cpu_device_count(s["batch"])
    rate = _matmul_rate() if s["device"] == "gpu" else None

    config = default_config()
    config.data.random_flip = True
    config.loss.K, config.loss.lam = s["K"], float(s["K"] > 1)
    shape = [s[name] for name in _NAMES]
    shape[2], shape[4] = tuple(shape[2]), tuple(shape[4])
    network = UNet(shape[0], 3, 3, *shape[1:], dtype=s["dtype"])
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    state = sharding.replicate(init_state(network, optimizer, 0))
    rng = np.random.default_rng(0)
    images = sharding.replicate(rng.integers(0, 256, (1024, shape[0], shape[0], 3), np.uint8))
    rows = rng.integers(0, 1024, (s["steps"], s["batch"])).astype(np.int32)
    arguments = images, sharding.shard_batch(rows, axis=1), sharding.replicate_key(jax.random.key(0))
    chunk = jit_step(make_train_chunk(config, network, optimizer), out_shardings=sharding.replicated())
    began = time.perf_counter()
    lowered = chunk.lower(state, *arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    ready = {
        "trace": traced - began,
        "compile": compiled - traced,
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "flops": step_flops(network, s["batch"], s["K"]),
        "parameters": num_params(network),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "matmul_rate": rate,
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line) // s["steps"]):
            state, metrics = program(state, *arguments)
        jax.block_until_ready(metrics)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def _matmul_rate(size: int = 8192, repeats: int = 50) -> float:
    """FLOP/s of a large bfloat16 matrix product: the maximum of five measurements."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, repeats, lambda _, y: (x @ y) * jnp.bfloat16(0.01), x)

    products(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        products(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * repeats / best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=f"{__doc__}\nRun python scripts/benchmarks/benchmark.py train --help.")
    parser.add_argument("settings", type=json.loads, help="JSON, as written by benchmark_train")
    work(parser.parse_args().settings)
