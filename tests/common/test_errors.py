"""A log that nobody reads any more, or that a full disk does not take, ends no command."""

import os
import subprocess
import sys

from helpers import ROOT

WORK = """
import sys
from s2dm_jax.common.errors import report_user_errors
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
