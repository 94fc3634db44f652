"""A checkout on PYTHONPATH works without an installation, and without the packages that only some commands need."""

import os
import subprocess
import sys
from pathlib import Path

from s2dm_jax.common.version import __version__

ROOT = Path(__file__).resolve().parents[1]

# Stands for an environment without them: no installed metadata of this package, no such imports.
BARE = """
import importlib.metadata, sys

for name in ("tensorflow", "tensorflow_datasets", "array_record", "importlib_resources", "matplotlib"):
    sys.modules[name] = None
found = importlib.metadata.distribution

def distribution(name):
    if name.replace("-", "_") == "s2dm_jax":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.distribution = distribution

from s2dm_jax import main
from s2dm_jax.config import default_config
from s2dm_jax.evaluation import evaluate
from s2dm_jax.inference import sample
from s2dm_jax.training import loop
from s2dm_jax.weights import export
from s2dm_jax.workdir.metadata import run_metadata

print(run_metadata(default_config())["versions"]["s2dm_jax"])
"""


def test_a_checkout_needs_no_installation(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BARE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == __version__
