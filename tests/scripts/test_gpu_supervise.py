"""How `gpu.py` runs the parts of a stage: failures, time boxes, devices that are not found."""

import subprocess
import textwrap
import threading
import time

import pytest
from gpu_stages import supervise
from gpu_stages.parts import Settings
from gpu_stages.supervise import Job, run_job

from s2dm_jax.common.errors import UserError

# Parts that end in every way; the tables of the real stages have the same form.
STAGE = """
import atexit, os, signal, subprocess, sys, time
import numpy as np
from gpu_stages.parts import Part, Skip
from s2dm_jax.common.errors import UserError

def good(settings):
    return {"summary": "good", "process": os.getpid(), "flags": os.environ.get("NAME")}

def wrong(settings):
    return {"summary": "an error of 1.0", "passed": False}

def skipped(settings):
    raise Skip("there is no PyTorch")

def refused(settings):
    raise UserError("no such image")

def raises(settings):
    # At an orderly end the process would print more.
    atexit.register(print, "after the traceback")
    for line in range(100):
        print("line", line)
    raise ValueError("out of memory")

def killed(settings):
    print("last words")
    os.kill(os.getpid(), 9)

def hangs(settings):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid)
    time.sleep(600)

def odd(settings):
    values = {"array": np.arange(2), "scalar": np.float32(0.5), "nan": np.nan, "path": settings.out}
    return {"summary": "odd", "passed": np.bool_(True), **values}

def talks(settings):
    os.write(1, 100 * bytes(range(256)))
    print(2**20 * "a long line ")
    return {"summary": "talks"}

def empty(settings):
    return {"no": "summary"}

def forks(settings):
    if not os.fork():
        # The child has the pipes, and a group of its own.
        os.setsid()
        time.sleep(20)
        os._exit(0)
    os._exit(3)

def deaf(settings):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("half a line", end="", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

NAMES = (good, wrong, skipped, refused, raises, killed, hangs, odd, talks, empty, forks, deaf)
PARTS = {function.__name__: Part(function, 60) for function in NAMES}
PARTS["hangs"] = Part(hangs, 1)
PARTS["deaf"] = Part(deaf, 1)
PARTS["after"] = Part(good, 60)
PARTS["elsewhere"] = Part(good, 60, {"NAME": "value"})
"""
# In the place of JAX, which takes a second to start; it finds the device from the process STARTS on.
JAX = """
import os, sys, types

__version__ = "1.2"
FOLDER = os.path.dirname(__file__)

def default_backend():
    started = os.path.join(FOLDER, "started")
    with open(started, "a") as file:
        file.write(".")
    if os.path.getsize(started) < int(os.environ.get("STARTS", "1")):
        if os.environ["FAULT"] == "raises":
            raise AssertionError
        print("Unknown flag in XLA_FLAGS")
        os._exit(1)
    return "cpu"

def devices():
    return [types.SimpleNamespace(device_kind="cpu")]

def device_count():
    return 1
"""


@pytest.fixture
def fake_stage(tmp_path, monkeypatch):
    """A function that runs parts of the made-up stage and returns their records."""
    (tmp_path / "fake_stage.py").write_text(textwrap.dedent(STAGE))
    (tmp_path / "jax.py").write_text(JAX)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(supervise, "_EXIT_SECONDS", 1.0)
    namespace = {}
    exec(STAGE, namespace)

    def run(names, *, seconds=120.0, device="cpu", processes=1, report=None):
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        settings = Settings(device, True, tmp_path, scratch, tmp_path, None, time.time() + seconds)
        parts = {name: namespace["PARTS"][name] for name in names}
        records = {}
        report = report or records.__setitem__
        job = Job("fake_stage", parts, settings, report, 1.0, threading.Event(), threading.Event())
        run_job(job, processes)
        return records

    return run


