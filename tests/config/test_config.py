"""A mistake in the command line is told in one sentence, with status 2, and writes nothing."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.config import defaults as c
from s2dm_jax.config import validate
from s2dm_jax.config.build import build_objective
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import from_json, to_json
from s2dm_jax.config.validate import check_config
from s2dm_jax.data import cache
from s2dm_jax.workdir.folder import prepare_workdir

ROOT = Path(__file__).parents[2]


def command(*arguments, config="configs/digits.py"):
    """Runs the command line from the project's folder."""
    return subprocess.run(
        [sys.executable, "-m", "s2dm_jax.main", f"--config={config}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def cpu_seconds_of_children():
    """Of the processes that have ended; unlike wall time, no other tenant of the machine adds to it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


BAD_COMMANDS = [
    (
        ["--config.train.stepz=3"],
        "config.train.stepz is not a field of a config; did you mean config.train.steps",
    ),
    (["--config.train.steps=many"], "config.train.steps='many' has the wrong type: it must be an integer"),
    (["--config.train.steps=1.5"], "config.train.steps='1.5' has the wrong type: it must be an integer"),
    (
        ["--config.loss.use_tau_s=maybe"],
        "config.loss.use_tau_s='maybe' has the wrong type: it must be True or False",
    ),
    (["--config.train.steps=-5"], "config.train.steps=-5 is out of range: it must be at least 1"),
    (["--config.loss.skip=1000"], "config.loss.skip=1000 must be at most 999"),
    (["--wat=1"], "Unknown command line flag 'wat'"),
    (["surplus"], "'surplus' is not a flag"),
    (["--mode=fly"], "should be one of <train|sample|evaluate|export>"),
    (["--workdir="], "--workdir is missing"),
    (
        ["--num_processes=2"],
        "--coordinator_address is missing: --coordinator_address=HOST:PORT, --num_processes=N and",
    ),
    (
        ["--coordinator_address=host", "--num_processes=2", "--process_id=0"],
        "--coordinator_address=host is not HOST:PORT; for example --coordinator_address=node0:1234",
    ),
    (
        ["--coordinator_address=host:1", "--num_processes=2", "--process_id=2"],
        "--process_id=2 is out of range: with --num_processes=2 it must be from 0 to 1",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD_COMMANDS)
def test_bad_command_lines(tmp_path, arguments, sentence):
    began = cpu_seconds_of_children()
    done = command(f"--workdir={tmp_path / 'run'}", *arguments)
    assert cpu_seconds_of_children() - began < 5
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("configs/digits.py:sq", "method 'sq' is not known; choose one of ddpm, s2, sa, s2sa"),
        ("configs/nothing.py", "--config=configs/nothing.py: there is no such file"),
        ("README.md", "the config file failed with"),
        ("", "--config is missing"),
    ],
)
def test_bad_config_files(tmp_path, config, sentence):
    done = command(f"--workdir={tmp_path / 'run'}", config=config)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("loss.K", 0, "config.loss.K=0 is out of range: it must be at least 1"),
        ("loss.K", 1001, "config.loss.K=1001 must be at most 1000"),
        ("loss.tau", 1.5, "config.loss.tau=1.5 is out of range: it must be from 0.0 to 1.0"),
        ("loss.lam", float("inf"), "config.loss.lam=inf has the wrong type: it must be a finite number"),
        ("loss.skip_noise", "same", "choose one of shared, independent, expected"),
        ("loss.skip_factors", 1001, "config.loss.skip_factors=1001 must be at most 1000"),
        ("eval.nfe", (10, 1001), "config.eval.nfe=1001 is not possible: steps=1001 is out of range"),
        ("eval.nfe", (), "has the wrong type: it must be a tuple of positive integers"),
        ("eval.nfe", (10, -1), "has the wrong type: it must be a tuple of positive integers"),
        ("sample.steps", 2000, "config.sample.steps=2000 is out of range: T=1000 allows 1 to 1000"),
        ("model.ch", 48, "config.model.ch=48 must be a multiple of 32"),
        (
            "model.attn_resolutions",
            (16,),
            "names 16, which never occurs; this model's resolutions are 8, 4, 2",
        ),
        ("model.ch_mult", (1, 1, 1, 1, 1), "halves images of 8 pixels 4 times"),
        ("diffusion.schedule", "log", "choose one of linear, cosine, quadratic, const, sigmoid"),
        ("data.name", "mnist", "choose one of digits, cifar10, celeba, celebahq"),
        (
            "data.resolution",
            16,
            "config.data.resolution=16 and config.data.channels=0 do not go with the digits",
        ),
        ("data.channels", 2, "choose one of 0, 1, 3"),
        ("data.crop", "ddim", "is for celeba and for config.data.source, not for digits: it must be auto"),
        ("data.resize", "nearest", "choose one of bilinear, bicubic, lanczos, box"),
        ("data.max_invalid_fraction", 1.5, "must be from 0.0 to 1.0"),
    ],
)
def test_bad_fields(field, value, sentence):
    config = small_config()
    group, name = field.split(".")
    config[group][name] = value
    with pytest.raises(UserError, match=r"^config") as error:
        check_config(config)
    assert sentence in str(error.value)
    assert field in str(error.value)


def test_images_that_cannot_be_had_are_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    workdir = f"--workdir={tmp_path / 'run'}"
    for flags, sentence in (
        ([f"--config.data.source={tmp_path / 'pictures'}"], "pictures: there is no such file or folder"),
        (["--config.data.source=README.md"], "config.data.source=README.md is no folder of images"),
    ):
        done = command(workdir, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_tensorflow_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path))
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    config = small_config()
    config.data.name = "cifar10"
    with pytest.raises(UserError, match=r"-m pip install 'tensorflow-cpu>=2\.21' \(the extra prepare\)"):
        cache.check_preparable(config)


def small_config():
    config = default_config()
    config.model.update(ch=32, ch_mult=(1, 1, 1), attn_resolutions=(4,))
    return config


def test_every_field_is_checked_for_presence():
    config = small_config()
    check_config(config)
    config.train.new = 1
    with pytest.raises(UserError, match=r"config\.train\.new is not a field"):
        check_config(config)
    config = small_config()
    del config.loss.tau
    with pytest.raises(UserError, match=r"config\.loss\.tau is missing"):
        check_config(config)


def test_ranges_and_choices_name_real_fields():
    assert validate._RANGES.keys() | validate._CHOICES.keys() <= c.FIELDS.keys()


def test_json_round_trip():
    config = small_config()
    config.loss.update(skip=10, use_tau_s=True, window="backward")
    assert from_json(to_json(config)).to_dict() == config.to_dict()


def test_options_left_open_come_from_the_preset():
    config = small_config()
    config.loss.update(preset="released", skip=10)
    objective = build_objective(config)
    assert (objective.skip_factors, objective.skip_noise, objective.reduction) == (9, "independent", "mean")
    config.loss.skip_noise = "expected"
    assert build_objective(config).skip_noise == "expected"


def test_a_workdir_of_another_run_is_refused_and_left_alone(tmp_path):
    config = small_config()
    (tmp_path / "config.json").write_text(to_json(config))
    assert prepare_workdir(tmp_path, config) == tmp_path
    config.train.steps += 1
    config.eval.nfe = (5,)
    prepare_workdir(tmp_path, config)
    config.loss.skip = 10
    with pytest.raises(UserError, match=r"belongs to a run with config\.loss\.skip=0, not 10"):
        prepare_workdir(tmp_path, config)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_workdirs_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is not a folder"):
        prepare_workdir(tmp_path / "file" / "run", small_config())
    with pytest.raises(UserError, match="holds files but no run of s2dm_jax"):
        prepare_workdir(tmp_path, small_config())
    with pytest.raises(UserError, match=r"cannot be (used|created)"):
        prepare_workdir("/proc/s2dm_run", small_config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"half": ')
    with pytest.raises(UserError, match=r"config\.json is not a config of s2dm_jax"):
        prepare_workdir(tmp_path / "other", small_config())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_a_full_disk_is_told_in_one_sentence_and_other_failures_are_not(monkeypatch, capsys):
    def fails_with(error):
        def run(_):
            raise error

        monkeypatch.setattr(main, "run", run)
        main.main()

    with pytest.raises(SystemExit) as stop:
        fails_with(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: writing failed at runs/a/metrics.jsonl (No space left on device); the check"
    )
    assert said.count("\n") == 1
    with pytest.raises(PermissionError):
        fails_with(PermissionError(errno.EACCES, "Permission denied"))
