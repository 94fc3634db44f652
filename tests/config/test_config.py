"""The config's fields and the command line: what they set, and errors in one sentence, before anything is
written.
"""

import errno
import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import build_objective, build_schedule
from s2dm_jax.config.datasets import CROPS, RESIZE_FILTERS
from s2dm_jax.config.defaults import FIELDS, SAMPLER_OPTIONS, default_config, fixed_loss_scale
from s2dm_jax.config.io import default_workdir, expand_paths, from_json, load_config, to_json
from s2dm_jax.config.validate import check_config
from s2dm_jax.data.transforms import ImageTransform, crop_box, to_array
from s2dm_jax.diffusion.objectives import PRESETS
from s2dm_jax.diffusion.schedule import SCHEDULES
from s2dm_jax.models.layers import NORM_GROUPS
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


DEFAULT = "from s2dm_jax.config import default_config; c = default_config()"
REQUIRED = "__import__('ml_collections').config_dict.required_placeholder"
BAD_COMMANDS = [
    (["--config.train.stepz=3"], "config.train.stepz is not a field of a config; did you mean config.train.steps"),
    (["--config.train.steps=many"], "config.train.steps='many' has the wrong type: it must be an integer"),
    (["--config.train.steps=1.5"], "config.train.steps='1.5' has the wrong type: it must be an integer"),
    (["--config.loss.use_tau_s=maybe"], "config.loss.use_tau_s='maybe' has the wrong type: it must be True or False"),
    (["--config.train.steps=-5"], "config.train.steps=-5 is out of range: it must be from 1 to 1,000,000,000"),
    (["--config.loss.skip=1000"], "config.loss.skip=1000 must be at most 999"),
    (["--wat=1"], "--wat is not a flag; see --help"),
    (["surplus"], "'surplus' is not a flag"),
    (["--noconfig.model.remat=1"], "--noconfig.model.remat=1 does not take an argument"),
    (["--wrkdir=runs"], "--wrkdir is not a flag; did you mean --workdir?"),
    (["--mode=fly"], "--mode=fly is not valid; choose one of train, sample, evaluate, export"),
    (["--process_id=x"], "--process_id=x is not a non-negative integer"),
    (["--train.steps=3"], "--train.steps is not a flag; did you mean --config.train.steps=VALUE?"),
    (["--noconfig.train.steps"], "--config.train.steps is not a flag; did you mean --config.train.steps=VALUE?"),
    (["--stepps=3"], "--stepps is not a flag; did you mean --config.train.steps?"),
    (["train.steps=3"], "'train.steps=3' is not a flag; did you mean --config.train.steps=3?"),
    (["--config.data.random_flip", "False"], "set a field that is True or False by --config.data.random_flip=False"),
    (["--config.train=3"], "config.train is a group of fields; set one of them, such as --config.train.steps=VALUE"),
    (["--config.model.ch_mult=1,x"], "config.model.ch_mult='1,x' has the wrong type: it must be a tuple of"),
    (["--workdir="], "--workdir is missing"),
    (["--num_processes=2"], "--coordinator_address is missing: --coordinator_address=HOST:PORT, --num_processes=N and"),
    (
        ["--coordinator_address=host", "--num_processes=2", "--process_id=0"],
        "--coordinator_address=host is not HOST:PORT; for example --coordinator_address=node0:1234",
    ),
    (["--coordinator_address=a:99999", "--num_processes=2", "--process_id=0"], "--coordinator_address=a:99999 is not"),
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
        ("configs/digits.py:sq", "--config=configs/digits.py:sq: objective 'sq' is not valid; choose one of ddpm"),
        ("configs/nothing.py", "--config=configs/nothing.py: no such file"),
        ("README.md", "--config=README.md failed with SyntaxError"),
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
        ("loss.K", 0, "config.loss.K=0 is out of range: it must be from 1 to 100,000"),
        ("loss.K", 1001, "config.loss.K=1001 must be at most 1000"),
        ("loss.tau", 1.5, "config.loss.tau=1.5 is out of range: it must be from 0.0 to 1.0"),
        ("loss.lam", float("inf"), "config.loss.lam=inf has the wrong type: it must be a finite number"),
        ("loss.skip_noise", "same", "choose one of shared, independent, expected"),
        ("loss.skip_factors", 1001, "config.loss.skip_factors=1001 must be at most 1000"),
        ("eval.nfe", (1001,), "config.eval.nfe=1001 is not possible: steps=1001 is out of range"),
        ("eval.nfe", (), "has the wrong type: it must be a tuple of positive integers"),
        ("eval.nfe", (10, -1), "has the wrong type: it must be a tuple of positive integers"),
        ("sample.steps", 2000, "config.sample.steps=2000 is out of range: T=1000 allows 1 to 1000"),
        ("model.ch", 48, "config.model.ch=48 must be a multiple of 32"),
        ("model.attn_resolutions", (16,), "names 16, which never occurs; this model's resolutions are 8, 4, 2"),
        ("model.ch_mult", (1, 1, 1, 1, 1), "halves images of 8 pixels 4 times"),
        ("diffusion.schedule", "log", "choose one of linear, cosine, quadratic, const, sigmoid"),
        ("diffusion.T", 20, "config.diffusion.T=20 is too small for the linear schedule: beta_end"),
        (
            "diffusion.beta_end",
            0.002,
            "config.diffusion.beta_end=0.002 with config.diffusion.T=1000 leave alpha_bar_T=0.35 at the last timestep",
        ),
        ("data.name", "mnist", "choose one of digits, cifar10, celeba, celebahq"),
        ("data.resolution", 16, "config.data.resolution=16 and config.data.channels=0 do not match digits, whose"),
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"lr_end": 1e-5},
            "config.train.lr_end=1e-05 is for a learning rate decay, but config.train.lr_schedule='constant'",
        ),
        ({"decay_steps": 4}, "config.train.decay_steps=4 is for a learning rate decay"),
        ({"warmup_steps": 5}, "config.train.warmup_steps=5 must be at most config.train.steps=4"),
        (
            {"lr_schedule": "cosine", "warmup_steps": 3, "decay_steps": 3},
            "config.train.decay_steps=3 must be more than config.train.warmup_steps=3",
        ),
        (
            {"lr_schedule": "linear", "warmup_steps": 4},
            "config.train.decay_steps=0, which stands for config.train.steps=4, must be more than",
        ),
        ({"lr_schedule": "cosine", "lr_end": 0.01}, "config.train.lr_end=0.01 must be at most config.train.lr=0.001"),
        ({"weight_decay": 1e3}, "config.train.weight_decay=1000.0 must be less than 1/config.train.lr=1000"),
        ({"adam_b2": 1.0}, "config.train.adam_b2=1.0 is out of range: it must be from 0.0 to 0.999999"),
        ({"lr_schedule": "step"}, "config.train.lr_schedule='step' is not valid; choose one of constant, cosine, lin"),
        *(
            (
                {"loss_scale": text},
                f"config.train.loss_scale={text!r} is not valid; choose auto, dynamic, none or a num",
            )
            for text in ("static", "", "None", "0", "-2", "nan", "inf", "1e31")
        ),
        (
            {"loss_scale_growth_interval": 100},
            "config.train.loss_scale_growth_interval=100 is for a dynamic loss scale, but "
            "config.train.loss_scale='auto' with config.model.dtype='auto' is not",
        ),
    ],
)
def test_options_of_the_optimizer_that_contradict_one_another(changes, sentence):
    config = small_config()
    config.train.update({"steps": 4, "lr": 1e-3, **changes})
    with pytest.raises(UserError, match=r"^config\.train") as error:
        check_config(config)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("dtype", "text", "scale"),
    [
        ("auto", "auto", 1.0),
        ("float16", "auto", None),
        ("float16", "none", 1.0),
        ("float16", "1e3", 1000.0),
        ("bfloat16", "dynamic", None),
    ],
)
def test_the_loss_scale_is_dynamic_for_float16(dtype, text, scale):
    config = small_config()
    config.model.dtype, config.train.loss_scale = dtype, text
    check_config(config)
    assert fixed_loss_scale(config) == scale


