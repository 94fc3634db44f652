"""The comparison of reverse variances: what is trained and evaluated, which results are stored, the table."""

import json
import re
from pathlib import Path

import pytest
from helpers import load_file

PATH = Path(__file__).parents[2] / "scripts" / "compare_covariance.py"
compare_covariance = load_file(PATH)


@pytest.fixture
def launched(monkeypatch):
    """Replaces each command by a file of the distances 10·seed + the method's number; gives the commands."""
    commands, seeds = [], {}

    def run(command, **_):
        flags = dict(flag.lstrip("-").split("=", 1) for flag in command if "=" in flag)
        commands.append(flags)
        workdir = Path(flags["workdir"])
        seeds.setdefault(workdir, int(flags.get("config.train.seed", 0)))
        methods = flags.get("config.eval.samplers") or flags["config"].split(":")[1]
        rows = [{"name": "real (floor)", "nfe": None, "frechet_distance": 3.0}]
        for method in methods.split(","):
            distance = 10 * seeds[workdir] + {"ddpm": 1, "analytic": 2, "npr": 3, "sn": 4}.get(method, 0)
            rows.append({"name": f"{method}, timestep_spacing linspace", "nfe": 5, "frechet_distance": distance})
        workdir.mkdir(parents=True, exist_ok=True)
        nfe = [int(each) for each in flags["config.eval.nfe"].split(",")]
        (workdir / "results.json").write_text(json.dumps({"eval": {"nfe": nfe}, "rows": rows}))
        return 0

    monkeypatch.setattr("run_once.run_command", run)
    monkeypatch.chdir(PATH.parents[1])
    return commands


def test_every_variance_on_every_base(launched, tmp_path, capsys):
    argv = [str(tmp_path), "--seeds=2", "--steps=100", "--head-steps=7", "--nfe=5"]
    compare_covariance.main(argv)
    table = capsys.readouterr().out
    for objective in ("ddpm", "sa_2"):
        for name, mean in (("plain", 6), ("A", 7), ("NPR", 8), ("SN", 9)):
            assert re.search(rf"\| {objective} +\| {name} +\| {mean}\.00 ± 7\.07 \|", table)
    trained = {(f["config"].split(":")[1], int(f["config.train.steps"])) for f in launched if "config" in f}
    assert trained == {("ddpm", 200), ("sa_2", 100), ("npr", 7), ("sn", 7)}
    bases = {f["config.variance_head.base_workdir"] for f in launched if "config.variance_head.base_workdir" in f}
    assert bases == {f"{tmp_path}/{name}/seed{seed}" for name in ("ddpm", "sa_2") for seed in (0, 1)}

    count = len(launched)
    compare_covariance.main(argv)
    assert len(launched) == count == 2 * 2 * 4
    assert table.startswith("1 of 12\n")
    assert capsys.readouterr().out.strip() == table[table.index("\n|") :].strip()


def test_results_of_another_nfe_are_refused(launched, tmp_path, capsys):
    argv = [str(tmp_path), "--seeds=2", "--steps=100", "--head-steps=7"]
    compare_covariance.main([*argv, "--nfe=5"])
    with pytest.raises(SystemExit):
        compare_covariance.main([*argv, "--nfe=5,10"])
    assert "was made with --nfe=5; give the same --nfe, or another DIR" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--seeds=1", "--steps=0", "--head-steps=0", "--images=1", "--config=nowhere.py"])
def test_bad_input_is_one_sentence(launched, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        compare_covariance.main([str(tmp_path), flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {flag}")
    assert error.count("\n") == 1
    assert not launched
