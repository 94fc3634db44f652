"""The command for a GPU: failures, time boxes, records; and its rehearsal on CPU."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from gpu import check_images
from gpu_stages import supervise
from gpu_stages.parts import Settings, read_settings, result_of, write_settings
from gpu_stages.records import Records
from gpu_stages.supervise import Job, run_job

from s2dm_jax.common.errors import UserError

ROOT = Path(__file__).parents[2]

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


def test_settings_survive_the_way_to_the_worker(tmp_path):
    settings = Settings("cpu", True, tmp_path, tmp_path / "a", tmp_path / "b", None, 12.5)
    assert read_settings(write_settings(settings)) == settings
    settings = settings._replace(images=tmp_path / "images.tar")
    assert read_settings(write_settings(settings)) == settings


def test_records_are_whole_after_every_part_and_keep_those_of_an_earlier_run(tmp_path):
    for run in range(2):
        records = Records(tmp_path, {"right": ["a", "b"]}, {"date": "2026-11-26", "commit": "abc"})
        records.add("right", "machine", {"device": "H100", "devices": 1})
        records.add("right", "b", {"status": "failed", "seconds": 3.0, "log": ["the last line"]})
        text = (tmp_path / "summary.md").read_text()
        assert "b: **failed** after 3 s" in text
        assert "the last line" in text
        result = {"passed": True, "summary": "fine", "run": run}
        records.add("right", "a", {"status": "done", "seconds": 1.0, "summary": "fine", "result": result})
        assert records.failures() == ["right.b"]
    stored = json.loads((tmp_path / "right.json").read_text())
    assert list(stored["parts"]) == ["a", "b"]
    assert stored["machine"] == {"date": "2026-11-26", "commit": "abc", "device": "H100", "devices": 1}
    assert result_of(tmp_path, "right", "a")["run"] == 1
    assert result_of(tmp_path, "right", "b") is None
    assert result_of(tmp_path, "fast", "a") is None
    assert json.loads((tmp_path / "right.1.json").read_text())["parts"]["a"]["result"]["run"] == 0
    assert (tmp_path / "summary.1.md").exists()


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch, capsys):
    records = Records(tmp_path, {"right": ["a", "b"]}, {"date": "2026-11-26"})
    done = {"status": "done", "seconds": 1.0, "summary": "fine", "result": {"summary": "fine", "value": 1.5}}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        records.add("right", "a", done)
        records.append_tables()
    assert '"value": 1.5' in capsys.readouterr().out
    records.add("right", "b", done)
    assert result_of(tmp_path, "right", "a")["value"] == 1.5


def test_what_a_part_left_unfinished_is_in_its_record(tmp_path):
    (tmp_path / "why_flags.json").write_text("of an earlier run")
    records = Records(tmp_path, {"why": ["flags"]}, {})
    (tmp_path / "why_flags.json").write_text('{"option": "compiled"}')
    records.add("why", "flags", {"status": "failed", "seconds": 3.0, "log": []})
    stored = json.loads((tmp_path / "why.json").read_text())
    assert stored["parts"]["flags"]["unfinished"] == {"option": "compiled"}
    # Few files come back from a machine that is lent.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.md", "why.json", "why_flags.1.json"]


def test_tables_that_fail_leave_the_summary(tmp_path):
    records = Records(tmp_path, {"fast": ["cifar10"]}, {})
    records.add("fast", "machine", {"device": "H100"})
    result = {"summary": "fine", "programs": {"s2dm_jax": {}}}
    records.add("fast", "cifar10", {"status": "done", "seconds": 1.0, "summary": "fine", "result": result})
    records.append_tables()
    assert "- cifar10: fine (1 s)" in (tmp_path / "summary.md").read_text()


def test_a_reader_that_leaves_ends_no_run():
    script = "from gpu_stages.records import say\nfor _ in range(3): say('line\\n')\nprint('more')"
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts/benchmarks'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_images_without_classes_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(UserError, match=r"--images=.*text\.txt is no folder"):
        check_images(tmp_path / "text.txt")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(UserError, match=r"has no images"):
        check_images(tmp_path / "empty.tar")
    (tmp_path / "cut.tar.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"--images=.*cut\.tar\.xz"):
        check_images(tmp_path / "cut.tar.xz")
    for name in ("flat/1.jpg", "flat/2.jpg", "classes/train/cat/1.jpg", "classes/train/dog/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 images without folders by class"):
        check_images(tmp_path / "flat")
    check_images(tmp_path / "classes")


def gpu(*arguments, **options):
    command = [sys.executable, "scripts/benchmarks/gpu.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=rihgt"], "--only has 'rihgt'; it must name stages or parts of right"),
        (["--seconds=0"], "--seconds=0 is out of range"),
        (["--images=nowhere.tar"], "--images=nowhere.tar does not exist"),
        (["--resume=nowhere"], "--resume=nowhere is not a folder"),
        (["--device=cpu"], "--device=cpu needs --tiny"),
        (["--out=/dev/null/out"], "--out=/dev/null/out cannot be written (Not a directory)"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(tmp_path, arguments, message):
    done = gpu(f"--out={tmp_path / 'out'}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_ends_its_workers_and_keeps_what_is_done(tmp_path):
    command = [sys.executable, "scripts/benchmarks/gpu.py", "--device=cpu", "--tiny", f"--out={tmp_path}"]
    command.append("--only=right.samplers,right.timesteps")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    for line in process.stdout:
        if line.startswith("== right.samplers"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert result_of(tmp_path, "right", "samplers")["passed"]
    workers = subprocess.run(["pgrep", "-f", f"gpu_stages.worker.*{tmp_path}"], capture_output=True)
    assert not workers.stdout
