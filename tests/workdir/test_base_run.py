"""The run of a variance head: it trains the head alone, on a network that stays the same, and is sampled from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small_config

import s2dm_jax
from s2dm_jax.common.errors import UserError
from s2dm_jax.config.presets import set_head
from s2dm_jax.models import variance_head
from s2dm_jax.training.loop import train
from s2dm_jax.workdir.load import inherit_base_config, load_run

ROOT = Path(__file__).parents[2]


def head_config(base, kind="sn", **changes):
    config = small_config(**{"loss.skip": 0, "loss.K": 1, "loss.lam": 0.0, **changes})
    set_head(config, kind)
    config.variance_head.base_workdir = str(base)
    config.train.lr = 1e-3
    return inherit_base_config(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run, and the run of a head on it."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_config(**{"diffusion.T": 50, "train.steps": 2, "eval.samplers": "ddim"})
    train(config, folder / "base")
    train(head_config(folder / "base"), folder / "head")
    return folder


def test_only_the_head_is_trained_and_saved(runs):
    base, run = load_run(str(runs / "base")), load_run(str(runs / "head"))
    jax.tree.map(np.testing.assert_array_equal, run.ema_params, base.ema_params)
    assert run.config.diffusion.T == 50
    fresh = variance_head.init_params(run.network, 0)
    assert jax.tree.map(np.shape, run.variance_head.params) == jax.tree.map(np.shape, fresh)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (run.variance_head.params, fresh)), strict=True))

    def size(folder):
        return sum(p.stat().st_size for p in (runs / folder / "checkpoints").rglob("*") if p.is_file())

    assert size("head") < size("base") / 10
    recorded = json.loads((runs / "head" / "base.json").read_text())
    assert recorded["step"] == 2
    lines = [json.loads(line) for line in (runs / "head" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss_simple", "grad_norm"} < lines[0].keys()
    rows = json.loads((runs / "head" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "real (floor)",
        "sn, linspace",
        "noise (ceiling)",
    ]


def test_a_heads_run_samples_with_its_covariance(runs):
    model = s2dm_jax.load(str(runs / "head"))
    with_head, mean_only = model.sample(4, "sn", nfe=3), model.sample(4, "ddpm", nfe=3)
    assert (with_head != mean_only).any()
    with pytest.raises(ValueError, match="needs a variance head"):
        model.sample(4, "npr", nfe=3)
    # Without a head, it is the base.
    base = s2dm_jax.load(str(runs / "base"))
    np.testing.assert_array_equal(model.sample(4, nfe=3), base.sample(4, nfe=3))


def test_a_head_is_not_used_with_another_network(runs, tmp_path):
    shutil.copytree(runs / "base", tmp_path / "base")
    shutil.copytree(runs / "head", tmp_path / "head")
    # The base trains on: the head stays with the step that it was trained on.
    config = small_config(**{"diffusion.T": 50, "train.steps": 4, "eval.samplers": "ddim"})
    train(config, tmp_path / "base")
    saved = json.loads((tmp_path / "head" / "config.json").read_text())
    saved["variance_head"]["base_workdir"] = str(tmp_path / "base")
    (tmp_path / "head" / "config.json").write_text(json.dumps(saved))
    before = load_run(str(runs / "head"))
    jax.tree.map(np.testing.assert_array_equal, load_run(str(tmp_path / "head")).ema_params, before.ema_params)

    recorded = json.loads((tmp_path / "head" / "base.json").read_text())
    (tmp_path / "head" / "base.json").write_text(json.dumps({**recorded, "step": 4}))
    with pytest.raises(UserError, match="holds other weights at step 4 than those that the variance head"):
        load_run(str(tmp_path / "head"))

    (tmp_path / "head" / "base.json").write_text("")
    with pytest.raises(UserError, match=r"base.json is empty or damaged: it records which weights"):
        load_run(str(tmp_path / "head"))


def test_bad_bases_are_refused(runs, tmp_path):
    for base, message in (
        ("", "config.variance_head.base_workdir is missing"),
        (tmp_path / "nowhere", "is not a folder"),
        (runs / "head", "is itself the run of a variance head; give its base"),
    ):
        with pytest.raises(UserError, match=message):
            head_config(base)


def test_what_the_base_decides_cannot_be_given(runs, tmp_path):
    command = [sys.executable, "-m", "s2dm_jax.main", "--config=configs/digits.py:npr"]
    command += [
        f"--workdir={tmp_path}/new",
        f"--config.variance_head.base_workdir={runs}/base",
        "--config.model.ch=64",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config.model.ch cannot be changed with config.variance_head.kind='npr'")
    assert not (tmp_path / "new").exists()
