"""Checkpoints: damage of every kind is noticed, valid ones are found, failed saves lose nothing."""

import asyncio
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT, full_disk

from s2dm_jax.common.errors import UnfinishedWrite, UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.metadata import run_metadata

# A hundred arrays, of which Orbax reports the first that fails; its threads wait for others.
FAILING = """
import resource, shutil, sys
from pathlib import Path
import jax, numpy as np
from absl import logging
from s2dm_jax.common.report import report_user_errors
from s2dm_jax.workdir import checkpoint
logging.set_verbosity(logging.FATAL)
state = {str(i): np.ones((40, 50), np.float32) * i for i in range(100)}
folder = Path(sys.argv[1]) / "checkpoints"
with report_user_errors():
    manager = checkpoint.open_checkpoints(sys.argv[1])
    checkpoint.save(manager, 1, jax.device_put(state))
    checkpoint.finish(manager)
    print("saved")
    FAULT
    checkpoint.save(manager, 2, jax.device_put(state))
    checkpoint.finish(manager)
"""


def state_of(step):
    rng = np.random.default_rng(step)
    return {
        "step": np.int32(step),
        "params": {"w": rng.standard_normal((64, 48), np.float32), "b": rng.standard_normal(7, np.float32)},
    }


def save_all(workdir, steps, metrics=None, **options):
    manager = checkpoint.open_checkpoints(workdir, **{"max_to_keep": 100, **options})
    for step in steps:
        saved = {"loss": metrics[step]} if metrics else None
        checkpoint.save(manager, step, jax.device_put(state_of(step)), {"note": step}, saved)
    checkpoint.finish(manager)
    return manager


