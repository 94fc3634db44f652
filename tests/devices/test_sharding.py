"""Several devices give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from s2dm_jax.config.build import build_network
from s2dm_jax.config.io import from_json
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.state import init_state, make_optimizer

# What each process does: train a few steps, then leave the images that evaluation would sample.
PROGRAM = """
import sys
import jax, numpy as np
from helpers import small_config
from s2dm_jax.inference.model import load
from s2dm_jax.training.loop import train
train(small_config(**{"train.lr": 1e-4}), sys.argv[1])
np.save(sys.argv[1] + "/images.npy", load(sys.argv[1]).sample(8, nfe=2, seed=3))
print("devices", jax.device_count())
"""


def run_on(devices, workdir):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(workdir)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"devices {devices}"
    config = from_json((workdir / "config.json").read_text())
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    like = init_state(build_network(config), optimizer, 0)
    return checkpoint.restore_latest(checkpoint.open_checkpoints(workdir), like), np.load(workdir / "images.npy")


def test_eight_devices_train_and_sample_like_one(tmp_path):
    one, images_of_one = run_on(1, tmp_path / "one")
    eight, images_of_eight = run_on(8, tmp_path / "eight")
    # Adam divides by the gradient's size: where that is all but zero, rounding decides the direction, so the
    # weights are compared by how far they moved altogether.
    start = init_state(
        build_network(from_json((tmp_path / "one" / "config.json").read_text())), make_optimizer(1e-4, 1.0), 0
    )

    def distance(a, b):
        squares = jax.tree.map(lambda x, y: float(np.sum(np.square(np.asarray(x) - np.asarray(y)))), a, b)
        return sum(jax.tree.leaves(squares)) ** 0.5

    assert distance(one.ema_params, eight.ema_params) < 0.01 * distance(one.ema_params, start.ema_params)
    difference = images_of_one.astype(int) - images_of_eight
    assert np.abs(difference).max() <= 1


LOOP = """
import runpy, sys
import jax, numpy as np
from s2dm_jax.config.build import build_network
from s2dm_jax.data.batches import batch_indices, run_keys
from s2dm_jax.data.datasets import load_digits
from s2dm_jax.devices import sharding
from s2dm_jax.devices.hardware import compiler_options
from s2dm_jax.training import step
from s2dm_jax.workdir.state import init_state, make_optimizer

assert jax.device_count() == int(sys.argv[2])
assert bool(compiler_options()) == (jax.device_count() == 1)
config = runpy.run_path(sys.argv[1])["get_config"]("sa")
network = build_network(config)
optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
images = sharding.replicate(load_digits().train)
order_key, step_key = run_keys(0)
step_key = sharding.replicate_key(step_key)
chunk = step.jit_step(
    step.make_train_chunk(config, network, optimizer), out_shardings=sharding.replicated()
)

def losses(length):
    state = sharding.replicate(init_state(network, optimizer, 0))
    found = []
    for first in range(0, 20, length):
        rows = batch_indices(order_key, first, length, config.train.batch_size, len(images))
        state, metrics = chunk(state, images, sharding.shard_batch(rows, axis=1), step_key)
        found.append(np.asarray(metrics["loss"]))
    return np.concatenate(found)

np.testing.assert_allclose(losses(20), losses(1), rtol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "environment"),
    [
        (1, {}),
        (2, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}),
        (2, {"JAX_NUM_CPU_DEVICES": "2"}),
    ],
)
def test_steps_in_a_loop_are_those_done_one_by_one(devices, environment):
    """With the compiler options of one device, XLA computes the 10th step wrongly on two."""
    # As users compile: the quick compilation of the other tests does not show it.
    environment = {**os.environ, "XLA_FLAGS": "", **environment}
    digits = Path(__file__).parents[2] / "configs" / "digits.py"
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(digits), str(devices)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
