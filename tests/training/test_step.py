"""Training runs: what they leave behind, exact resume, a finished run, a loss that is not finite."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import SMALL, ToyNetwork, final_state, small_config

from s2dm_jax.common.errors import UserError
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.models.unet import UNet
from s2dm_jax.training import loop
from s2dm_jax.training.averages import Averages
from s2dm_jax.training.loop import train
from s2dm_jax.training.step import StepConfig, apply_gradient
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.state import TrainState, init_state, make_optimizer

ROOT = Path(__file__).parents[2]
# The smallest network and evaluation: what is tested here is the loop.


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps without a break, and its config."""
    workdir, config = tmp_path_factory.mktemp("straight") / "run", small_config()
    train(config, workdir)
    return workdir, config


def test_a_run_leaves_its_files(straight):
    workdir, _ = straight
    names = {p.name for p in workdir.iterdir() if p.name != ".lock"}
    expected = {"config.json", "parameters.txt", "metrics.jsonl", "tensorboard", "samples", "checkpoints"}
    assert names == expected | {"results.json", "results.md", "evaluations"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"loss", "loss_simple", "loss_skip", "loss_sequence", "grad_norm", "images_per_second"} < lines[0].keys()
    assert [p.name for p in (workdir / "samples").iterdir()] == ["step_0000004.png"]
    results = json.loads((workdir / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["real (floor)", "ddim, quadratic", "noise (ceiling)"]
    assert results["step"] == 4
    assert "not FID" in results["provenance"]["metric"]


def test_resume_is_exact_at_any_chunk_size(straight, tmp_path):
    workdir, config = straight
    expected = final_state(workdir, config)
    half = small_config(**{"train.steps": 3, "train.log_every": 1})
    train(half, tmp_path / "run")
    train(small_config(**{"train.log_every": 1}), tmp_path / "run")
    actual = final_state(tmp_path / "run", config)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_a_finished_run_says_so_and_does_nothing(straight, capsys, monkeypatch):
    workdir, config = straight
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"}
    monkeypatch.setattr(loop, "set_up", None)
    train(config, workdir)
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    config = small_config(**{"train.lr": 1e30, "train.grad_clip": 0.0})
    with pytest.raises(UserError, match=r"not finite from step [1-3] on.*config\.train\.lr"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_first_signal_saves_and_says_how_to_go_on(tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--config.{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SMALL.items()]
    flags = [f for f in flags if "attn_resolutions" not in f]
    arguments = ["--config=configs/digits.py", f"--workdir={workdir}", *flags]
    arguments += ["--config.model.ch_mult=1,1", "--config.train.steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "s2dm_jax.main", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    last = re.match(r"stopped at step ([\d,]+) of 100,000, saved in .*; run the same command to resume", output[-1])
    assert last, output
    assert process.returncode == 128 + signal.SIGTERM
    saved = checkpoint.open_checkpoints(workdir).latest_step()
    assert saved == int(last[1].replace(",", "")) > 0


def test_ema_starts_at_the_initial_weights_or_at_those_after_the_first_step():
    for start, expected in (("initial", [0.1, 0.19]), ("first_step", [1.0, 1.0])):
        optimizer, params = optax.adam(0.0), {"w": np.float32(1)}
        made_of = StepConfig(ToyNetwork(), linear_schedule(), objectives.paper(), optimizer, Averages(0.9, start))
        # Step 7 is the first update after 7 that were skipped.
        state = TrainState(np.int32(7), params, {"w": np.float32(0)}, optimizer.init(params))
        for average in expected:
            state = apply_gradient(made_of, state, {"w": np.float32(0)})
            np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-6)


def test_initial_optimizer_state_is_optaxs():
    network = UNet(8, 1, 1, 32, (1,), 1, ())
    optimizer = make_optimizer(1e-3, 1.0)
    state = init_state(network, optimizer, seed=0)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, optimizer.init(state.params))
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