def assert_state(actual, step):
    jax.tree.map(np.testing.assert_array_equal, actual, state_of(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with whole checkpoints of steps 1, 2 and 3."""
    path = tmp_path_factory.mktemp("saved")
    save_all(path, [1, 2, 3]).close()
    return path


def largest_file(step_folder):
    return max((step_folder / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def flip_a_byte(step_folder):
    path = largest_file(step_folder)
    data = bytearray(path.read_bytes())
    # In the middle of the arrays: tensorstore's own index, at the end, has checksums.
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def truncate(step_folder):
    path = largest_file(step_folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(step_folder):
    shutil.rmtree(step_folder)
    step_folder.mkdir()


DAMAGES = {
    "flipped byte": flip_a_byte,
    "truncated file": truncate,
    "missing file": lambda folder: largest_file(folder).unlink(),
    "missing manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "missing metadata": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "no digests": lambda folder: shutil.rmtree(folder / "about"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_newest_checkpoint_that_verifies_is_used(saved, tmp_path, capsys, damage):
    shutil.copytree(saved, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoints" / "3")
    manager = checkpoint.open_checkpoints(tmp_path / "run", max_to_keep=100)
    assert_state(checkpoint.restore_latest(manager, state_of(0)), 2)
    output = capsys.readouterr().err
    assert "the checkpoint of step 3 is damaged (" in output
    assert "step 2 is used instead" in output
    assert (tmp_path / "run" / "checkpoints" / "3").exists(), "who only reads must move nothing"
    assert_state(checkpoint.restore_latest(manager, state_of(0), quarantine=True), 2)
    assert (tmp_path / "run" / "damaged_checkpoints" / "3").is_dir()
    checkpoint.save(manager, 3, jax.device_put(state_of(3)))
    checkpoint.close(manager)
    manager = checkpoint.open_checkpoints(tmp_path / "run", max_to_keep=100)
    assert_state(checkpoint.restore_latest(manager, state_of(0)), 3)


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    file, read = largest_file(tmp_path / "run" / "checkpoints" / "3"), Path.open

    def refuse(path, *arguments, **options):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    manager = checkpoint.open_checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match=rf"3 cannot be read: {file} \(Permission denied\)"):
        checkpoint.restore_latest(manager, state_of(0), quarantine=True)
    assert file.exists()
    assert_state(checkpoint.restore_latest(manager, state_of(0), step=2), 2)


def test_where_none_verifies_nothing_is_touched(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in (1, 2, 3):
        truncate(tmp_path / "run" / "checkpoints" / str(step))
    manager = checkpoint.open_checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match=r"checkpoints/3 cannot be read.*nor can the 2 before it") as error:
        checkpoint.restore_latest(manager, state_of(0), quarantine=True)
    assert "\n" not in str(error.value)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_one_step_can_be_asked_for(saved):
    manager = checkpoint.open_checkpoints(saved, max_to_keep=100)
    assert_state(checkpoint.restore_latest(manager, state_of(0), step=1), 1)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 1, 2, 3"):
        checkpoint.restore_latest(manager, state_of(0), step=7)


def test_digest_tells_every_small_change_apart():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    swapped, negated, zero = x.copy(), x.copy(), x.copy()
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    negated[0, 0] = -0.0
    zero[2, 3] = np.nextafter(x[2, 3], np.inf)
    variants = [x, swapped, negated, zero, x.reshape(4, 3).T.copy()]
    found = {checkpoint.digests({"x": jax.device_put(v)})["x"] for v in variants}
    assert len(found) == len(variants)
    assert checkpoint.digests({"x": x}) == checkpoint.digests({"x": x.copy()})


def test_last_every_and_best_are_kept(tmp_path):
    losses = {10: 5.0, 20: 4.0, 30: 1.0, 40: 3.0, 50: 2.0, 60: 2.5, 70: 2.0}
    manager = save_all(tmp_path / "every", losses, max_to_keep=2, keep_period=30)
    assert sorted(manager.all_steps()) == [10, 40, 60, 70]
    manager.close()
    manager = save_all(tmp_path / "best", losses, losses, max_to_keep=1, best="loss")
    assert sorted(manager.all_steps()) == [30, 70]
    manager.close()
    manager = checkpoint.open_checkpoints(tmp_path / "best", max_to_keep=1, best="loss")
    checkpoint.save(manager, 80, jax.device_put(state_of(80)), metrics={"loss": 9.0})
    checkpoint.close(manager)
    assert {p.name for p in (tmp_path / "best" / "checkpoints").iterdir()} == {"30", "80"}


def test_a_disk_that_takes_no_more_loses_nothing(tmp_path):
    manager = save_all(tmp_path, [1], max_to_keep=1)
    with full_disk():
        checkpoint.save(manager, 2, jax.device_put(state_of(2)))
        with pytest.raises(UnfinishedWrite, match=r"could not be written to .*step 1, saved before, is untouched"):
            checkpoint.finish(manager)
    manager = checkpoint.open_checkpoints(tmp_path)
    assert_state(checkpoint.restore_latest(manager, state_of(0)), 1)
    checkpoint.save(manager, 2, jax.device_put(state_of(2)))
    checkpoint.close(manager)
    assert_state(checkpoint.restore_latest(checkpoint.open_checkpoints(tmp_path), state_of(0)), 2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))", "File too large"),
        ("shutil.rmtree(folder); folder.touch()", "Not a directory"),
    ],
)
def test_a_save_that_fails_ends_the_process_in_one_sentence(tmp_path, fault, reason):
    done = subprocess.run(
        [sys.executable, "-c", FAILING.replace("FAULT", fault), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: a checkpoint could not be written to .*{reason}.*\n", done.stderr)
    assert done.stdout == "saved\n"


def test_only_reports_to_a_closed_event_loop_are_left_out(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    checkpoint._drop_reports_to_closed_loops.__wrapped__()
    closed = asyncio.new_event_loop()
    closed.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as error:
        closed.call_soon_threadsafe(print)
    # tensorstore calls the function from C++: there is no frame of Python above it.
    inner = error.value.__traceback__.tb_next
    report = types.SimpleNamespace(exc_type=RuntimeError, exc_value=error.value, exc_traceback=inner)
    sys.unraisablehook(report)
    assert reported == []
    report.exc_traceback = error.value.__traceback__
    sys.unraisablehook(report)
    assert reported == [report]


def test_a_checkpoint_that_was_removed_meanwhile_is_not_taken_for_saved(tmp_path):
    manager = save_all(tmp_path, [1])
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(UnfinishedWrite, match="it was removed while it was being written: 1"):
        checkpoint.finish(manager)


def test_checkpoints_of_the_first_version_are_read(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(4, args=ocp.args.StandardSave(jax.device_put(state_of(4))))
    assert_state(checkpoint.restore_latest(checkpoint.open_checkpoints(tmp_path), state_of(0)), 4)


def test_what_made_a_state_stands_beside_it():
    about = run_metadata(default_config())
    assert about["config"]["train"]["seed"] == 0
    assert about["versions"].keys() >= {"s2dm_jax", "jax", "orbax-checkpoint", "python"}
    in_checkout = (Path(__file__).parents[2] / ".git").exists()
    assert (about["git_commit"] is not None) == in_checkout


class Before(NamedTuple):
    step: jax.Array
    params: dict


class State(NamedTuple):
    step: jax.Array
    params: dict
    ema_extra: dict = {}  # noqa: RUF012


def test_an_optional_field_is_stored_where_it_holds_something(tmp_path):
    """Checkpoints of before a field existed are read, and those that do not use it are the same."""
    step, params = state_of(3).values()
    extra = {"sigma_rel=0.05": params, "0.999": params}
    for name, state, like in (
        ("before", Before(step, params), State(step, params)),
        ("unused", State(step, params), State(step, params)),
        ("used", State(step, params, extra), State(step, params, extra)),
    ):
        manager = checkpoint.open_checkpoints(tmp_path / name)
        checkpoint.save(manager, 3, jax.device_put(state))
        checkpoint.finish(manager)
        restored = checkpoint.restore_latest(manager, like)
        assert type(restored) is State
        jax.tree.map(np.testing.assert_array_equal, restored, like)
        manager.close()
    trees = [(tmp_path / name / "checkpoints/3/state/_METADATA").read_text() for name in ("before", "unused")]
    assert trees[0] == trees[1]
