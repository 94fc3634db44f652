"""Speed measurements, one sub-command each; the variants that a ratio compares are interleaved in one
process.

  digits     time from launch to the first steps and to the last line of the digits' training; memory
  losses     a train step with each objective, relative to plain training
  heads      a train step of a variance head, relative to a plain train step
  attention  a train step with each form of attention, relative to JAX's own
  data       preparing an archive of images; a train step with each placement of the dataset
  train      a train step, relative to plain PyTorch
  samplers   a DDIM scan of 10 NFE, relative to ten jitted forward calls
  evaluate   sampling with Inception features, relative to both alone; the time of FID
  compiled   memory, kernels and predicted time of a training compiled for a GPU or TPU that this machine lacks

examples:
  python scripts/benchmarks/benchmark.py losses --only="K = 2" --rounds=3
  python scripts/benchmarks/benchmark.py train --device=gpu --network=celeba --K=2
  python scripts/benchmarks/benchmark.py data --archive=images.tar
  python scripts/benchmarks/benchmark.py compiled --config=configs/celebahq256.py --target=v5e --remat

Times are medians over the rounds, in s or ms; × is the ratio to the reference variant; memory is in GB (10⁹
bytes) or MiB (2²⁰ bytes). Each sub-command has its own --help.
"""

import argparse
import functools
import itertools
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compiled
import evaluate as evaluation
import train as training
from steps import (
    benchmark_attention,
    benchmark_heads,
    benchmark_losses,
    cifar10_network,
    print_ratios,
)

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.common.signals import end_on_signal, removed_on_signal

ROOT = Path(__file__).resolve().parents[2]


def benchmark_digits(_):
    """Times the digits' default training with an empty compilation cache, then with a warm one."""
    with tempfile.TemporaryDirectory() as folder, removed_on_signal(Path(folder)):
        for name in ("cold", "warm"):
            run = _launch(Path(folder), name)
            print(f"{name} start: first progress line after {run['first_step']:.1f} s, ", end="")
            print(f"last line after {run['total']:.1f} s, peak memory {run['memory_gb']:.2f} GB", flush=True)
        print(run["table"], end="")


