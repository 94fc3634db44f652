"""`benchmark.py train`: a train step of s2dm_jax and one of plain PyTorch, each in its own process.

The two are interleaved, so that a slow moment of the machine affects both; ratios are medians over the
rounds.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from gpu_stages.programs import compile_train, interleave, published_config, ratio
from gpu_stages.rates import matmul_rate
from workers import Worker, WorkerFailed, torch_settings

from s2dm_jax.common.signals import end_on_signal, removed_on_signal

# Config and fields: the published ones, and a small network.
NETWORKS = {
    "cifar10": ("configs/cifar10.py:ddpm", {}),
    "celeba": ("configs/celeba64.py:ddpm", {}),
    "improved": ("configs/cifar10_improved.py:ddpm", {}),
    "small": (
        "configs/cifar10.py:ddpm",
        {
            "data.resolution": 16,
            "model.ch": 32,
            "model.ch_mult": (1, 2),
            "model.num_res_blocks": 1,
            "model.attn_resolutions": (8,),
        },
    ),
    "improved_small": (
        "configs/cifar10_improved.py:ddpm",
        {
            "data.resolution": 16,
            "model.ch": 32,
            "model.ch_mult": (1, 2),
            "model.num_res_blocks": 1,
            "model.attn_resolutions": (8,),
        },
    ),
}


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
    parser.add_argument("--devices", type=int, default=0, help="number of CPU devices (default: 1, as in training)")
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
    workers = {}
    try:
        _benchmark(arguments, workers)
    except WorkerFailed:
        # It has printed why.
        sys.exit("a worker failed; the PyTorch side needs torch (pip install '.[torch]' or --torch-python)")
    finally:
        for worker in workers.values():
            worker.stop()


def _benchmark(arguments, workers):
    gpu = arguments.device == "gpu"
    config_name, fields = NETWORKS[arguments.network]
    fields = {
        **fields,
        "model.dtype": arguments.dtype or ("bfloat16" if gpu else "float32"),
        "train.batch_size": arguments.batch or (128 if gpu else 8),
        "loss.K": arguments.K,
        "loss.lam": float(arguments.K > 1),
    }
    config = published_config(config_name, tiny=False, **fields)
    steps, batch = arguments.steps or (50 if gpu else 5), config.train.batch_size
    settings = worker_settings(config_name, fields, steps, arguments.device)
    settings |= {"devices": arguments.devices, "measures_rate": gpu}

    variants = {"torch": {"channels_last": gpu, "compile": gpu}}
    if arguments.torch == "all":
        variants |= {"torch eager" if gpu else "torch channels_last": {"channels_last": True, "compile": False}}
        if not gpu and shutil.which("g++"):
            variants |= {"torch.compile": {"channels_last": True, "compile": True}}
    if arguments.torch == "none":
        variants = {}
    with tempfile.TemporaryDirectory() as folder, removed_on_signal(Path(folder)):
        workers["s2dm_jax"] = Worker(sys.executable, "train.py", settings, cache_in(folder))
        ours = workers["s2dm_jax"].ready()
        # A second start measures compilation with a warm cache.
        workers["warm"] = Worker(sys.executable, "train.py", settings, cache_in(folder))
        warm = workers["warm"].ready()
        workers.pop("warm").stop()
    print(
        f"{arguments.network}, batch {batch}, K = {arguments.K}, {config.model.dtype}, {ours['devices']} × "
        f"{ours['device']}, {steps} steps a round, {arguments.rounds} rounds"
    )
    print(
        f"trace {ours['trace']:.1f} s, compile {ours['compile']:.1f} s cold, "
        f"{warm['compile']:.1f} s warm, {ours['temp_bytes'] / 2**20:,.0f} MiB of temporaries",
        flush=True,
    )
    for name, variant in variants.items():
        options = torch_settings(config, arguments.device, **variant)
        workers[name] = Worker(arguments.torch_python, "torch_worker.py", options)
        found = workers[name].ready()["parameters"]
        if found != ours["parameters"]:
            sys.exit(f"{name} has {found:,} parameters, s2dm_jax {ours['parameters']:,}")
    _compare(workers, steps, batch, arguments.rounds, ours)


def _compare(workers, steps, batch, rounds, ours):
    runs = {name: lambda worker=worker: worker.run(steps) / steps for name, worker in workers.items()}
    times = interleave(runs, rounds)
    base = times.get("torch", times["s2dm_jax"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        rate = ours["flops"] / middle
        line = f"{name:20s} {middle * 1e3:9.1f} ms  {ratio(seconds, base)['median']:5.3f}×  "
        line += f"{batch / middle:8,.0f} images/s  {rate / 1e12:7.2f} TFLOP/s"
        if ours["matmul_rate"]:
            line += f"  {rate / ours['matmul_rate']:.1%} of the matmul rate"
        print(line, flush=True)
    if ours["matmul_rate"]:
        print(f"matmul rate of this run: {ours['matmul_rate'] / 1e12:,.1f} TFLOP/s")


def worker_settings(config_name: str, fields: dict, steps: int, device: str, tiny: bool = False) -> dict:
    """Settings of this file's worker: `published_config`'s, steps of a chunk, and "cpu" or "gpu"."""
    return {"config": config_name, "fields": fields, "tiny": tiny, "steps": steps, "device": device}


def cache_in(folder: str) -> dict[str, str]:
    """Environment of a process that has its compilation cache in `folder`."""
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}


def work(s: dict) -> None:
    """The worker of s2dm_jax: it runs the same compiled chunk of steps as training."""
    import jax

    # JSON has no tuples.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in s["fields"].items()}
    config = published_config(s["config"], s["tiny"], **fields)
    if s.get("devices"):
        jax.config.update("jax_num_cpu_devices", s["devices"])
    rate = matmul_rate() if s.get("measures_rate") else None
    program = compile_train(config, s["steps"])
    ready = {
        "trace": program.trace_seconds,
        "compile": program.compile_seconds,
        "temp_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
        "flops": program.flops,
        "parameters": program.parameters,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "matmul_rate": rate,
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        seconds = sum(program.run() for _ in range(int(line) // s["steps"]))
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=f"{__doc__}\nRun python scripts/benchmarks/benchmark.py train --help.")
    parser.add_argument("settings", type=json.loads, help="JSON, as written by benchmark_train")
    with end_on_signal("the benchmark that started this has ended"):
        work(parser.parse_args().settings)
