"""Runs that cannot be written to: found before the work, and read all the same with --out."""

from pathlib import Path

import numpy as np
import pytest
from helpers import FunctionNetwork, save_run, small_config

from s2dm_jax import main
from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import check_writable, why_not_replaceable, why_not_writable
from s2dm_jax.config.build import build_schedule
from s2dm_jax.evaluation import evaluate
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.noise_statistics import statistics_folder
from s2dm_jax.inference.sample import sample
from s2dm_jax.workdir.folder import checkpoint_steps, evaluation_folder, output_folder, prepare_workdir

# Where nobody can make files, root included.
UNWRITABLE = "/proc/self/task"
CONFIG = {
    "diffusion.T": 20,
    "diffusion.beta_start": 1e-4,
    "diffusion.beta_end": 0.02,
    "sample.sampler": "analytic",
    "sample.noise_stat_images": 4,
    "sample.batch_size": 4,
    "sample.num_images": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose folders for output and caches are somebody else's."""
    path = tmp_path_factory.mktemp("runs") / "run"
    save_run(path, small_config(**CONFIG), seed=0, ema_factor=1)
    for name in ("samples", "exports", "evaluations", "ms_eps"):
        (path / name).symlink_to(UNWRITABLE)
    return path


def test_what_cannot_be_written_is_found_by_trying(tmp_path):
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "new" / "folder") == why_not_writable(tmp_path / "file", is_file=True) == ""
    for place in ("file/folder", "file"):
        assert why_not_writable(tmp_path / place) == f"{tmp_path / 'file'} is not a folder"
    assert why_not_writable(f"{UNWRITABLE}/new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_others_own_in_a_sticky_folder_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    tmp_path.chmod(0o1777)
    files = tmp_path / "file", tmp_path / "new", tmp_path / "folder" / "new"
    assert [why_not_replaceable(file) for file in files] == [""] * 3
    monkeypatch.setattr("os.geteuid", lambda: 2**31 - 1)
    assert "sticky" in why_not_replaceable(files[0])
    assert [why_not_replaceable(file) for file in files[1:]] == [""] * 2
    with pytest.raises(UserError, match=r"file cannot be written to \(another user's, .*\); give --out"):
        check_writable([tmp_path], "give --out", replaced=files)


def test_what_is_written_last_is_checked_before_the_work(run, tmp_path, monkeypatch):
    work = []
    monkeypatch.setattr("os.geteuid", lambda: 2**31 - 1)
    tmp_path.chmod(0o1777)
    (tmp_path / "results.md").touch()
    config = small_config(**CONFIG)
    model = Model(config, None, None, {}, 7)
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: model)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: work.append(1))
    with pytest.raises(UserError, match=r"results\.md cannot be written to"):
        evaluate.evaluate_run(config, str(run), str(tmp_path))
    assert work == []


@pytest.mark.parametrize(
    ("mode", "folder"), [("sample", "samples"), ("evaluate", "evaluations"), ("export", "exports")]
)
def test_a_mode_that_cannot_write_says_so_before_the_work(run, tmp_path, monkeypatch, mode, folder):
    calls = []
    module = {"sample": "inference.sample", "evaluate": "evaluation.evaluate", "export": "weights.export"}[mode]
    work = "evaluate_run" if mode == "evaluate" else mode
    monkeypatch.setattr(f"s2dm_jax.{module}.{work}", lambda config, *folders: calls.append(folders))
    arguments = ["main", f"--mode={mode}", f"--workdir={run}", "--config.sample.sampler=ddim"][
        : 3 + (mode != "evaluate")
    ]
    with pytest.raises(UserError, match=rf"{folder} cannot be written to \(.*\); give --out=DIR"):
        main.run(arguments)
    assert calls == []
    main.run([*arguments, f"--out={tmp_path / 'mine'}"])
    assert calls == [(str(run), str(tmp_path / "mine"))]
    assert not (tmp_path / "mine").exists()


def test_out_is_for_the_modes_that_read_a_run(run, tmp_path):
    with pytest.raises(UserError, match="--out=a cannot be used with --mode=train"):
        main.run(["main", f"--workdir={run}", "--out=a"])
    export = ["main", "--mode=export", f"--workdir={run}", "--out=a", "--config.export.path=b.npz"]
    with pytest.raises(UserError, match=r"--out=a cannot be combined with config\.export\.path=b\.npz"):
        main.run([*export, "--config.sample.sampler=ddim"])


def test_sampling_with_out_leaves_images_and_statistic_there(run, tmp_path, monkeypatch, capsys):
    config, out = small_config(**CONFIG), str(tmp_path / "mine")
    # A network that compiles in no time.
    network = FunctionNetwork(lambda params, x, t: params["scale"] * x)
    model = Model(config, network, build_schedule(config), {"scale": np.float32(0.5)}, 7)
    monkeypatch.setattr("s2dm_jax.inference.sample.load", lambda *_, **__: model)
    path = sample(config, str(run), out)
    assert path.parent == Path(out)
    said = capsys.readouterr()
    assert "ms_eps cannot be written to" in said.err
    assert "estimating" in said.out
    # The second time it is read.
    assert sample(config, str(run), out) == path
    assert "estimating" not in capsys.readouterr().out
    assert len(list(statistics_folder(out).iterdir())) == 1


def test_results_of_a_run_are_reused_and_new_ones_go_elsewhere(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"

    def cached(folders, value):
        return evaluate.cached(folders, "ddim", {"seed": 0}, lambda: {"value": value})["value"]

    assert cached([run], 1) == 1
    assert cached([out, run], 2) == 1
    assert not out.exists()
    assert cached([out], 3) == 3
    assert cached([out, run], 4) == 3


def test_outputs_of_an_exported_sampler_are_beside_its_file(tmp_path):
    (tmp_path / "a.npz").touch()
    assert output_folder(tmp_path / "a.npz", "", "samples") == tmp_path / "a_samples"
    assert evaluation_folder(tmp_path / "a.npz", "") == tmp_path / "a_evaluation"
    assert evaluation_folder(tmp_path, "") == tmp_path
    assert evaluation_folder(tmp_path / "a.npz", "mine") == Path("mine")
    assert statistics_folder(tmp_path / "a.npz") == tmp_path / "a_ms_eps"


def test_a_training_finds_each_part_of_a_run_that_is_anothers(run):
    with pytest.raises(UserError, match=r"/samples cannot be written to \(.*\); get write permission"):
        prepare_workdir(str(run), small_config(**CONFIG))


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_an_empty_one(run, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match=r"checkpoints cannot be read \(Permission denied\)"):
        checkpoint_steps(run)