def _launch(folder: Path, name: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "s2dm_jax.main",
        "--config=configs/digits.py",
        f"--workdir={folder / name}",
    ]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    first_step = None
    table = []
    for line in process.stdout:
        if line.startswith("|"):
            table.append(line)
        if first_step is None and re.match(r"step [\d,]+/", line):
            first_step = time.monotonic() - began
    if process.wait():
        sys.exit(f"the run failed with status {process.returncode}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    total = time.monotonic() - began
    return {"first_step": first_step, "total": total, "memory_gb": memory, "table": "".join(table)}


def benchmark_data(arguments):
    """Times preparing an archive of images, and a CIFAR-10 train step with each placement of the dataset."""
    # The command that prepares it runs in another folder.
    archive = arguments.archive and user_path(arguments.archive, "--archive").resolve()
    if archive and not archive.exists():
        raise UserError(f"--archive={arguments.archive} does not exist; give an archive of images")
    with tempfile.TemporaryDirectory() as folder, removed_on_signal(Path(folder)):
        if archive:
            _prepare(archive, folder)
        _time_feeds(arguments, Path(folder))


def _prepare(archive: Path, folder: str):
    program = (
        "import resource, sys\n"
        "from s2dm_jax.config.defaults import default_config\n"
        "from s2dm_jax.data.cache import prepare_dataset\n"
        "config = default_config()\n"
        "config.data.update(name='cifar10', source=sys.argv[1])\n"
        "prepare_dataset(config)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(archive)],
        cwd=ROOT,
        env={**os.environ, "S2DM_JAX_DATA": folder},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds = time.monotonic() - began
    memory = float(done.stdout.split()[-1])
    print(f"prepared {archive.name} in {seconds:.1f} s, peak memory {memory:.2f} GB")


def _time_feeds(arguments, folder: Path):
    import jax
    import numpy as np

    from s2dm_jax.config.build import build_network
    from s2dm_jax.config.defaults import default_config
    from s2dm_jax.data.device_feed import make_feed
    from s2dm_jax.devices.sharding import replicate, replicated
    from s2dm_jax.training.step import jit_step, make_train_chunk
    from s2dm_jax.workdir.state import init_state, make_optimizer

    length = 2
    config = default_config()
    config.data.update(name="cifar10", random_flip=True)
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    np.save(folder / "images.npy", images)
    mapped = np.load(folder / "images.npy", mmap_mode="r")
    steps = length * (arguments.rounds + 2)
    network, optimizer = build_network(config), make_optimizer(2e-4, 1.0)
    feeds = {
        name: make_feed(mapped, jax.random.key(0), arguments.batch, steps, share)
        for name, share in (("on the device", 1.0), ("memory-mapped", 0.0))
    }
    for name, feed in feeds.items():
        print(f"{name}: {feed.summary}")
    chunk = jit_step(make_train_chunk(config, network, optimizer), out_shardings=replicated())
    state = [replicate(init_state(network, optimizer, 0))]
    key, constant = replicate(jax.random.key(1)), feeds["memory-mapped"].batches(0, length)
    compiled = {}

    firsts = {name: itertools.count(0, length) for name in feeds}

    def run(name):
        images, batches = None, constant
        if name in feeds:
            images, batches = feeds[name].images, feeds[name].batches(next(firsts[name]), length)
        on_device = images is not None
        if on_device not in compiled:
            compiled[on_device] = chunk.lower(state[0], images, batches, key).compile()
        state[0], metrics = compiled[on_device](state[0], images, batches, key)
        metrics["loss"].block_until_ready()

    runs = {name: functools.partial(run, name) for name in ("constant batch", *feeds)}
    print_ratios(runs, arguments.rounds, "constant batch", {})


def benchmark_samplers(arguments):
    """Times a DDIM scan of 10 NFE with the CIFAR-10 UNet, relative to ten jitted forward calls."""
    import jax
    import numpy as np

    from s2dm_jax.diffusion.schedule import linear_schedule
    from s2dm_jax.samplers.ddim import ddim
    from s2dm_jax.samplers.timesteps import uniform_timesteps

    network = cifar10_network()
    params = jax.device_put(network.init(0))
    x_T = np.random.default_rng(0).standard_normal((arguments.batch, 32, 32, 3), np.float32)
    timesteps = uniform_timesteps(1000, 10)
    forward = jax.jit(lambda params, x, t: network.apply(params, x, t))
    schedule = linear_schedule()
    scan = jax.jit(lambda params, x: ddim(network.eps_fn(params, schedule), x, schedule, timesteps))
    batches_of_t = [np.full(arguments.batch, t, np.float32) for t in timesteps]

    def ten_calls():
        for t in batches_of_t:
            eps = forward(params, x_T, t)
        eps.block_until_ready()

    runs = {"ten forward calls": ten_calls, "DDIM scan": lambda: scan(params, x_T).block_until_ready()}
    print_ratios(runs, arguments.rounds, "ten forward calls", {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    functions = (
        benchmark_digits,
        training.benchmark_train,
        benchmark_losses,
        benchmark_heads,
        benchmark_attention,
        benchmark_data,
        benchmark_samplers,
        evaluation.benchmark_evaluate,
        compiled.benchmark_compiled,
    )
    for function in functions:
        name = function.__name__.removeprefix("benchmark_")
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(run=function)
        if name == "losses":
            sub.add_argument("--only", default="", help='variants in addition to plain, such as "K = 2,K = 4" (all)')
        if name == "train":
            training.add_arguments(sub)
        if name == "compiled":
            compiled.add_arguments(sub)
        if name == "data":
            text = "archive of images to prepare, such as a tar of 60,000 JPEGs (default: none is prepared)"
            sub.add_argument("--archive", type=Path, help=text)
        if name == "evaluate":
            sub.add_argument("--nfe", type=int, default=2, help="network evaluations per image (default: 2)")
        if name not in ("digits", "train", "compiled"):
            sub.add_argument("--batch", type=int, default=8, help="images per step (default: 8)")
            sub.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    arguments = parser.parse_args()
    with end_on_signal("run the same command again"), report_user_errors():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
