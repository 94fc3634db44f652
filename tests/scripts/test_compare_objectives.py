"""The comparison of objectives: what is trained for how long, which results are stored, the table's
statistics.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers import load_file

PATH = Path(__file__).parents[2] / "scripts" / "compare_objectives.py"
compare_objectives = load_file(PATH)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Replaces training by a file with the distance 10·seed + steps/100 + scale; gives the commands."""
    commands = []

    def run(command, **_):
        flags = dict(flag.lstrip("-").split("=", 1) for flag in command if "=" in flag)
        commands.append((flags["config"].split(":")[1], flags))
        number = {name: int(flags[f"config.{name}"]) for name in ("train.seed", "train.steps")}
        scale = int(flags["config.eval.skip_scale"])
        distance = 10 * number["train.seed"] + number["train.steps"] / 100 + scale
        rows = [{"nfe": None, "frechet_distance": 3.0}, {"nfe": 5, "frechet_distance": distance}]
        rows.append({"nfe": None, "frechet_distance": 300.0})
        workdir = Path(flags["workdir"])
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "results.json").write_text(json.dumps({"eval": {"nfe": [5]}, "rows": rows}))
        return 0

    monkeypatch.setattr("run_once.run_command", run)
    monkeypatch.chdir(PATH.parents[1])
    return commands


def test_every_objective_at_equal_steps_and_equal_evaluations(launched, tmp_path, capsys):
    argv = [str(tmp_path), "--seeds=3", "--steps=100", "--nfe=5"]
    compare_objectives.main(argv)
    trained = [(name, int(f["config.train.steps"]), int(f["config.eval.skip_scale"])) for name, f in launched]
    one_seed = [
        ("ddpm", 100, 0),
        ("ddpm", 100, 10),
        ("ddpm", 200, 0),
        ("ddpm", 200, 10),
        ("s2_10", 100, 0),
        ("s2_10", 200, 0),
        ("sa_2", 100, 0),
        ("s2_10+sa_2", 100, 0),
    ]
    assert trained == 3 * one_seed
    table = capsys.readouterr().out
    # Seeds 0, 1, 2 give 1, 11, 21: mean 11, standard deviation 10; twice the steps or the scale add 1 or 10.
    assert re.search(r"\| sa_2 +\| 100 +\| 200 +\| 11\.00 ± 10\.00 \|", table)
    assert re.search(r"\| ddpm +\| 200 +\| 200 +\| 12\.00 ± 10\.00 \|", table)
    assert re.search(r"\| ddpm, ε scaled \(skip 10\) \| 100 +\| 100 +\| 21\.00 ± 10\.00 \|", table)
    assert re.search(r"\| s2_10, 100 steps less ddpm, ε scaled \(skip 10\), 100 steps +\| -10\.00 ± 0\.00 \|", table)
    assert re.search(r"\| sa_2, 100 steps less ddpm, 200 steps +\| -1\.00 ± 0\.00 +\|", table)

    compare_objectives.main(argv)
    assert len(launched) == 24
    assert table.startswith("1 of 24\n")
    # What was done is neither repeated nor printed again,
    assert capsys.readouterr().out.strip() == table[table.index("\n|") :].strip()
    # also where it has the short names of earlier versions.
    for full, short in (("s2_10+sa_2", "s2sa"), ("s2_10", "s2"), ("sa_2", "sa")):
        (tmp_path / full).rename(tmp_path / short)
        for path in (tmp_path / "results").glob(f"{full}_seed*"):
            path.rename(path.with_name(path.name.replace(full, short)))
    compare_objectives.main(argv)
    assert len(launched) == 24
    assert capsys.readouterr().out.strip() == table[table.index("\n|") :].strip()
    (tmp_path / "results" / "sa_seed2_step100_scale0.json").unlink()
    compare_objectives.main(argv)
    assert launched[24:] == [("sa_2", {**launched[22][1], "workdir": str(tmp_path / "sa" / "seed2")})]


def test_a_run_that_fails_leaves_gaps_and_its_reason(launched, tmp_path, capsys, monkeypatch):
    run = sys.modules["run_once"].run_command

    def failing(command, log=None, **options):
        if "--config.train.seed=1" in command and "--config=configs/digits.py:sa_2" in command:
            log.write_text("step 7\nerror: the loss is not finite at step 8; lower config.train.lr\n")
            return 2
        return run(command, **options)

    monkeypatch.setattr("run_once.run_command", failing)
    with pytest.raises(SystemExit) as stop:
        compare_objectives.main([str(tmp_path), "--seeds=2", "--steps=100", "--nfe=5"])
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert "sa_2_seed1_step100_scale0 failed: the loss is not finite at step 8; lower config.train.lr" in output.err
    assert re.search(r"\| sa_2 +\| 100 +\| 200 +\| – +\|", output.out)
    assert re.search(r"\| s2_10\+sa_2 +\| 100 +\| 200 +\| 6\.00 ± 7\.07 +\|", output.out)


@pytest.mark.parametrize("flag", ["--seeds=1", "--steps=0", "--config=nowhere.py"])
def test_bad_input_is_one_sentence(launched, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        compare_objectives.main([str(tmp_path), flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {flag}")
    assert error.count("\n") == 1
    assert not launched


def test_results_of_another_nfe_are_refused(launched, tmp_path, capsys):
    compare_objectives.main([str(tmp_path), "--seeds=2", "--steps=100", "--nfe=5"])
    with pytest.raises(SystemExit):
        compare_objectives.main([str(tmp_path), "--seeds=2", "--steps=100", "--nfe=5,10"])
    assert "was made with --nfe=5; give the same --nfe, or another DIR" in capsys.readouterr().err