def test_a_config_of_before_0_3_has_the_betas_that_it_was_trained_with():
    """They were 1e-4 and 0.02 at every T."""
    for T, ends in ((100, (1e-4, 0.02)), (1000, (None, None))):
        config = small_config()
        config.diffusion.T, config.eval.nfe = T, (10,)
        stored = json.loads(to_json(config))
        del stored["diffusion"]["beta_start"], stored["diffusion"]["beta_end"]
        old = from_json(json.dumps(stored))
        assert (old.diffusion.beta_start, old.diffusion.beta_end) == ends
        np.testing.assert_array_equal(build_schedule(old).beta, np.linspace(1e-4, 0.02, T))
        check_config(old, trained=True)
        # What was stored since is read as it is.
        assert from_json(to_json(config)).diffusion.beta_end is None
    old.diffusion.update(T=100, beta_start=1e-4, beta_end=0.02)
    with pytest.raises(UserError, match=r"leave alpha_bar_T=0\.36 at the last timestep of the linear schedule"):
        check_config(old)


def trained_config(argv, monkeypatch, tmp_path):
    """The config that the command line would train, in this process."""
    found = []
    monkeypatch.setattr("s2dm_jax.training.loop.train", lambda config, workdir: found.append(config))
    main.run(["main", f"--workdir={tmp_path / 'run'}", *argv])
    return found[0]