def is_running(process):
    """Whether a process does something; one that has ended may wait for a parent to collect it."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_part_that_fails_leaves_its_last_lines_and_the_next_one_starts(fake_stage):
    records = fake_stage(["good", "wrong", "skipped", "refused", "raises", "killed", "hangs", "after", "elsewhere"])
    machine = records.pop("machine")
    assert machine["device"] == "cpu"
    assert machine["versions"].keys() >= {"jax", "python"}
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good": "done",
        "wrong": "wrong",
        "skipped": "skipped",
        "refused": "failed",
        "raises": "failed",
        "killed": "failed",
        "hangs": "timed out",
        "after": "done",
        "elsewhere": "done",
    }
    assert records["skipped"]["reason"] == "there is no PyTorch"
    assert records["refused"]["log"] == ["no such image"]
    log = records["raises"]["log"]
    assert len(log) == 40
    assert log[-1] == "ValueError: out of memory"
    assert "last words" in records["killed"]["log"]
    # What a part that is too late has started ends with it.
    child = next(line for line in records["hangs"]["log"] if line.startswith("child"))
    assert not is_running(child.split()[1])
    assert records["after"]["result"]["process"] != records["good"]["result"]["process"]
    assert records["elsewhere"]["result"]["flags"] == "value"
    assert records["elsewhere"]["result"]["process"] != records["after"]["result"]["process"]


def test_parts_that_run_at_once_have_processes_of_their_own(fake_stage):
    records = fake_stage(["good", "after"], processes=2)
    assert records["good"]["result"]["process"] != records["after"]["result"]["process"]


def test_no_part_starts_after_the_stage(fake_stage):
    records = fake_stage(["good", "after"], seconds=-1)
    assert [record["status"] for record in records.values()] == ["not run", "not run"]


def test_a_part_that_misbehaves_costs_no_other(fake_stage, capsys):
    records = fake_stage(["odd", "talks", "empty", "forks", "deaf", "after"])
    assert {name: record.get("status") for name, record in records.items() if name != "machine"} == {
        "odd": "done",
        "talks": "done",
        "empty": "failed",
        "forks": "failed",
        "deaf": "timed out",
        "after": "done",
    }
    odd = records["odd"]["result"]
    assert odd["array"] == [0, 1]
    assert odd["scalar"] == 0.5
    assert odd["nan"] != odd["nan"]
    assert "no dict with a summary" in records["empty"]["log"][-1]
    # One that has ended is not waited for, though a child keeps its pipe open.
    assert records["forks"]["seconds"] < 15
    assert records["deaf"]["log"][-1] == "half a line"
    # Some MB of output would be too much for the log of a run.
    assert len(capsys.readouterr().out) < 500_000


def test_a_fault_of_the_supervision_costs_one_part(fake_stage):
    records = {}

    def report(name, record):
        if record.get("result"):
            raise RuntimeError("a fault")
        records[name] = record

    fake_stage(["good", "skipped", "after"], report=report)
    statuses = {name: record["status"] for name, record in records.items() if name != "machine"}
    assert statuses == {"good": "failed", "skipped": "skipped", "after": "failed"}
    assert records["good"]["log"][-1] == "RuntimeError: a fault"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", r"--device=cpu: JAX 1\.2 finds no device \(AssertionError: \)"),
        ("ends", r"--device=cpu: the process that looks for it ends with: Unknown flag in XLA_FLAGS"),
    ],
)
def test_a_device_that_no_process_finds_is_one_sentence(fake_stage, tmp_path, monkeypatch, fault, message):
    monkeypatch.setenv("STARTS", "99")
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(UserError, match=message):
        fake_stage(["good", "after", "elsewhere"], processes=2)
    # Twice each of the two that run at once.
    assert (tmp_path / "started").stat().st_size == 4


def test_a_process_that_does_not_find_the_device_once_is_started_again(fake_stage, monkeypatch):
    monkeypatch.setenv("STARTS", "2")
    monkeypatch.setenv("FAULT", "raises")
    records = fake_stage(["good", "after"])
    assert [records[name]["status"] for name in ("good", "after")] == ["done", "done"]


def test_another_device_is_one_sentence(fake_stage):
    with pytest.raises(UserError, match=r"--device=gpu: JAX .* finds only cpu devices"):
        fake_stage(["good"], device="gpu")
