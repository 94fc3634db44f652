"""Progress without a terminal: lines now and then, the time left, nothing for what is quick or done."""

import sys

import pytest

from s2dm_jax.common import progress


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
    assert capsys.readouterr().err.splitlines() == [
        "500/1,200 images  00:28 left",
        "800/1,200 images  00:16 left",
    ]


def test_what_is_quick_or_not_to_be_shown_says_nothing(clock, capsys):
    for shown, seconds in ((True, 1), (False, 100)):
        with progress.progress_bar(3, "levels", shown=shown) as advance:
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
    said = capsys.readouterr().err
    assert "0/3 [" in said
    assert said.endswith("\r")
    assert "\n" not in said
    with progress.progress_bar(3, "rows", delay=60) as advance:
        advance(3)
    assert not capsys.readouterr().err.strip()


def test_jobs_tell_which_they_are_and_what_is_left(clock, capsys):
    done = []
    for job in progress.iterate_with_eta("abcd", [0, 3, 1, 2]):
        done.append(job)
        clock[0] += 0 if job == "a" else 60
    assert done == list("abcd")
    # b costs 3 of 6 in a minute: the rest takes another; b and c 4 of 6 in two minutes.
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3",
        "2 of 3, about 01:00 left",
        "3 of 3, about 01:00 left",
    ]
