"""What a signal does to a command: one sentence, no temporary files, status 128 + signal; or it waits for a save."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from s2dm_jax.common.cli import run_command
from s2dm_jax.common.signals import end_on_signal

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# Hashing holds the main thread without running a bytecode of it, as a compilation does.
BUSY = """
import hashlib, sys
from pathlib import Path
from s2dm_jax.common.files import atomic_path
from s2dm_jax.common.signals import end_on_signal
with end_on_signal("run it again"), atomic_path(Path(sys.argv[1]) / "file") as file, \\
     atomic_path(Path(sys.argv[1]) / "folder") as folder:
    file.write_text("half")
    folder.mkdir()
    (folder / "a").write_text("half")
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"a", b"b", 100_000_000)
"""
LOOP = """
import time
from s2dm_jax.common.signals import deferred, end_on_signal
with end_on_signal("the training is saved"):
    with deferred(lambda: "stopping") as received:
        print("busy", flush=True)
        while not received:
            time.sleep(0.01)
        time.sleep({more})
        print("saved", received, flush=True)
    time.sleep({after})
"""

# `python -m s2dm_jax.main` while it prepares images.
PREPARING = """
import sys, time
from s2dm_jax import main
main.prepare_dataset = lambda *_: (print("busy", flush=True), time.sleep(60))
sys.argv = ["main", "--config=configs/digits.py", f"--workdir={sys.argv[1]}/run"]
main.main()
"""
# The evaluation at the end of a training.
EVALUATING = """
import os, sys, time, types
from s2dm_jax.common.signals import end_on_signal
from s2dm_jax.config import default_config
from s2dm_jax.training import loop
def evaluate(*_):
    print("busy", flush=True)
    time.sleep(60)
loop.evaluate, loop._log = evaluate, lambda text: None
run = types.SimpleNamespace(config=default_config(), workdir=None, setup=types.SimpleNamespace(data=None))
run._model = lambda ema: None
with end_on_signal("no step was trained"):
    loop.TrainingLoop.evaluate(run)
"""


def start(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "busy\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_busy_process_at_once_and_leaves_no_temporary_file(tmp_path, number):
    process = start(BUSY, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {number.name}; run it again\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["s2dm_jax", "s2dm_jax.main"])
def test_ctrl_c_while_the_modules_are_imported_is_no_traceback(tmp_path, module):
    (tmp_path / "absl.py").write_text('import time\nprint("busy", flush=True)\ntime.sleep(60)')
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + signal.SIGINT, "")


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (PREPARING, "run the same command again"),
        (EVALUATING, "the training is saved; run the same command to evaluate it"),
    ],
)
def test_what_is_left_to_do_is_said(tmp_path, code, advice):
    process = start(code, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, f"stopped by SIGTERM; {advice}\n")


def test_the_first_signal_waits_for_what_is_saved_even_if_it_comes_twice():
    process = start(LOOP.format(more=0.5, after=0))
    # As `timeout` does: to the process and to its group.
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("saved [15]\n", "stopping\n")
    assert process.returncode == 0


def test_a_second_signal_and_one_after_the_save_end_at_once():
    process = start(LOOP.format(more=60, after=0))
    process.send_signal(signal.SIGINT)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    stopped = "stopped by SIGINT; the training is saved\n"
    assert process.communicate(timeout=30) == ("", f"stopping\n{stopped}")
    assert process.returncode == 128 + signal.SIGINT
    process = start(LOOP.format(more=0, after=60))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saved [2]\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", f"stopping\n{stopped}")
    assert process.returncode == 128 + signal.SIGINT


def test_nohup_is_respected_and_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with end_on_signal("never"):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_command_that_runs_another_waits_until_that_has_saved(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    child = "import os, signal, sys, time\nsignal.signal(15, lambda *_: (print('saved'), sys.exit(143)))\n"
    child += "os.kill(os.getppid(), 15)\ntime.sleep(60)"
    with end_on_signal("never"), pytest.raises(SystemExit) as stop:
        run_command([sys.executable, "-c", child])
    assert stop.value.code == 128 + signal.SIGTERM
    errors = capfd.readouterr().err.splitlines()
    assert sorted(errors) == ["saved", "waiting for the command above to finish; interrupt again to stop at once"]
