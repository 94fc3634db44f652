"""Reading a run back from its folder, and the estimation-gap command that does."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import load_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import build_network
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import to_json
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.load import load_run, read_config
from s2dm_jax.workdir.state import init_state, make_optimizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "estimation_gap.py"


@pytest.fixture(scope="module")
def command():
    """The `main` of scripts/estimation_gap.py."""
    return load_file(SCRIPT).main


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of 7 steps that were never trained; its average differs from its weights."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    path.mkdir()
    config = default_config()
    config.diffusion.T = 20
    config.model.ch, config.model.ch_mult, config.model.num_res_blocks = 32, (1,), 1
    config.model.attn_resolutions = ()
    config.sample.steps, config.eval.nfe = 10, (10,)
    (path / "config.json").write_text(to_json(config))
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    state = init_state(build_network(config), optimizer, seed=5)
    state = state._replace(
        step=np.int32(7), ema_params=jax.tree.map(lambda leaf: np.asarray(leaf) * 0.5, state.params)
    )
    manager = checkpoint.open_checkpoints(path)
    checkpoint.save(manager, 7, jax.device_put(state))
    manager.close()
    return path, config, state


def test_run_comes_back_as_it_was_saved(workdir):
    path, config, state = workdir
    run = load_run(str(path))
    assert run.config == config
    assert run.network == build_network(config)
    assert run.step == 7
    jax.tree.map(np.testing.assert_array_equal, run.ema_params, state.ema_params)


def test_what_is_no_run_is_told_in_one_sentence(workdir, tmp_path):
    def refuses(pattern):
        with pytest.raises(UserError, match=pattern) as error:
            read_config(str(tmp_path / "run"))
        assert "\n" not in str(error.value)

    refuses("run is not a folder")
    (tmp_path / "run").mkdir()
    refuses("run holds no config.json")
    assert not list((tmp_path / "run").iterdir()), "looking at a folder must not write to it"
    config = tmp_path / "run" / "config.json"
    config.write_text("{")
    refuses(r"config\.json is not a config of ours")
    config.write_text('{"train": 1}')
    refuses(r"config\.json is not a config of ours")
    config.write_text(to_json(workdir[1]).replace('"T": 20', '"T": 1'))
    refuses(r"config\.json cannot be used: config\.diffusion\.T=1 is out of range")
    config.write_text(to_json(workdir[1]))
    refuses("run holds no checkpoint")
    (tmp_path / "run" / "checkpoints").mkdir()
    refuses("run holds no checkpoint")


def test_estimation_gap_command(command, workdir, tmp_path, capsys):
    run, out = str(workdir[0]), tmp_path / "new" / "gap.png"
    command([run, run, f"--out={out}", "--images=4"])
    assert out.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(out.with_suffix(".json").read_text())
    first, second = numbers["curves"]
    # The start of 300 is more than T allows.
    assert first["t"] == list(range(19, 0, -1))
    assert first["rms"] == second["rms"], "two runs must see the same noise"
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
def test_estimation_gap_command_tells_mistakes(command, workdir, capsys, flag, sentence):
    with pytest.raises(SystemExit) as stop:
        command([str(workdir[0]), flag])
    assert stop.value.code == 2
    assert capsys.readouterr().err == sentence + "\n"
