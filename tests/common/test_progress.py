"""A bar on a terminal; elsewhere lines now and then with the time left, none for quick or finished work."""

import sys

import pytest

from s2dm_jax.common import progress
from s2dm_jax.training.telemetry import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until its entry is raised."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_with_the_time_left(clock, capsys):
    with progress.progress_bar(1200, "images", done=200) as advance:
        for _ in range(6):
            clock[0] += 4
            advance(100)
        clock[0] += 60
        advance(400)
    # After 12 s 300 of the 1,000 are done: 700 more take 28 s; after 24 s 600, and 400 more take 16 s.
    assert capsys.readouterr().err.splitlines() == ["500/1,200 images  00:28 left", "800/1,200 images  00:16 left"]


def test_quick_or_hidden_work_prints_nothing(clock, capsys):
    for shown, seconds in ((True, 1), (False, 100)):
        with progress.progress_bar(3, "timesteps", shown=shown) as advance:
            for _ in range(3):
                clock[0] += seconds
                advance(1)
    assert capsys.readouterr() == ("", "")


def test_without_a_total_there_is_no_time_left(clock, capsys):
    with progress.progress_bar(None, "MiB") as advance:
        clock[0] += 30
        advance(5)
    assert capsys.readouterr().err == "5 MiB\n"


def test_on_a_terminal_a_bar_that_goes_away(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress_bar(3, "rows") as advance:
        advance(3)
    printed = capsys.readouterr().err
    assert "0/3 [" in printed
    assert printed.endswith("\r")
    assert "\n" not in printed
    with progress.progress_bar(3, "rows", delay=60) as advance:
        advance(3)
    assert not capsys.readouterr().err.strip()


@pytest.mark.parametrize("terminal", [False, True])
def test_bar_or_lines_is_decided_by_the_stream_that_is_written(monkeypatch, capsys, terminal):
    # The other stream is a terminal just when this one is none.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: not terminal)
    display = progress.ProgressDisplay(sys.stdout, 4, bar_format="at {n_fmt}{postfix}")
    display.update(2, "step 2/4", postfix="loss 1", due=True)
    display.close()
    printed = capsys.readouterr()
    assert printed.err == ""
    if terminal:
        assert "at 2, loss 1" in printed.out.replace("\r", "\n")
    else:
        assert printed.out == "step 2/4  00:00 left\n"


def test_a_run_prints_its_first_and_its_last_steps(clock, capsys):
    run = Progress(100, 400, images_per_step=8, flops_per_step=1e9, peak=1e12)
    for step in (200, 300, 400):
        clock[0] += 5
        metrics = run.update(step, 0.25)
    run.close()
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "step 200/400  loss 0.25  160 images/s, 2% of peak  00:10 left",
        "step 400/400  loss 0.25  160 images/s, 2% of peak  00:00 left",
    ]
    assert printed.err == ""
    assert metrics["eta_seconds"] == 0
    assert metrics["seconds_per_step"] == pytest.approx(0.05)


def test_jobs_print_their_number_and_the_time_left(clock, capsys):
    done = []
    for job in progress.iterate_with_eta("abcd", [0, 3, 1, 2]):
        done.append(job)
        clock[0] += 0 if job == "a" else 60
    assert done == list("abcd")
    # b costs 3 of 6 in a minute: the rest takes another; b and c 4 of 6 in two minutes.
    assert capsys.readouterr().out.splitlines() == ["1 of 3", "2 of 3, about 01:00 left", "3 of 3, about 01:00 left"]
