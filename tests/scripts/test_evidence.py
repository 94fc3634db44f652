"""The evidence: its table, which runs are made in which order, pairs and standard errors, resuming, the report."""

import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from findings import figures, numbers, pieces, table, work
from findings.pieces import Request
from helpers import load_file

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule

ROOT = Path(__file__).parents[2]
evidence = load_file(ROOT / "scripts" / "evidence.py")
DIGITS = Request("digits", "", 0, [])


@pytest.fixture(autouse=True)
def _checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Settings that the command makes for the processes it starts.
    monkeypatch.setattr(work, "set_environment", lambda *_: None)
    # A second each.
    monkeypatch.setattr(figures, "draw", lambda *_: False)


@functools.cache
def config_of(training, field=""):
    request = DIGITS._replace(fields=[field] if field else [])
    return main.training_config(["main", *pieces.flags_of(request, training, "", 0), "--workdir=nowhere"])


def status_of(*argv):
    try:
        evidence.main(list(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_finding_compares_what_the_tables_have_and_each_pair_at_equal_cost_where_it_says_so():
    for finding in table.FINDINGS.values():
        for arm in pieces.arms_of(finding):
            training, evaluation = pieces.split_arm(arm)
            assert training in table.TRAININGS
            assert evaluation in table.EVALUATIONS
        # Both of a pair are measured in the same way, but for the scale.
        for a, b in finding.pairs:
            if b:
                first, second = (table.EVALUATIONS[pieces.split_arm(arm)[1]] for arm in (a, b))
                assert (first.nfe, first.kind, first.fields.get("samplers")) == (
                    second.nfe,
                    second.kind,
                    second.fields.get("samplers"),
                )
    for a, b in table.FINDINGS["evaluations"].pairs:
        first, second = table.TRAININGS[a], table.TRAININGS[b]
        assert first.length * first.cost == second.length * second.cost
    for name, training in table.TRAININGS.items():
        assert training.cost == config_of(name).loss.K


def test_trainings_differ_in_what_their_names_say_alone():
    plain, same = config_of("ddpm"), ("train.batch_size", "train.lr", "train.lr_end", "model.dtype", "train.ema_decay")
    flat = {name: pieces_of(config_of(name)) for name in table.TRAININGS}
    for name, training in table.TRAININGS.items():
        changed = {key for key, value in flat[name].items() if value != flat["ddpm"][key]}
        allowed = {"loss.skip", "loss.K", "loss.lam", "train.steps", "train.decay_steps", *training.fields}
        assert changed <= allowed | {"train.sample_every"}, name
        assert flat[name]["train.steps"] == flat[name]["train.decay_steps"] == 1_400 * training.length
        assert [flat[name][key] for key in same] == [flat["ddpm"][key] for key in same]
    assert plain.eval.nfe == (5, 10, 20, 50, 100)
    assert plain.eval.timestep_spacing == "uniform"
    assert [config_of(f"sa_{K}").loss.lam for K in (2, 3, 4)] == [1.0, 0.3, 0.2]
    # The baseline of the released code of S²-DMs has all of its options that do not belong to L_skip.
    released, baseline = objectives.released(skip=10), config_of("ddpm_mean_mirrored").loss
    assert (baseline.reduction, baseline.antithetic) == (released.reduction, released.antithetic) == ("mean", True)


def pieces_of(config):
    return {
        f"{group}.{name}": value
        for group in ("data", "model", "loss", "train")
        for name, value in config[group].items()
    }


def test_a_plan_is_made_seed_by_seed_with_each_training_before_its_evaluations():
    found = pieces.plan(DIGITS)
    seeds, names = [piece.seed for piece in found], [piece.name for piece in found]
    assert seeds == sorted(seeds)
    assert set(seeds) == {0, 1, 2, 3, 4}
    assert len(set(names)) == len(names)
    for index, piece in enumerate(found):
        assert piece.needs is None or piece.needs in names[:index]
    # A finding of three seeds has no more, and what is most valuable is first.
    assert {piece.seed for piece in found if piece.training == "sa_2_x4"} == {0, 1, 2}
    assert names[:4] == ["ddpm_seed0", "s2_2_seed0", "s2_10_seed0", "s2_50_seed0"]
    few = pieces.plan(DIGITS, ["ratio"], seeds=2)
    assert {piece.training for piece in few} == {f"s2_{skip}{end}" for skip in (2, 10, 50) for end in ("", "_released")}
    assert {piece.seed for piece in few} == {0, 1}
    flags = next(piece.flags for piece in found if piece.name == "ddpm_seed2_released_50")
    assert {"--mode=evaluate", "--config.eval.skip_scale=50", "--config.eval.skip_scale_preset=released"} < set(flags)
    assert "--config.eval.timestep_spacing=uniform" in flags
    # The same names with other sizes and images.
    own = Request("cifar10", "", 0, ["--config.data.source=images.tar", "--config.train.lr=1e-3"])
    assert {table.TRAININGS[piece.training].length for piece in pieces.plan(own)} == {1}
    assert {piece.seed for piece in pieces.plan(own)} == {0, 1, 2}
    evaluation = next(piece for piece in pieces.plan(own) if piece.evaluation == "paper_10")
    assert "--config.data.source=images.tar" in evaluation.flags
    assert "--config.train.lr=1e-3" not in evaluation.flags
    assert config_of("s2_10", "--config.train.lr=1e-3").train.lr == 1e-3


def test_differences_are_paired_by_seed_and_ratios_too():
    finding = table.Finding("", "", "", (("s2_10", "ddpm"),))
    distances = {"ddpm": (10.0, 12.0, 17.0), "s2_10": (9.0, 12.0, 14.0, 99.0)}
    found, results = [], {}
    for training, values in distances.items():
        for seed, value in enumerate(values):
            found.append(pieces.Piece(training, "", seed, []))
            rows = [{"name": "real", "nfe": None, "frechet_distance": 3.0}, {"name": "ddim", "nfe": 5}]
            rows.append({"name": "ddim, uniform", "nfe": 10, "frechet_distance": value})
            results[found[-1].name] = {"rows": rows}
    values = numbers.values_of(finding, found, results)
    assert numbers.columns_of(values) == ["10"]
    # -1, 0, -3: mean -4/3, s² = 7/3, standard error √(7/9); the fourth seed has no pair.
    (paired,) = numbers.differences(finding, values).values()
    assert paired["10"].n == 3
    assert paired["10"].mean == pytest.approx(-4 / 3)
    assert paired["10"].error == pytest.approx(math.sqrt(7) / 3)
    (ratio,) = numbers.ratios(finding, values).values()
    assert ratio["10"].mean == pytest.approx(np.mean([10 / 9, 1, 17 / 14]))
    # Seeds that an arm has because of another finding are in no mean of this one.
    fewer = numbers.means(numbers.values_of(finding._replace(seeds=2), found, results))
    assert [fewer[training]["10"].mean for training in ("ddpm", "s2_10")] == [11.0, 10.5]
    along = {"step": [20, 40], "loss_skip": [30.0, 20.0], "loss_simple": [10.0, 4.0]}
    assert numbers.along({"along": along}, "loss_skip/loss_simple") == [3.0, 5.0]
    assert numbers.along({"along": along}, "grad_norm") == []
    # A training that was stopped at step 30 and resumed.
    found = [pieces.Piece("s2_2", "", seed, []) for seed in (0, 1)]
    stopped = {"step": [20, 30, 40], "loss_skip": [40.0, 1.0, 28.0], "loss_simple": [8.0, 1.0, 4.0]}
    results = {"s2_2_seed0": {"along": along}, "s2_2_seed1": {"along": stopped}}
    curve = numbers.curves_of(table.FINDINGS["ratio"], found, results)["s2_2"]
    assert curve == ([20, 40], [4.0, 6.0], {0: [3.0, 5.0], 1: [5.0, 7.0]})


@pytest.fixture
def launched(monkeypatch):
    """Replaces each command by its results: s2_10 is 0.5 better, its scale 0.4; gives the names of what was run."""
    made = []

    def run(argv):
        workdir = Path(next(flag for flag in argv if flag.startswith("--workdir=")).partition("=")[2])
        training, _, seed = workdir.name.rpartition("_seed")
        scale = next((flag.partition("=")[2] for flag in argv if flag.startswith("--config.eval.skip_scale=")), "0")
        made.append(workdir.name + ("" if scale == "0" else f"_{scale}"))
        if os.environ.get("BROKEN") == training:
            raise UserError("the loss of step 3 is not finite; lower config.train.lr")
        workdir.mkdir(parents=True, exist_ok=True)
        distance = 10 + int(seed) - {"0": 0, "10": 0.4}.get(scale, 0.1) - 0.5 * (training == "s2_10")
        rows = [{"name": "real", "nfe": None, "frechet_distance": 3.0}]
        rows += [{"name": "ddim, uniform", "nfe": nfe, "frechet_distance": distance} for nfe in (2, 4)]
        provenance = {"metric": "Fréchet distance", "num_images": 66, "jax": "0", "device": "cpu", "notes": []}
        (workdir / "config.json").touch()
        (workdir / "results.json").write_text(json.dumps({"step": 4, "rows": rows, "provenance": provenance}))
        lines = [{"step": n, "loss_simple": 2.0, "loss_skip": 12.0, "grad_norm": 1.0} for n in (2, 4)]
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(main, "run", run)
    return made


def test_it_makes_what_is_missing_once_records_failures_and_reports_what_is_made(
    launched, tmp_path, monkeypatch, capsys
):
    out, arguments = tmp_path / "out", ["--preset=tiny", "--only=skip", "--seeds=2", "--commit=abc"]
    monkeypatch.setenv("BROKEN", "s2_10")
    assert status_of(f"--out={out}", *arguments) == 1
    assert launched[:5] == ["ddpm_seed0", "s2_2_seed0", "s2_10_seed0", "s2_50_seed0", "ddpm_seed0_2"]
    assert "s2_10_seed0 failed: the loss of step 3 is not finite" in capsys.readouterr().err
    assert launched.count("s2_10_seed0") == 1
    monkeypatch.delenv("BROKEN")
    launched.clear()
    assert status_of(f"--out={out}", "--only=skip", "--seeds=2", "--commit=abc") == 0
    assert launched == ["s2_10_seed0", "s2_10_seed1"]
    launched.clear()
    (out / "report.md").unlink()
    # The numbers alone are enough for a report.
    for path in (out / "runs").iterdir():
        (path / "results.json").unlink()
    assert status_of(f"--out={out}", "--report") == 0
    assert not launched
    text = (out / "report.md").read_text()
    found = json.loads((out / "report.json").read_text())["findings"]
    assert found["skip"]["differences"]["s2_10 less ddpm"]["4"] == {"mean": -0.5, "standard_error": 0.0, "seeds": 2}
    assert found["skip"]["differences"]["s2_10 less ddpm|paper_10"]["2"]["mean"] == pytest.approx(-0.1)
    assert found["ratio"]["means"]["s2_10"]["last tenth"] == {"mean": 6.0, "standard_error": 0.0, "seeds": 2}
    record = json.loads((out / "results" / "ddpm_seed1_paper_10.json").read_text())
    assert (record["commit"], record["device"], record["seed"]) == ("abc", "cpu", 1)
    assert "> We observed that the S²-DMs consistently produces higher quality samples" in text
    assert "-0.50 ± 0.00" in text
    assert "commit abc" in text
    assert f"{linear_schedule().alpha[-50:].prod() ** 0.5:.3f}" in text.partition("√α_skip")[2]
    assert "No run is finished yet." in text
    # A network that another machine has is not evaluated here.
    (out / "results" / "ddpm_seed0_paper_2.json").unlink()
    (out / "runs" / "ddpm_seed0" / "config.json").unlink()
    capsys.readouterr()
    assert status_of(f"--out={out}", "--only=skip", "--seeds=2") == 1
    assert "ddpm_seed0_paper_2 failed: its network is not in" in capsys.readouterr().err
    assert not launched


@pytest.mark.parametrize(("name", "drawn"), [("norms", True), ("gap", True), ("skip", True), ("released", False)])
def test_a_figure_of_each_kind_is_drawn_where_a_pair_is_measured(monkeypatch, tmp_path, name, drawn):
    monkeypatch.undo()
    made, results = [], {}
    for training, evaluation in [("ddpm", ""), ("s2_10", ""), ("ddpm", "gap"), ("sa_2", "gap")]:
        made.append(pieces.Piece(training, evaluation, 0, []))
        rows = [{"name": "ddim", "nfe": nfe, "frechet_distance": 5.0} for nfe in (5, 10)]
        along = {"step": [1, 2], "grad_norm": [3.0, 4.0]}
        gap = {"t": [2, 1], "rms": [0.1, 0.2], "rms_of_mean": [0.1, 0.1]}
        results[made[-1].name] = gap if evaluation else {"rows": rows, "along": along}
    path = tmp_path / "figures" / "one.png"
    assert figures.draw(table.FINDINGS[name], made, results, path) == drawn
    assert path.exists() == drawn


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only=skip,wat"], "--only=wat is not a finding of --preset=digits; choose from skip, released, sequence"),
        (["--processes=0"], "--processes=0 is out of range: it must be at least 1"),
        (["--report"], "--out=OUT holds no evidence; remove --report to create it"),
        (
            ["--preset=cifar10"],
            "--preset=cifar10 needs its images; give their folder or archive as --config.data.source=",
        ),
        (["--config=configs/cifar10.py"], "--preset=cifar10 needs its images; give their folder or archive as"),
        (["--config.loss.tau=0.5"], "--config.loss.tau=0.5 sets a field that the findings compare"),
        (["--config.train.steps=5"], "--config.train.steps=5 sets a field that the findings compare"),
        (["--config.train.lr=-1"], "config.train.lr=-1.0 is out of range"),
        (["--config=nowhere.py"], "--config=nowhere.py"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(launched, tmp_path, capsys, arguments, sentence):
    out = tmp_path / "out"
    assert status_of(f"--out={out}", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}".replace("OUT", str(out)))
    assert error.count("\n") == 1
    assert not launched
    assert not out.exists()


def test_a_folder_of_another_request_is_left_as_it_is(launched, tmp_path, capsys):
    out = tmp_path / "out"
    assert status_of(f"--out={out}", "--preset=tiny", "--only=norms", "--seeds=1") == 0
    assert status_of(f"--out={out}", "--preset=tiny", "--config.train.lr=1") == 2
    assert "holds runs of other flags (--preset=tiny)" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert status_of(f"--out={tmp_path / 'other'}") == 2
    assert "holds files but no evidence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "shares"), [(2, [{0, 2}, {1, 3}]), (8, [{0}, {1}, {2}, {3}, {0}, {1}, {2}, {3}])]
)
def test_processes_share_the_cores(monkeypatch, processes, shares):
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: taken.append(set(cores)), raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(work, "set_compilation_cache", lambda: None)
    for number in range(processes):
        work.set_environment(processes, number)
    assert taken == shares
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    work.set_environment(1)
    assert len(taken) == processes


@pytest.mark.slow
def test_two_processes_train_evaluate_measure_the_gap_and_resume(tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = [f"--out={out}", "--preset=tiny", "--only=gap", "--seeds=1", "--processes=2"]
    assert status_of(*flags) == 0
    results = {path.stem: path.read_text() for path in (out / "results").iterdir()}
    assert {"ddpm_seed0", "sa_2_seed0_gap"} <= set(results)
    assert status_of(*flags) == 0
    assert {path.stem: path.read_text() for path in (out / "results").iterdir()} == results
    found = json.loads((out / "report.json").read_text())["findings"]
    assert found["gap"]["ratios"]["ddpm|gap / sa_2|gap"]["rms"]["seeds"] == 1
