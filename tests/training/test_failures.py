"""A second process on a folder, a process that was killed, losses that are not finite."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.training.failures import check_finite
from s2dm_jax.workdir.folder import open_workdir

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from s2dm_jax.config.defaults import default_config
from s2dm_jax.workdir.folder import open_workdir
with open_workdir(sys.argv[1], default_config()):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_before_jax_is_imported(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "s2dm_jax.main", "--config=configs/digits.py"]
    with open_workdir(str(tmp_path / "run"), default_config()):
        done = subprocess.run(
            [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(said) == 1
    assert f"is in use by process {os.getpid()} on " in said[0]
    assert " jax\n" not in done.stderr


def test_a_killed_process_holds_nothing(tmp_path):
    workdir = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", HOLD, workdir], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=f"is in use by process {process.pid} "),
        open_workdir(workdir, default_config()),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open_workdir(workdir, default_config()) as path:
        assert path == Path(workdir)


def finite(*bad, n=10):
    return ~np.isin(np.arange(n), bad)


def test_stop_names_the_steps_the_checkpoint_and_the_way_on():
    assert check_finite(finite(), 40, "stop", 20, 0) == 0
    with pytest.raises(UserError) as error:
        check_finite(finite(3, 4), 40, "stop", 20, 0)
    sentence = str(error.value)
    assert "not finite from step 43 on, seen in steps 40 to 49" in sentence
    assert "the last good checkpoint is step 20" in sentence
    assert "--config.train.on_nonfinite=skip" in sentence
    with pytest.raises(UserError, match="no checkpoint was saved yet"):
        check_finite(finite(0), 0, "stop", None, 0)


def test_skip_counts_and_gives_up_when_nothing_is_finite(capsys):
    assert check_finite(finite(3), 40, "skip", 20, 0) == 0
    assert "skipped 1 steps" in capsys.readouterr().out
    assert check_finite(finite(8, 9), 40, "skip", 20, 5) == 2
    assert check_finite(finite(*range(10)), 40, "skip", 20, 85) == 95
    with pytest.raises(UserError, match=r"in 105 steps in a row, up to step 49.*last good checkpoint is step 20"):
        check_finite(finite(*range(10)), 40, "skip", 20, 95)
