"""The folder of a run: validated, created and locked before training."""

import contextlib
import fnmatch
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError, naming
from s2dm_jax.common.files import check_writable, write_atomic
from s2dm_jax.common.locks import acquire
from s2dm_jax.config.defaults import FIELDS, decay_steps
from s2dm_jax.config.io import flatten, from_json
from s2dm_jax.workdir.paths import checkpoint_folder, checkpoint_steps

_LOCK = ".lock"
# A file that one host wrote may take as long to appear on another.
_SHARED_SECONDS = 10.0

# What a training makes files in, appends to, and replaces.
_FOLDERS = (
    "samples",
    "tensorboard",
    "profile",
    "wandb",
    "checkpoints",
    "damaged_checkpoints",
    "ema_snapshots",
    "evaluations",
    "evaluations/points",
)
_APPENDED = (_LOCK, "metrics.jsonl")
_REPLACED = ("config.json", "parameters.txt", "metrics.jsonl", "results.json", "results.md", "wandb_run_id")


def output_folder(workdir: str | os.PathLike, out: str, name: str) -> Path:
    """Where a mode writes: `out`, else the folder `name` of the run; of an exported sampler, one beside its file."""
    path = Path(workdir)
    if out:
        return Path(out)
    return path.with_name(f"{path.stem}_{name}") if path.is_file() else path / name


def evaluation_folder(workdir: str | os.PathLike, out: str) -> Path:
    """Where results go: `out`, else the run's folder; of an exported sampler, a folder beside its file."""
    path = Path(workdir)
    return output_folder(path, out, "evaluation") if out or path.is_file() else path


def prepare_workdir(workdir: str, config: ConfigDict) -> Path:
    """Creates the folder of a run; raises a `UserError` if a run with this config cannot train."""
    path = Path(workdir)
    _check_storable(path)
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir} cannot be used: {existing} is not a folder; give another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be used: {existing} is not writable; give another path")
    checkpoints = checkpoint_folder(path)
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(
            f"--workdir={workdir} cannot be used: {checkpoints} is not a folder; fix that, or give another path"
        )
    if existing == path:
        _check_permissions(path)
    saved_path = path / "config.json"
    if saved_path.exists():
        check_same_run(saved_path, workdir, config)
    elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(f"--workdir={workdir} holds files but no run of s2dm_jax; give a new or an empty folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be created ({error.strerror}); give another path") from error
    if (path / _LOCK).exists():
        # Shared: processes of one run may look at the same time.
        with (path / _LOCK).open(encoding="utf-8") as file:
            _lock(file, workdir, shared=True)
    return path


def _check_permissions(path: Path) -> None:
    """Raises a `UserError` unless all files that training writes are writable: some may belong to another user."""
    if not os.access(path, os.R_OK):
        raise UserError(f"--workdir={path} cannot be used: it cannot be listed; give another path")
    steps = [checkpoint_folder(path) / str(step) for step in checkpoint_steps(path)]
    folders = [place for place in (path, *(path / name for name in _FOLDERS), *steps) if place.exists()]
    files = [path / name for name in _APPENDED if (path / name).exists()]
    replaced = [path / name for name in _REPLACED]
    check_writable(folders, "get write permission, or give another --workdir", files=files, replaced=replaced)


def unreadable_config(place: str | os.PathLike, error: Exception) -> UserError:
    """The error for a file that should be a run's config; a checkpoint has a copy of it."""
    if isinstance(error, OSError):
        return UserError(f"{place} cannot be read ({error.strerror}); get permission to read it, or give another run")
    advice = "give another run"
    if steps := checkpoint_steps(Path(place).parent):
        copy = checkpoint_folder(Path(place).parent) / str(steps[-1]) / "about" / "metadata"
        advice = f'restore it from the entry "config" of {copy}, or {advice}'
    reason = "it is empty or cut short" if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{place} is not a config of s2dm_jax ({reason}); {advice}")


