"""`run_once`: commands run until their results are stored, and not again."""

import json
import sys

import pytest
from run_once import parse_nfe, run_once

from s2dm_jax.common.errors import UserError

RESULTS = {"eval": {"nfe": [5, 10]}, "rows": [{"name": "ddim", "frechet_distance": 1.0}]}


def writer(workdir, code=0):
    """A command that leaves results, appends a line to a log, and exits with `code`."""
    text = json.dumps(RESULTS)
    program = (
        f"import sys; from pathlib import Path; w = Path({str(workdir)!r}); w.mkdir(exist_ok=True);"
        f"(w / 'log').open('a').write('ran\\n'); (w / 'results.json').write_text({text!r}); sys.exit({code})"
    )
    return [sys.executable, "-c", program]


def test_commands_run_in_order_and_once(tmp_path):
    path, workdir = tmp_path / "results" / "a.json", tmp_path / "run"
    for _ in range(2):
        assert run_once(path, workdir, [writer(workdir), writer(workdir)], [5, 10]) == RESULTS
    assert (workdir / "log").read_text() == "ran\nran\n"
    # The stored copy is the result, whatever the run is evaluated with later.
    (workdir / "results.json").write_text("{}")
    assert run_once(path, workdir, []) == RESULTS


@pytest.mark.parametrize("damaged", ["", '{"eval": {"nf', "{}"])
def test_stored_results_that_a_power_failure_cut_short_are_made_again(tmp_path, capfd, damaged):
    path, workdir = tmp_path / "a.json", tmp_path / "run"
    path.write_text(damaged)
    assert run_once(path, workdir, [writer(workdir)]) == RESULTS
    assert json.loads(path.read_text()) == RESULTS
    assert f"{path} is empty or damaged; the run is repeated" in capfd.readouterr().err


def test_a_failed_command_stores_nothing(tmp_path):
    path, workdir = tmp_path / "a.json", tmp_path / "run"
    with pytest.raises(UserError, match=r"run could not be trained or evaluated \(the command above reports"):
        run_once(path, workdir, [writer(workdir, code=3), writer(workdir)])
    assert (workdir / "log").read_text() == "ran\n"
    assert not path.exists()


def test_results_of_another_nfe_are_refused(tmp_path):
    path, workdir = tmp_path / "a.json", tmp_path / "run"
    run_once(path, workdir, [writer(workdir)])
    with pytest.raises(UserError, match=r"a\.json was made with --nfe=5,10; give the same --nfe, or another DIR"):
        run_once(path, workdir, [], [5])


def test_results_without_a_distance_are_an_error_and_not_stored(tmp_path):
    path, workdir = tmp_path / "a.json", tmp_path / "run"
    with pytest.raises(UserError, match="run has no results: the command above measured no distance"):
        run_once(path, workdir, [[sys.executable, "-c", ""]])
    workdir.mkdir()
    results = {**RESULTS, "rows": [{"name": "ddim"}], "provenance": {"notes": ["not finite"]}}
    (workdir / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"results\.json has no distance for ddim \(not finite\)"):
        run_once(path, workdir, [])
    assert not path.exists()


@pytest.mark.parametrize("text", ["5,x", "5.5", ",", "", "0", "-3"])
def test_an_nfe_that_is_none(text):
    assert parse_nfe("5, 10") == [5, 10]
    with pytest.raises(UserError, match=f"--nfe={text} is out of range"):
        parse_nfe(text)
