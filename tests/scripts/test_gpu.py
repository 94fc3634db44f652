"""The command for a GPU: failures, time boxes, records; and its rehearsal on CPU."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from gpu_stages.parts import Settings, read_settings, result_of, write_settings
from gpu_stages.records import Records
from gpu_stages.supervise import Job, run_job

from s2dm_jax.common.errors import UserError

ROOT = Path(__file__).parents[2]

# Parts that end in every way; the tables of the real stages have the same form.
STAGE = """
import os, subprocess, sys, time
from gpu_stages.parts import Part, Skip

def good(settings):
    return {"summary": "good", "process": os.getpid(), "flags": os.environ.get("NAME")}

def wrong(settings):
    return {"summary": "an error of 1.0", "passed": False}

def skipped(settings):
    raise Skip("there is no PyTorch")

def raises(settings):
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

NAMES = (good, wrong, skipped, raises, killed, hangs)
PARTS = {function.__name__: Part(function, 60) for function in NAMES}
PARTS["hangs"] = Part(hangs, 1)
PARTS["after"] = Part(good, 60)
PARTS["elsewhere"] = Part(good, 60, {"NAME": "value"})
"""


@pytest.fixture
def fake_stage(tmp_path, monkeypatch):
    """A function that runs parts of the made-up stage and returns their records."""
    (tmp_path / "fake_stage.py").write_text(textwrap.dedent(STAGE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    namespace = {}
    exec(STAGE, namespace)

    def run(names, *, seconds=120.0, device="cpu", processes=1):
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        settings = Settings(device, True, tmp_path, scratch, tmp_path, None, time.time() + seconds)
        parts = {name: namespace["PARTS"][name] for name in names}
        records = {}
        job = Job("fake_stage", parts, settings, records.__setitem__, 1.0, threading.Event())
        run_job(job, processes)
        return records

    return run


def test_a_part_that_fails_leaves_its_last_lines_and_the_next_one_starts(fake_stage):
    records = fake_stage(["good", "wrong", "skipped", "raises", "killed", "hangs", "after", "elsewhere"])
    machine = records.pop("machine")
    assert machine["device"] == "cpu"
    assert machine["versions"].keys() >= {"jax", "python"}
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "good": "done",
        "wrong": "wrong",
        "skipped": "skipped",
        "raises": "failed",
        "killed": "failed",
        "hangs": "timed out",
        "after": "done",
        "elsewhere": "done",
    }
    assert records["skipped"]["reason"] == "there is no PyTorch"
    log = records["raises"]["log"]
    assert len(log) == 40
    assert log[-1] == "ValueError: out of memory"
    assert "last words" in records["killed"]["log"]
    # What a part that is too late has started ends with it.
    child = next(line for line in records["hangs"]["log"] if line.startswith("child"))
    assert not Path(f"/proc/{child.split()[1]}").exists() or sys.platform == "darwin"
    assert records["after"]["result"]["process"] != records["good"]["result"]["process"]
    assert records["elsewhere"]["result"]["flags"] == "value"
    assert records["elsewhere"]["result"]["process"] != records["after"]["result"]["process"]


def test_parts_that_run_at_once_have_processes_of_their_own(fake_stage):
    records = fake_stage(["good", "after"], processes=2)
    assert records["good"]["result"]["process"] != records["after"]["result"]["process"]


def test_no_part_starts_after_the_stage(fake_stage):
    records = fake_stage(["good", "after"], seconds=-1)
    assert [record["status"] for record in records.values()] == ["not run", "not run"]


def test_a_missing_device_is_one_sentence(fake_stage, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
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
