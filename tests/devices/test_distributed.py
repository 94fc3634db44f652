"""Two processes are one run: they train, stop and resume together, and one process resumes what two saved."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from s2dm_jax.common.errors import LostProcess, UserError
from s2dm_jax.config.build import build_network
from s2dm_jax.config.io import from_json
from s2dm_jax.devices import distributed
from s2dm_jax.devices.distributed import initialize_distributed
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.state import init_state, make_optimizer

ROOT = Path(__file__).parents[2]
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from helpers import small_config
def get_config(_=""):
    return small_config(**{{"train.lr": 1e-4, "train.checkpoint_every": 4}})
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(workdir, processes, *flags, each=((), ())):
    """The processes of one run, started together; each its own output, and its own flags after those of all."""
    config = workdir.parent / "config.py"
    config.write_text(CONFIG.format(tests=str(Path(__file__).parents[1])))
    port = free_port()
    command = [sys.executable, "-m", "s2dm_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    started = []
    for i in range(processes):
        hosts = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
        started.append(
            subprocess.Popen(
                [*command, *(hosts if processes > 1 else []), *each[i]],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(processes):
    outputs = [process.communicate(timeout=500) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def state_in(workdir):
    config = from_json((workdir / "config.json").read_text())
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    like = init_state(build_network(config), optimizer, 0)
    return checkpoint.restore_latest(checkpoint.open_checkpoints(workdir), like), like


def distance(a, b):
    squares = jax.tree.map(lambda x, y: float(np.sum(np.square(np.asarray(x) - np.asarray(y)))), a, b)
    return sum(jax.tree.leaves(squares)) ** 0.5


@pytest.mark.slow
def test_two_processes_train_and_resume_like_one_and_one_takes_over(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    lead, other = finish(launch(two, 2, "--config.train.steps=4"))
    assert "2 × cpu on 2 hosts" in lead
    assert all(line.startswith("[Gloo]") for line in other.splitlines()), "only the first process prints"
    lead, _ = finish(launch(two, 2, "--config.train.steps=8", "--config.train.shard_state=True"))
    assert "from step 4 of 8" in lead
    (alone,) = finish(launch(two, 1, "--config.train.steps=12"))
    assert "from step 8 of 12" in alone
    finish(launch(one, 1, "--config.train.steps=12"))
    (of_two, start), (of_one, _) = state_in(two), state_in(one)
    assert int(of_two.step) == 12
    assert distance(of_two.ema_params, of_one.ema_params) < 0.01 * distance(of_one.ema_params, start.ema_params)


def failed(processes):
    """The errors of processes that all end with status 2 within a minute and a half."""
    outputs = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [2] * len(processes), outputs
    return [errors for _, errors in outputs]


@pytest.mark.slow
def test_processes_with_different_configs_end_with_a_sentence(tmp_path):
    lead, other = launch(tmp_path / "run", 2, each=(["--config.train.seed=1"], ["--config.train.seed=2"]))
    for errors in failed([lead, other]):
        assert "error: the processes of this run have different configs" in errors


@pytest.mark.slow
def test_hosts_with_disks_of_their_own_end_with_a_sentence(tmp_path):
    folders = [[f"--workdir={tmp_path / name}"] for name in ("a", "b")]
    for errors in failed(launch(tmp_path / "run", 2, each=folders)):
        assert "is not one folder for all processes of this run" in errors


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_one_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    lead, other = launch(workdir, 2, "--config.train.steps=100000", "--config.train.log_every=1")
    for line in lead.stdout:
        if line.startswith("step "):
            other.send_signal(signal.SIGTERM)
            break
    lines = lead.communicate(timeout=300)[0].splitlines()
    other.communicate(timeout=300)
    assert lead.returncode == other.returncode == 128 + signal.SIGTERM
    stopped = re.match(r"stopped at step ([\d,]+) of 100,000, saved in", lines[-1])
    assert stopped, lines
    assert int(state_in(workdir)[0].step) == int(stopped[1].replace(",", "")) > 0


def test_processes_agree_on_the_smallest_number_of_the_call_before(monkeypatch):
    alone = distributed.make_agreement()
    assert [alone(5), alone(0)] == [5, 0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    agree = distributed.make_agreement()
    assert [agree(5), agree(3), agree(0), agree(4)] == [1, 5, 3, 0]


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launchers_are_recognised(monkeypatch, environment, joins):
    if "SLURM_NTASKS" in environment:
        others = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
        environment = {**dict.fromkeys(others, "0"), **environment}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    initialize_distributed()
    assert len(joined) == joins


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_a_launcher_with_another_number_is_named(monkeypatch, name):
    for slurm in distributed._SLURM:
        monkeypatch.setenv(slurm, "1")
    monkeypatch.setenv(name, "2(x2)")
    with pytest.raises(UserError, match=rf"{name}=2\(x2\) is not a number of processes"):
        initialize_distributed()


def test_a_process_that_is_lost_ends_the_others_with_a_sentence(monkeypatch):
    def lose(message):
        with distributed.noticing_lost_processes():
            raise jax.errors.JaxRuntimeError(message)

    lost, other = (
        "UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1",
        "RESOURCE_EXHAUSTED",
    )
    with pytest.raises(jax.errors.JaxRuntimeError):
        lose(lost)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcess, match=r"another process of this run has ended, .* Connection closed by peer"):
        lose(lost)
    with pytest.raises(jax.errors.JaxRuntimeError):
        lose(other)


def test_a_tpu_on_its_own_stays_alone_but_a_cluster_that_fails_is_an_error(monkeypatch):
    def no_cluster(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    monkeypatch.setattr(distributed, "_on_tpu_vm", lambda: True)
    initialize_distributed()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    with pytest.raises(UserError, match=r"did not find each other \(coordinator_address should be defined"):
        initialize_distributed()


def test_processes_given_one_address_form_one_cluster():
    program = (
        "import sys, jax; from s2dm_jax.devices.distributed import initialize_distributed; "
        "initialize_distributed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])); "
        "print(jax.process_index(), jax.process_count(), jax.device_count())"
    )
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", program, address, "2", str(i)], **options) for i in range(2)]
    assert [output.splitlines()[-1] for output in finish(started)] == ["0 2 2", "1 2 2"]
