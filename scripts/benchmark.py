"""Speed measurements, each one a command; ratios are measured side by side in one run.

python scripts/benchmark.py digits    # seconds from launch to first step and to the last line, memory
python scripts/benchmark.py losses    # a training step with each objective against the plain one
python scripts/benchmark.py samplers  # a 10-evaluation DDIM scan against ten jitted forward calls
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def benchmark_digits(_):
    """Runs the digits default from an empty compilation cache, then starts it again with the cache warm."""
    with tempfile.TemporaryDirectory() as folder:
        cold = _launch(Path(folder), "cold", [])
        print(f"cold start: first line of progress after {cold['first_step']:.1f} s, ", end="")
        print(f"last line after {cold['total']:.1f} s, {cold['memory_gb']:.2f} GB at most", flush=True)
        warm = _launch(Path(folder), "warm", ["--config.train.steps=40"])
        print(f"warm start: first line of progress after {warm['first_step']:.1f} s")


def _launch(folder: Path, name: str, flags: list[str]) -> dict[str, float]:
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
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    first_step = None
    for line in process.stdout:
        if first_step is None and re.match(r"step [\d,]+/", line):
            first_step = time.monotonic() - began
    if process.wait():
        sys.exit(f"the run failed with status {process.returncode}")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"first_step": first_step, "total": time.monotonic() - began, "memory_gb": memory}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, function in {"digits": benchmark_digits}.items():
        sub = commands.add_parser(name, help=function.__doc__)
        sub.set_defaults(run=function)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