def check_readable_name(workdir: str | os.PathLike) -> None:
    """Raises a `UserError` for a path that Orbax cannot read checkpoints from: tensorstore takes a backslash for a
    slash.
    """
    if "\\" in str(Path(workdir).absolute()):
        raise UserError(
            f"{workdir} has a backslash in its path, which checkpoints do not support; give another path, "
            "or rename the folder"
        )


def _check_storable(path: Path) -> None:
    check_readable_name(path)
    # Orbax finds what it has written by a pattern that begins with the path.
    for part in path.absolute().parts:
        if not fnmatch.fnmatchcase(part, part):
            raise UserError(
                f"--workdir={path} has the name {part!r} in its path, whose brackets the checkpoint library reads as a "
                "pattern; give a path without them"
            )


@contextlib.contextmanager
def open_workdir(workdir: str, config: ConfigDict) -> Iterator[Path]:
    """`prepare_workdir`, with a lock against other runs, which the kernel releases when the main process ends."""
    from s2dm_jax.devices.distributed import agrees_with_main, barrier, is_main_process

    with contextlib.ExitStack() as stack:
        if is_main_process():
            lock = stack.enter_context((prepare_workdir(workdir, config) / _LOCK).open("a+", encoding="utf-8"))
            _lock(lock, workdir)
            with naming(Path(lock.name)):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}")
                lock.flush()
        barrier("workdir is locked")
        if not agrees_with_main(lambda: _lock_text(workdir), seconds=_SHARED_SECONDS):
            raise UserError(
                f"--workdir={workdir} is not one folder for all processes of this run; give one on a file system that "
                "all hosts share"
            )
        yield Path(workdir)


def _lock_text(workdir: str) -> str:
    path = Path(workdir) / _LOCK
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _lock(file: TextIO, workdir: str, shared: bool = False) -> None:
    if not acquire(file, fix="give another --workdir", shared=shared):
        file.seek(0)
        raise UserError(
            f"--workdir={workdir} is in use by {file.read() or 'another process'}, which is training there; wait until "
            "it ends, or give another --workdir"
        )


def check_same_run(saved_path: Path, workdir: str, config: ConfigDict) -> None:
    """Raises a `UserError` if the run whose config is in `saved_path` cannot resume with `config`."""
    try:
        saved_config = from_json(saved_path.read_text(encoding="utf-8"))
        saved = flatten(saved_config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable_config(saved_path, error) from error
    given = flatten(config)
    if saved["train.lr_schedule"] == given["train.lr_schedule"]:
        # A decay that ended at train.steps is not stretched to other ones.
        saved["train.decay_steps"], given["train.decay_steps"] = decay_steps(saved_config), decay_steps(config)
    for name, value in given.items():
        if not FIELDS[name].resumable and saved[name] != value:
            same = f"--config.{name}={saved[name]}" if name == "train.decay_steps" else "the same config"
            raise UserError(
                f"--workdir={workdir} belongs to a run with config.{name}={saved[name]!r}, not {value!r}; "
                f"give another --workdir or {same}"
            )
    old, new = saved["data.source"], config.data.source
    if bool(old) != bool(new):
        raise UserError(
            f"--workdir={workdir} belongs to a run with config.data.source={old!r}, not {new!r}; give another "
            "--workdir or the same images"
        )


def check_same_images(workdir: str | os.PathLike, digest: str, labels_digest: str = "", *, record: bool = True) -> None:
    """Records the hashes of a run's training images and their labels, "" if they never change; rejects different ones
    when the run resumes, or is read with `record=False`.
    """
    if not digest:
        return
    path = Path(workdir) / "dataset.sha256"
    # Runs of before 0.3 have recorded the images alone.
    recorded = path.read_text(encoding="utf-8").split() if path.exists() else []
    for what, old, new in zip(("images", "labels"), recorded, (digest, labels_digest), strict=False):
        if old != new:
            raise UserError(
                f"--workdir={workdir} was trained on {what} with sha256 {old[:16]}…, not {new[:16]}…: "
                f"its {what} have changed; give the original ones, or another --workdir"
            )
    if record and len(recorded) < 2:
        write_atomic(path, f"{digest}\n{labels_digest}\n")
