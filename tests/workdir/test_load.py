"""Reading a run back from its folder, and the estimation-gap command that does."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from helpers import ROOT, load_file, save_run

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import build_network
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import to_json
from s2dm_jax.inference.model import load
from s2dm_jax.weights.read import read_weights
from s2dm_jax.workdir.folder import prepare_workdir
from s2dm_jax.workdir.load import load_run, read_config
from s2dm_jax.workdir.power_ema import write_snapshot
from s2dm_jax.workdir.state import init_state, make_optimizer


@pytest.fixture(scope="module")
def command():
    """The `main` of scripts/estimation_gap.py."""
    return load_file(ROOT / "scripts" / "estimation_gap.py").main


@pytest.fixture(scope="module")
def config():
    config = default_config()
    config.diffusion.update(T=20, beta_start=1e-4, beta_end=0.02)
    config.model.ch, config.model.ch_mult, config.model.num_res_blocks = 32, (1,), 1
    config.model.attn_resolutions = ()
    config.sample.steps, config.eval.nfe = 10, (10,)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    save_run(path, config, seed=5, ema_factor=0.5)
    return path


def test_load_run_restores_what_was_saved(workdir, config):
    run = load_run(str(workdir))
    assert run.config == config
    assert run.network == build_network(config)
    assert run.step == 7
    state = init_state(build_network(config), make_optimizer(config.train.lr, config.train.grad_clip), seed=5)
    jax.tree.map(
        lambda ema, initial: np.testing.assert_array_equal(ema, np.asarray(initial) * 0.5),
        run.ema_params,
        state.params,
    )


def test_a_folder_that_is_no_run_is_refused_in_one_sentence(config, tmp_path):
    def refuses(pattern):
        with pytest.raises(UserError, match=pattern) as error:
            read_config(str(tmp_path / "run"))
        assert "\n" not in str(error.value)

    refuses("run is not a folder")
    (tmp_path / "run").mkdir()
    refuses("run holds no config.json")
    assert not list((tmp_path / "run").iterdir()), "looking at a folder must not write to it"
    file = tmp_path / "run" / "config.json"
    file.write_text("{")
    refuses(r"config\.json is not a config of s2dm_jax")
    file.write_text('{"train": 1}')
    refuses(r"config\.json is not a config of s2dm_jax")
    file.write_text(to_json(config).replace('"T": 20', '"T": 1'))
    refuses(r"config\.json cannot be used: config\.diffusion\.T=1 is out of range")
    file.write_text(to_json(config))
    refuses("run holds no checkpoint")
    (tmp_path / "run" / "checkpoints").mkdir()
    refuses("run holds no checkpoint")


def test_estimation_gap_command_gives_every_run_the_same_noise(command, workdir, config, tmp_path, capsys):
    same, other = tmp_path / "same_weights", tmp_path / "other_weights"
    save_run(same, config, seed=5, ema_factor=0.5)
    save_run(other, config, seed=6, ema_factor=0.5)
    out = tmp_path / "new" / "gap.png"
    command([str(workdir), str(same), str(other), f"--out={out}", "--images=4"])
    assert out.read_bytes().startswith(b"\x89PNG")
    curves = json.loads(out.with_suffix(".json").read_text())["curves"]
    first, second, third = curves
    # The start of 300 is more than T allows.
    assert first["t"] == list(range(19, 0, -1))
    assert (first["rms"], first["rms_of_mean"]) == (second["rms"], second["rms_of_mean"])
    assert first["rms"] != third["rms"]
    assert [curve["workdir"] for curve in curves] == [str(workdir), str(same), str(other)]
    assert first["step"] == 7
    assert all(0 < mean <= rms for mean, rms in zip(first["rms_of_mean"], first["rms"], strict=True))
    assert f"{first['rms'][-1]:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--start=0", "error: --start=0 is out of range: it must be at least 1"),
        ("--start=x", "error: argument --start: invalid int value: 'x' (see --help)"),
        ("--eta=2", "error: --eta=2 is out of range: it must be from 0 (DDIM) to 1 (DDPM)"),
        ("--out=gap.pdf", "error: --out=gap.pdf must end in .png"),
        ("no/such/run", "error: no/such/run is not a folder; give the --workdir of a training run"),
    ],
)
def test_estimation_gap_command_reports_user_errors_in_one_sentence(command, workdir, capsys, flag, sentence):
    with pytest.raises(SystemExit) as stop:
        command([str(workdir), flag])
    assert stop.value.code == 2
    assert capsys.readouterr().err == sentence + "\n"


def test_an_empty_config_is_one_sentence_with_the_way_out(workdir, config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    (run / "config.json").write_text("")
    sentence = (
        r'config.json is not a config of s2dm_jax \(it is empty or cut short\); restore it from the entry "config" of'
    )
    for read in (read_config, lambda path: prepare_workdir(str(path), config)):
        with pytest.raises(UserError, match=sentence):
            read(run)


@pytest.mark.parametrize("way", ["../run", "x/../run", "~/run", "."])
def test_a_run_is_read_by_any_of_its_paths(config, tmp_path, monkeypatch, way):
    save_run(tmp_path / "run", config, seed=0, ema_factor=0.5)
    (tmp_path / "x").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / {"../run": "x", ".": "run"}.get(way, "."))
    assert load(way).step == 7


@pytest.mark.parametrize("name", ["a\\b", "[1]", "a[!b]", "x[0-9]/run"])
def test_a_path_that_checkpoints_would_be_lost_in_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"backslash|brackets"):
        prepare_workdir(str(tmp_path / name), default_config())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b ü p%20 10:30 a=b #'", "a*b?", "a[b", "[]"])
def test_a_path_that_is_not_refused_keeps_checkpoints(config, tmp_path, name):
    path = tmp_path / name
    prepare_workdir(str(path), config)
    path.rmdir()
    save_run(path, config, seed=0, ema_factor=0.5)
    assert load_run(path).step == 7


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, config):
    """A run of 7 steps with further EMAs, and snapshots of steps 3 and 7 whose weights are 3·σ_rel and 7·σ_rel."""
    config = config.copy_and_resolve_references()
    config.train.update(ema_decays=(0.9,), ema_sigma_rel=(0.05, 0.1))
    path = tmp_path_factory.mktemp("averaged") / "run"
    save_run(path, config, seed=5, ema_factor=0.5)
    shapes = traverse_util.flatten_dict(build_network(config).param_shapes(), sep=".")
    for step in (3, 7):
        made = {width: {name: np.full(x.shape, step * width) for name, x in shapes.items()} for width in (0.05, 0.1)}
        write_snapshot(path, step, step, made)
    return path


def test_a_run_is_loaded_with_the_weights_that_ema_names(averaged):
    initial = jax.tree.leaves(load(averaged, ema="weights").ema_params)[0]
    # Of those without an update, the run's own is half of the initial weights (`save_run`).
    for ema, factor in (("", 0.5), ("0.9", 1.0)):
        model = load(averaged, 7, ema=ema)
        np.testing.assert_array_equal(jax.tree.leaves(model.ema_params)[0], factor * initial)
        assert (model.ema, model.step) == (ema, 7)
    for ema, step, value in (("sigma_rel=0.050", None, 0.35), ("sigma_rel=0.1", 3, 0.3)):
        model = load(averaged, step, ema=ema)
        for leaf in jax.tree.leaves(model.ema_params):
            np.testing.assert_allclose(leaf, value, rtol=1e-6)
        assert (model.step, model.ema_note) == (step or 7, "")
    assert model.weights == "EMA sigma_rel=0.1"
    assert read_weights(str(averaged), ema="weights").model_card["weights"]["kind"] == "weights without EMA"
    with pytest.raises(UserError, match=r"no snapshot of its power-function EMAs of step 4; there are: 3, 7$"):
        load(averaged, 4, ema="sigma_rel=0.1")
    with pytest.raises(UserError, match=r"holds no checkpoint of step 3; there are: 7$"):
        load(averaged, 3, ema="0.9")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--mode=sample", "--config.sample.ema=0.5"],
            "config.sample.ema='0.5' is not an EMA of this run, whose",
        ),
        (
            ["--mode=evaluate", "--config.eval.ema=best"],
            "config.eval.ema='best' is not valid; it must be empty, weights",
        ),
        (
            ["--mode=export", "--config.sample.ema=sigma_rel=1"],
            "config.sample.ema='sigma_rel=1' is out of range: sigma",
        ),
        (
            ["--mode=evaluate", "--config.eval.ema=sigma_rel=0.2", "--config.eval.checkpoint_step=5"],
            "{run} holds no checkpoint and no snapshot of its power-function EMAs of step 5; there are: 3, 7",
        ),
        (
            ["--config.train.ema_sigma_rel=0.05"],
            "--workdir={run} belongs to a run with config.train.ema_sigma_rel=(0.05, ",
        ),
        (
            ["--config.train.ema_decays=0.9,0.9"],
            "config.train.ema_decays=0.9,0.9 repeats a number; give each only once",
        ),
        (
            ["--config.train.ema_decays=0.9,x"],
            "config.train.ema_decays='0.9,x' has the wrong type: it must be a tuple of",
        ),
        (
            ["--config.train.ema_decays=1.5"],
            "config.train.ema_decays=(1.5,) has the wrong type: it must be a tuple of num",
        ),
        (
            ["--config.train.ema_snapshot_every=5", "--config.train.ema_sigma_rel="],
            "config.train.ema_snapshot_every=5 is",
        ),
        (
            ["--config.train.ema_rampup_ratio=0.1"],
            "config.train.ema_rampup_ratio=0.1 is for an EMA with a half-life, but config.",
        ),
    ],
)
def test_an_ema_that_is_not_there_is_one_sentence(averaged, command_line, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        command_line(f"--workdir={averaged}", *arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence.format(run=averaged)}")


def test_ema_sweep(averaged, monkeypatch, capsys, tmp_path):
    """The rows and columns of the table; the distance is stubbed by the first weight."""

    def measured(model, data, workdir, out):
        value = float(np.ravel(jax.tree.leaves(model.ema_params)[0])[0])
        suffix = f", {model.weights}" if model.ema else ""
        rows = [{"name": f"ddim{suffix}", "nfe": nfe, "frechet_distance": nfe + value} for nfe in (5, 10)]
        ends = [{"name": name, "nfe": None, "frechet_distance": 1.0} for name in ("real", "noise")]
        return {"rows": [ends[0], *rows, ends[1]], "provenance": {"metric": "M", "distance": "D", "notes": ["few"]}}

    monkeypatch.setattr("s2dm_jax.evaluation.evaluate.evaluate", measured)
    sweep = load_file(ROOT / "scripts" / "sweep_ema.py").main
    sweep([str(averaged), "--sigma-rel=0.1", "--steps=7,3", f"--out={tmp_path}"])
    page = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert cells[0] == ["step", "weights", "relative width", "ddim, NFE 5", "ddim, NFE 10"]
    steps, weights, widths = zip(*(row[:3] for row in cells[2:]), strict=True)
    assert steps == ("7",) * 4 + ("3",)
    assert weights == ("EMA sigma_rel=0.1", "the run's EMA", "EMA 0.9", "weights without EMA", "EMA sigma_rel=0.1")
    assert (widths[0], widths[3]) == ("0.1", "0")
    assert (cells[2][3:], cells[6][3:]) == (["5.70", "10.70"], ["5.30", "10.30"])
    assert "\nnote: few\n" in page
    assert (tmp_path / "evaluations" / "ema_sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "evaluations" / "ema_sweep.json").read_text())["rows"]
    assert [row["ema"] for row in rows[:3]] == ["sigma_rel=0.1", "", "0.9"]
    with pytest.raises(SystemExit):
        sweep([str(averaged), "--steps=5"])
    assert "no snapshot of its power-function EMAs of step 5" in capsys.readouterr().err