def test_flags_are_read_in_any_order_and_spelling(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    argv = ["--config.sample.steps", "7", "--noconfig.model.resamp_with_conv", "--config.train.shard_state"]
    argv += ["--config", "configs/digits.py:s2", "--config.eval.nfe=3", "--config.eval.nfe=4"]
    config = trained_config(argv, monkeypatch, tmp_path)
    expected = load_config("configs/digits.py:s2")
    expected.update({"sample": {"steps": 7}, "eval": {"nfe": (3, 4)}})
    expected.update({"model": {"resamp_with_conv": False}, "train": {"shard_state": True}})
    assert config.to_dict() == expected.to_dict()
    # Nothing of one command line is left for the next.
    again = trained_config(["--config=configs/digits.py:s2"], monkeypatch, tmp_path / "again")
    assert again.to_dict() == load_config("configs/digits.py:s2").to_dict()


@pytest.mark.parametrize(
    ("config", "workdir"),
    [
        ("configs/cifar10.py", "runs/cifar10_s2_10"),
        ("configs/digits.py", "runs/digits_s2_10+sa_2"),
        ("configs/digits.py:s2sa", "runs/digits_s2_10+sa_2"),
        ("configs/digits.py:cosine+sa_2+s2", "runs/digits_s2_10+sa_2+cosine"),
        ("{mine}/mine.py", "runs/mine_ours"),
        ("{mine}/mine.py:a/b [1]", "runs/mine_a-b-1-"),
        ("{mine}/none.py", "runs/none"),
        ("{mine}/config.json", "runs/config"),
    ],
)
def test_the_workdir_is_named_by_config_and_objective(tmp_path, monkeypatch, config, workdir):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.py").write_text("def get_config(kind='ours'): return 1 / 0")
    (tmp_path / "none.py").write_text("def get_config(): return 1 / 0")
    (tmp_path / "config.json").touch()
    assert default_workdir(config.format(mine=tmp_path)) == workdir


def test_a_command_without_workdir_names_it_first_and_resumes_it(monkeypatch, tmp_path, capsys):
    found = []

    def train(config, workdir):
        found.append((config, workdir))
        Path(workdir, "config.json").write_text(to_json(config))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("s2dm_jax.training.loop.train", train)
    for _ in range(2):
        main.run(["main", "--config=configs/digits.py:ddpm"])
        assert capsys.readouterr().out.splitlines()[0] == "workdir: runs/digits_ddpm"
    assert [workdir for _, workdir in found] == ["runs/digits_ddpm"] * 2
    with pytest.raises(UserError, match=r"--workdir=runs/digits_ddpm belongs to .*; give another --workdir or"):
        main.run(["main", "--config=configs/digits.py:ddpm", "--config.train.lr=0.5"])
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^runs/digits_ddpm holds no checkpoint"):
        main.run(["main", "--mode=sample", "--config=configs/digits.py:ddpm"])
    for mode in ("sample", "evaluate", "export"):
        with pytest.raises(UserError, match=rf"^--workdir is missing; for example --mode={mode} --workdir="):
            main.run(["main", f"--mode={mode}"])
    with pytest.raises(UserError, match=r"^--config is missing; for example --config=configs/digits\.py$"):
        main.run(["main"])
    assert capsys.readouterr().out == ""


def test_one_way_to_set_the_sampling_steps_replaces_another(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from s2dm_jax.config import default_config\n\ndef get_config():\n    c = default_config()\n"
        "    c.model.update(ch=32, ch_mult=(1,), attn_resolutions=())\n    c.sample.nfe = 20\n    return c\n"
    )
    argv = [f"--config={tmp_path / 'mine.py'}", "--config.sample.timesteps=0,5"]
    sample = trained_config(argv, monkeypatch, tmp_path).sample
    assert (sample.steps, sample.nfe, sample.timesteps) == (0, 0, (0, 5))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return None", ": get_config returns nothing; it must return a ConfigDict"),
        ("return {'train': 1}", ": get_config returns a dict; it must return a ConfigDict"),
        ("import sys; sys.exit(5)", " calls sys.exit(5), which"),
        ("from s2dm_jax.common.errors import UserError; raise UserError('as written')", "as written"),
        ("return 1 / 0", " failed with ZeroDivisionError: division by zero"),
        ("from ml_collections import ConfigDict; return ConfigDict()", "config.data.channels is missing"),
        (f"{DEFAULT}; c.train.lr = '3'; return c", " failed with TypeError: lr='3' has the wrong type: it must be a f"),
        (f"{DEFAULT}; c.model = None; return c", "config.model=None has the wrong type: it must be a group of fields"),
        (
            f"{DEFAULT}; c.lock(); c.x = 3",
            ' failed with AttributeError: Key "x" does not exist and cannot be',
        ),
        (f"{DEFAULT}; c.train.lr = {REQUIRED}(float); return c", " failed with RequiredValueError: None value found"),
    ],
)
def test_config_files_that_return_no_config(tmp_path, body, sentence):
    path = tmp_path / "mine.py"
    path.write_text(f"def get_config():\n    {body}\n")
    with pytest.raises(UserError) as error:
        main.run(["main", f"--workdir={tmp_path / 'run'}", f"--config={path}", "--config.train.steps=3"])
    start = f"--config={path}" if sentence[0] in ": " else ""
    assert str(error.value).startswith(start + sentence)


