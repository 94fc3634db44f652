"""How the command line changes a config: values after a space, None, options of another sampler, moved images."""

import json

import numpy as np
import pytest
from helpers import save_run, small_config

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.config.command_line import check_values, reset_fields
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import from_json, load_config, to_json
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.inference.model import load
from s2dm_jax.samplers.specs import sampler_name
from s2dm_jax.training.loop import train
from s2dm_jax.workdir.folder import check_same_images, prepare_workdir

OPTIONAL = [name for name, field in FIELDS.items() if field.default in (None, "", ())]
VALUES = {int: 1, float: 1.5, bool: True, str: "words", tuple: (1, 2)}


@pytest.fixture
def config_of(monkeypatch):
    """Function of arguments: the config that `--mode=sample`, or another mode, would go to work with."""

    def run(*arguments, mode="sample"):
        found = []
        module = {"sample": "inference.sample.sample", "evaluate": "evaluation.evaluate.evaluate_run"}[mode]
        monkeypatch.setattr(f"s2dm_jax.{module}", lambda config, *_, **__: found.append(config))
        main.run(["main", f"--mode={mode}", *arguments])
        return found[0]

    return run


@pytest.mark.parametrize("arguments", [["--workdir", "--mode=train"], ["--config.train.steps", "--workdir=a"]])
def test_a_flag_without_its_value_does_not_take_the_next_flag(arguments):
    with pytest.raises(UserError, match=f"^{arguments[0]} has no value: it is followed by {arguments[1]}"):
        main.run(["main", *arguments])
    check_values(["--workdir", "help", "--config.sample.clip_x0", "--mode", "sample"], ["workdir", "mode"])


@pytest.mark.parametrize("name", OPTIONAL)
def test_each_optional_field_is_set_back_by_none(name):
    field = FIELDS[name]
    value = (field.choices or [VALUES[field.type]])[-1]
    config = small_config(**{name: value})
    group, key = name.split(".")
    kept = ["--config.train.steps=3", "--workdir", "None"]
    for spelling in (
        [f"--config.{name}=None"],
        [f"-config.{name}=none"],
        [f"--config.{name}", "None"],
        [f"--config.{name}="],
    ):
        config[group][key] = value
        assert reset_fields(config, [kept[0], f"--config.{name}={value}", *spelling, *kept[1:]]) == (kept, [name])
        assert config[group][key] == field.default
    last = [f"--config.{name}={value}"]
    assert reset_fields(config, [f"--config.{name}=None", *last]) == (last, [])


def test_what_a_run_brought_can_be_undone(tmp_path, config_of, capsys):
    run = f"--workdir={tmp_path / 'run'}"
    changes = {"sample.sampler": "ddpm", "sample.variance": "small", "sample.skip_scale": 2, "sample.eta": 0.0}
    changes |= {"eval.samplers": "ddim,ddpm", "eval.variance": "small", "eval.eta": 0.5}
    save_run(tmp_path / "run", small_config(**changes), seed=0, ema_factor=1)
    assert config_of(run, "--config.sample.variance=None").sample.variance is None
    assert capsys.readouterr().err == ""
    # Dropped with a note where the run brought it, kept where the sampler has it.
    sample = config_of(run, "--config.sample.sampler=ddim").sample
    assert (sample.variance, sample.skip_scale) == (None, 2)
    assert capsys.readouterr().err == "note: config.sample.variance='small' is not an option of ddim: using None\n"
    group = config_of(run, "--config.eval.samplers=ddpm", mode="evaluate").eval
    assert (group.variance, group.eta) == ("small", 0.0)
    assert capsys.readouterr().err == "note: config.eval.eta=0.5 is not an option of ddpm: using 0.0\n"
    # Refused where the user gives it.
    with pytest.raises(UserError, match=r"config\.sample\.variance='large' is not an option of ddim"):
        config_of(run, "--config.sample.sampler=ddim", "--config.sample.variance=large")


