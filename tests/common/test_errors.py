"""What a command reports of files that cannot be written, and of an output that nobody reads."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from s2dm_jax.common.files import atomic_path
from s2dm_jax.common.report import report_user_errors

WORK = """
import sys
from s2dm_jax.common.report import report_user_errors
with report_user_errors():
    for step in range(20_000):
        print("step", step)
    print("finished", file=sys.stderr)
"""


def run(output, **options):
    return subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, stdout=output, text=True, timeout=60, **options)


def test_the_reader_of_a_pipe_may_leave():
    reader, writer = os.pipe()
    os.close(reader)
    done = run(writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "finished\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert run(writer, stderr=writer).returncode == 0
    os.close(writer)


def test_a_log_on_a_full_disk_is_dropped_with_one_line():
    with open("/dev/full", "w") as full:
        done = run(full, stderr=subprocess.PIPE)
    line = "the output cannot be written (No space left on device) and is dropped from here on"
    assert (done.returncode, done.stderr) == (0, f"{line}\nfinished\n")


def test_a_file_that_cannot_be_written_is_named_whatever_the_reason(tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stop, report_user_errors(), atomic_path(folder / "a.json") as temporary:
        temporary.write_text("the folder was removed meanwhile")
    assert stop.value.code == 2
    expected = f"writing failed at {folder / 'a.json'} (No such file or directory); fix that, and run the same "
    assert capsys.readouterr().err == f"error: {expected}command again\n"
    # An input that is missing is no fault of a writer.
    with pytest.raises(FileNotFoundError), report_user_errors(), atomic_path(tmp_path / "a.json"):
        (tmp_path / "input").read_text()