def test_unavailable_images_are_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    workdir = f"--workdir={tmp_path / 'run'}"
    for flags, sentence in (
        ([f"--config.data.source={tmp_path / 'pictures'}"], "pictures: no such file or folder"),
        (["--config.data.source=README.md"], "config.data.source=README.md is not a folder of images"),
    ):
        done = command(workdir, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


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


def error_of(name, value):
    """What `check_config` objects to in a config with that field, or ""."""
    config, (group, key) = small_config(), name.split(".")
    with config.ignore_type():
        config[group][key] = value
    try:
        check_config(config)
    except UserError as error:
        return str(error)
    return ""


# What does not change the trained weights, of the groups that otherwise do.
RESUMABLE = {
    "data.source",
    "data.max_invalid_fraction",
    "data.max_device_memory_fraction",
    "model.remat",
    "variance_head.base_workdir",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.max_to_keep",
    "train.keep_period",
    "train.keep_best",
    "train.on_nonfinite",
    "train.shard_state",
    "train.profile_steps",
    "train.wandb",
    "train.wandb_project",
    "train.ema_snapshot_every",
    "train.ema_snapshot_dtype",
}

# Names and paths of the user's own, and lists that are checked entry by entry.
FREE_TEXT = {
    "train.loss_scale",
    "data.source",
    "variance_head.base_workdir",
    "train.keep_best",
    "train.wandb_project",
    "sample.compare",
    "sample.ema",
    "eval.ema",
    "eval.samplers",
    "eval.feature_extractor",
    "eval.metrics",
    "eval.reference",
    "eval.inception_weights",
    "eval.inception_sha256",
    "export.path",
    "export.license",
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_type_and_bounds_or_choices_that_are_checked(name):
    field = FIELDS[name]
    assert f"config.{name}={b'no'} has the wrong type: it must be" in error_of(name, b"no")
    if field.choices:
        outside = max(field.choices) + 1 if field.type is int else f"{field.choices[-1]}s"
        assert f"config.{name}={outside!r} is not valid; choose one of" in error_of(name, outside)
        for choice in field.choices:
            assert f"config.{name}={choice!r} is not valid" not in error_of(name, choice)
    elif field.type in (int, float):
        assert field.low is not None
        for bound, way in ((field.low, -1), (field.high, 1)):
            if bound is not None:
                outside = bound + way if field.type is int else math.nextafter(bound, math.inf * way)
                assert f"config.{name}={outside} is out of range" in error_of(name, outside)
                assert f"config.{name}={bound} is out of range: it must be" not in error_of(name, bound)
    else:
        assert field.type in (bool, tuple) or name in FREE_TEXT


def test_choices_are_those_of_the_code_that_needs_jax():
    assert FIELDS["diffusion.schedule"].choices == tuple(SCHEDULES)
    for preset in ("loss.preset", "sample.skip_scale_preset", "eval.skip_scale_preset"):
        assert FIELDS[preset].choices == tuple(PRESETS)
    allowed = [ch for ch in range(32, 129) if not error_of("model.ch", ch)]
    assert allowed == [ch for ch in range(32, 129) if ch % NORM_GROUPS == 0]
    # Every crop is another part of a CelebA image, every filter makes another image.
    assert len({crop_box(crop, 178, 218) for crop in CROPS}) == len(CROPS)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    resized = {to_array(image, ImageTransform(6, 1, "none", name)).tobytes() for name in RESIZE_FILTERS}
    assert len(resized) == len(RESIZE_FILTERS)


@pytest.mark.parametrize("name", SAMPLER_OPTIONS)
def test_sampler_options_are_the_same_in_sample_and_eval(name):
    config = default_config()
    assert config.sample.get_type(name) is config.eval.get_type(name)
    assert config.sample[name] == config.eval[name]


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


def test_a_decay_that_ends_with_the_training_is_not_stretched_by_more_steps(tmp_path):
    config = small_config()
    config.train.update(lr_schedule="cosine", steps=400)
    (tmp_path / "config.json").write_text(to_json(config))
    config.train.steps = 800
    with pytest.raises(UserError, match=r"decay_steps=400, not 800; give .* or --config\.train\.decay_steps=400$"):
        prepare_workdir(tmp_path, config)
    config.train.decay_steps = 400
    prepare_workdir(tmp_path, config)


@pytest.mark.parametrize("name", FIELDS)
def test_a_run_resumes_with_another_value_of_resumable_fields_alone(tmp_path, name):
    """The sampler, the evaluation and the length of a run may change, the trained weights' fields not."""
    saved, changed = default_config(), default_config()
    # Own images may move, but do not take the place of a dataset's.
    saved.data.source = changed.data.source = "images"
    (tmp_path / "config.json").write_text(to_json(saved))
    field, (group, key) = FIELDS[name], name.split(".")
    other = {int: 7, float: 0.123, bool: not field.default, str: "other", tuple: (7,)}[field.type]
    assert other != field.default
    changed[group][key] = other
    if group in ("sample", "eval", "export") or name in RESUMABLE:
        prepare_workdir(tmp_path, changed)
    else:
        with pytest.raises(UserError, match=rf"belongs to a run with config\.{name}="):
            prepare_workdir(tmp_path, changed)


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
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "checkpoints").touch()
    with pytest.raises(UserError, match=r"third/checkpoints is not a folder; fix that, or give another path"):
        prepare_workdir(tmp_path / "third", small_config())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other", "third"]


def test_a_full_disk_is_reported_in_one_sentence_and_other_failures_are_not(monkeypatch, capsys):
    def fails_with(error):
        def run(_):
            raise error

        monkeypatch.setattr(main, "run", run)
        main.main()

    with pytest.raises(SystemExit) as stop:
        fails_with(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: writing failed at runs/a/metrics.jsonl (No space left on device); what was ")
    assert message.count("\n") == 1
    with pytest.raises(SystemExit):
        fails_with(PermissionError(errno.EACCES, "Permission denied", "runs/a/metrics.jsonl"))
    assert "error: runs/a/metrics.jsonl cannot be read or written (Permission denied)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fails_with(NotADirectoryError(errno.ENOTDIR, "Not a directory", "runs/a/evaluations/points"))
    assert "error: runs/a/evaluations/points cannot be used (Not a directory)" in capsys.readouterr().err
    with pytest.raises(PermissionError):
        fails_with(PermissionError(errno.EACCES, "Permission denied"))


def test_every_field_that_is_a_path_is_read_as_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = [name for name, field in FIELDS.items() if field.path]
    # A field whose text speaks of a file, folder or workdir is a path.
    words = re.compile(r"\b(file|folder|workdirs?|FILE)\b")
    others = {"sample.output", "train.profile_steps"}
    assert {name for name, field in FIELDS.items() if words.search(field.doc)} - others <= set(fields)
    config = default_config()
    for name in fields:
        group, key = name.split(".")
        config[group][key] = "~/a"
    config.sample.compare = "~/a,b, ~/c"
    expand_paths(config)
    for name in fields:
        group, key = name.split(".")
        assert config[group][key].split(",")[0] == f"{tmp_path}/a", name
    assert config.sample.compare == f"{tmp_path}/a,b,{tmp_path}/c"


def test_urls_are_refused_where_only_a_path_can_be(monkeypatch):
    config = default_config()
    config.eval.inception_weights = "https://example.org/weights.pth"
    expand_paths(config)
    assert config.eval.inception_weights == "https://example.org/weights.pth"
    config.data.source = "gs://bucket/images.zip"
    with pytest.raises(UserError, match=r"config.data.source=gs://bucket/images.zip is a URL"):
        expand_paths(config)