def test_a_config_can_be_the_json_of_a_run(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(to_json(small_config()))
    assert load_config(str(path)) == small_config()
    for text, reason in (
        ("[1]", "it is not an object of field groups"),
        ('{"trian": {"steps": 3}}', "'trian' is not a field"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"config.json is not the config of a run as JSON .{reason}"):
            load_config(str(path))
    with pytest.raises(UserError, match=r"a \.json file has no objectives"):
        load_config(f"{path}:s2")
    path = tmp_path / "none.py"
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"none\.py does not define the function get_config"):
        load_config(str(path))


def test_a_config_file_may_have_colons_in_its_name(tmp_path):
    body = "from s2dm_jax.config import default_config\ndef get_config(name='x'):\n"
    body += "    c = default_config(); c.eval.samplers = name; return c\n"
    (tmp_path / "a:b").mkdir()
    for name in ("a:b.py", "a:b/c.py"):
        (tmp_path / name).write_text(body)
        assert load_config(f"{tmp_path / name}").eval.samplers == "x"
        assert load_config(f"{tmp_path / name}:s2:x").eval.samplers == "s2:x"
    save_run(tmp_path / "run", small_config(), seed=0, ema_factor=1)
    with pytest.raises(UserError, match=r"run is a folder; give its config\.json$"):
        load_config(str(tmp_path / "run"))
    for text, reason in (("", "it is empty"), ("{", "it is not JSON at line 1, column 2")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=f"is not the config of a run as JSON .{reason}"):
            load_config(str(tmp_path / "a.json"))


def test_one_name_of_pndm_in_every_mode(tmp_path, config_of):
    save_run(tmp_path / "run", small_config(), seed=0, ema_factor=1)
    sample = config_of(f"--workdir={tmp_path / 'run'}", "--config.sample.sampler=pndm", "--config.sample.nfe=14").sample
    assert sample.sampler == "f_pndm"
    assert (sampler_name("pndm"), sampler_name("ddim")) == ("f_pndm", "ddim")


def test_a_statistic_of_one_image_is_refused(tmp_path, monkeypatch):
    save_run(tmp_path / "run", small_config(), seed=0, ema_factor=1)
    one = load_dataset(small_config())
    monkeypatch.setattr("s2dm_jax.inference.model.load_dataset", lambda _: one._replace(train=one.train[:1]))
    with pytest.raises(UserError, match=r"statistic over at least 2 training images, and .*run has 1; choose another"):
        load(tmp_path / "run").with_noise_statistics(tmp_path / "run", "analytic", 100, 8)


def test_lists_that_may_be_empty_are_set_to_nothing(tmp_path):
    config = small_config(**{"model.attn_resolutions": (8,)})
    assert reset_fields(config, ["--config.model.attn_resolutions="]) == ([], ["model.attn_resolutions"])
    assert config.model.attn_resolutions == ()
    assert reset_fields(config, ["--config.eval.nfe="])[1] == []


def test_names_of_other_runs_are_those_of_their_field(tmp_path, config_of):
    save_run(tmp_path / "run", small_config(), seed=0, ema_factor=1)
    run = f"--workdir={tmp_path / 'run'}"
    with pytest.raises(
        UserError, match=r"^config\.sample\.compare names nowhere, which cannot be compared: nowhere is"
    ):
        config_of(run, "--config.sample.compare=nowhere")
    # A comma at the end names no folder.
    assert config_of(run, f"--config.sample.compare={tmp_path / 'run'},").sample.compare == str(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be written to \(.*file is not a folder\); give --out=DIR"):
        config_of(run, f"--out={tmp_path / 'file'}")


def test_an_exported_file_is_no_run_to_train(tmp_path):
    (tmp_path / "a.npz").touch()
    with pytest.raises(UserError, match=r"a\.npz is a file, but training needs a folder"):
        main.run(["main", f"--workdir={tmp_path / 'a.npz'}"])


def test_a_finished_run_can_be_told_that_its_images_moved(tmp_path, monkeypatch, config_of, capsys):
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    for name, values in (("old", images), ("new", images), ("other", 255 - images)):
        np.savez(tmp_path / f"{name}.npz", images=values, labels=np.arange(40) % 2)
    old, new, other = (str(tmp_path / f"{name}.npz") for name in ("old", "new", "other"))
    run, config = tmp_path / "run", small_config(**{"data.source": old})
    save_run(run, config, seed=0, ema_factor=1)
    data = load_dataset(config)
    check_same_images(run, data.digest, data.labels_digest)
    results = {"step": config.train.steps, "eval": json.loads(to_json(config))["eval"], "rows": []}
    (run / "results.json").write_text(json.dumps({**results, "provenance": {}}))
    (tmp_path / "old.npz").unlink()
    for mode in ("sample", "evaluate"):
        moved = config_of(f"--workdir={run}", f"--config.data.source={new}", mode=mode)
        assert (moved.data.source, moved.train) == (new, config.train)
    # Trained to its end: nothing is left to do but to record the place.
    train(moved, str(run))
    assert "is finished" in capsys.readouterr().out
    assert from_json((run / "config.json").read_text()).data.source == new
    moved.data.source = other
    with pytest.raises(UserError, match="its images have changed"):
        train(moved, str(run))
    assert from_json((run / "config.json").read_text()).data.source == new
    moved.data.source = ""
    with pytest.raises(UserError, match=r"belongs to a run with config\.data\.source="):
        prepare_workdir(str(run), moved)
