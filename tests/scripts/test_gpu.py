"""The command for a GPU: options, images, records, interruptions."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from gpu import check_images, read_paths
from gpu_stages.comparison import bounded, largest_error, norm_error
from gpu_stages.parts import Settings, read_settings, result_of, write_settings
from gpu_stages.records import Records

from s2dm_jax.common.errors import UserError

ROOT = Path(__file__).parents[2]


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
    with pytest.raises(UserError, match=r"--images=.*text\.txt is not a folder"):
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


def test_paths_are_read_as_those_of_the_other_commands(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = argparse.Namespace(out=Path("~/out"), images=None, resume=Path("a/../b"))
    read_paths(arguments)
    assert (arguments.out, arguments.images, arguments.resume) == (tmp_path / "out", None, Path.cwd() / "b")
    with pytest.raises(UserError, match="--out=gs:/bucket is a URL"):
        read_paths(argparse.Namespace(out=Path("gs://bucket"), images=None, resume=None))


def test_a_check_beyond_its_bound_is_wrong():
    errors, bounds = (
        {"a": {"loss": 1e-6, "grad": 2e-4}, "b": {"loss": 2e-6, "grad": 1e-5}},
        {"loss": 1e-5, "grad": 1e-3},
    )
    right = bounded("title", errors, bounds)
    assert right["passed"]
    assert right["summary"] == "title: relative errors loss 2.0e-06 (bound 1e-05), grad 2.0e-04 (bound 1e-03)"
    for wrong in (1e-2, float("nan")):
        assert not bounded("title", {**errors, "c": {"loss": 0.0, "grad": wrong}}, bounds)["passed"]
    assert largest_error([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert norm_error(np.array([3.0, 0.0]), np.array([0.0, 4.0])) == 1.25
