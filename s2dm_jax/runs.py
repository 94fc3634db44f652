"""The folder of a run: made sure of before training, and read back: config, network and moving average."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from s2dm_jax import exported
from s2dm_jax.check import check_config
from s2dm_jax.config import UserError, build_network, data_label, flatten, from_json

# jax and orbax take seconds to import: a wrong path is told before.
if TYPE_CHECKING:
    from s2dm_jax.unet import UNetConfig


# A run may go on with other values of these, and of everything in these groups.
OTHER_GROUPS = ("sample.", "eval.", "export.")
MAY_CHANGE = (
    # Whether the images are the same is told by their hash.
    "data.source",
    # Whether it is the same network is told by the hash of its weights.
    "head.base",
    "data.bad_limit",
    "data.device_share",
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.on_nan",
    "train.split_state",
    "train.profile_steps",
    "model.remat",
)


_LOCK = ".lock"


def prepare_workdir(workdir: str, config: ConfigDict) -> Path:
    """Creates the folder of a run, once sure that a run with this config can live there.

    Raises:
      UserError: if the folder cannot be written to, holds a run or files that are not this config's, or is
        in use by another process.
    """
    path = Path(workdir)
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"--workdir={workdir} cannot be used: {existing} is not a folder; give another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} cannot be used: {existing} is not writable; give another path")
    saved_path = path / "config.json"
    if saved_path.exists():
        _check_same_run(saved_path, workdir, config)
    elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(f"--workdir={workdir} holds files but no run of ours; give a new or an empty folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be created ({error.strerror}); give another path"
        ) from error
    if (path / _LOCK).exists():
        # Shared: processes of one run may look at the same time.
        with (path / _LOCK).open() as file:
            _take(file, fcntl.LOCK_SH, workdir)
    return path


@contextlib.contextmanager
def open_workdir(workdir: str, config: ConfigDict) -> Iterator[Path]:
    """`prepare_workdir`, and no other process may train there meanwhile.

    Of the processes of one run the first takes the lock, and the others wait for it. The kernel lets go of it
    when the process ends, however it ends.

    Raises:
      UserError: as `prepare_workdir`.
    """
    from s2dm_jax.parallel import is_lead, wait_for_all

    with contextlib.ExitStack() as held:
        if is_lead():
            lock = held.enter_context((prepare_workdir(workdir, config) / _LOCK).open("a+"))
            _take(lock, fcntl.LOCK_EX, workdir)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        wait_for_all("workdir is ours")
        yield Path(workdir)


def _take(file: TextIO, kind: int, workdir: str) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(
            f"--workdir={workdir} is in use by {file.read() or 'another process'}, which trains there; wait "
            "until it ends, or give another --workdir"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or, if the process or the disk gives out, as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _check_same_run(saved_path: Path, workdir: str, config: ConfigDict) -> None:
    try:
        saved = flatten(from_json(saved_path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{saved_path} is not a config of ours ({error}); give another --workdir") from error
    for name, value in flatten(config).items():
        fixed = not name.startswith((*OTHER_GROUPS, *MAY_CHANGE))
        if fixed and saved[name] != value:
            raise UserError(
                f"--workdir={workdir} belongs to a run with config.{name}={saved[name]!r}, not {value!r}; "
                "give another --workdir or the same config"
            )


def check_same_images(workdir: Path, digest: str) -> None:
    """Remembers in `workdir` which images a run is trained on, and refuses others when it goes on.

    Args:
      workdir: folder of the run.
      digest: hash of the training images; empty for images that never change.

    Raises:
      UserError: if the run began with other images.
    """
    path = workdir / "images.sha256"
    if not digest:
        return
    if not path.exists():
        path.write_text(f"{digest}\n")
    elif (began_with := path.read_text().strip()) != digest:
        raise UserError(
            f"--workdir={workdir} was trained on images with sha256 {began_with[:16]}…, not {digest[:16]}…: "
            "its images have changed; give those of then, or another --workdir"
        )


def origin(config: ConfigDict) -> dict:
    """What made a state: config, versions of the packages, commit of this code; plain data for JSON."""
    names = ("s2dm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions["python"] = platform.python_version()
    return {"config": config.to_dict(), "versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """The commit that this code is at, "+changes" if files differ from it; None outside of a checkout."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Installed files may lie in someone else's repository, which does not track them.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Run(NamedTuple):
    """A trained network and where it comes from; of a head's run its base's network.

    Attributes:
      config: the run's config, checked.
      network: the network that `ema` belongs to.
      ema: nested dict of float32 arrays, the moving average of the weights: what to sample from.
      step: number of training steps behind it, or behind the head.
      params: nested dict of float32 arrays, the weights that training changes: the network's or the head's.
      head: moving average of the weights of its second head, or None.
    """

    config: ConfigDict
    network: "UNetConfig"
    ema: dict
    step: int
    params: dict
    head: dict | None = None


def checked_config(text: str, place: str | Path) -> ConfigDict:
    """A config from its JSON text, checked.

    Raises:
      UserError: for what is no config of ours; `place` says where it was found.
    """
    try:
        config = from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} is not a config of ours ({error}); give another run") from error
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{place} cannot be used: {error}") from error
    return config


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config of the run in `workdir`, once sure that the run has saved something; imports no jax.

    Args:
      workdir: folder of a run, or the file of an exported sampler.

    Raises:
      UserError: if the folder is missing, or holds no run, a config that is not ours, or no checkpoint.
    """
    path = Path(workdir)
    if path.is_file():
        return checked_config(exported.read_about(path)["config"], path)
    if not path.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a training run")
    try:
        text = (path / "config.json").read_text()
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no config.json, so it is no training run; give the --workdir of one"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / 'config.json'} is not a config of ours ({error}); give another run"
        ) from error
    config = checked_config(text, path / "config.json")
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() or not any(entry.name.isdigit() for entry in checkpoints.iterdir()):
        raise _no_checkpoint(workdir)
    return config


def get_config(workdir: str) -> ConfigDict:
    """`read_config` under the name that --config=FILE:WORKDIR looks for: this file as a config file."""
    return read_config(workdir)


def compared_workdirs(config: ConfigDict) -> list[str]:
    """The folders in `config.sample.compare`, once sure that each holds a run on the same images.

    Raises:
      UserError: as `read_config`, and for a run on another data set or with levels that do not suit it.
    """
    workdirs = [name.strip() for name in config.sample.compare.split(",") if name.strip()]
    for workdir in workdirs:
        other = read_config(workdir)
        if data_label(other) != data_label(config):
            raise UserError(
                f"config.sample.compare names {workdir}, a run on {data_label(other)}, not "
                f"{data_label(config)}; compare runs on one data set"
            )
        other.sample = config.sample
        try:
            check_config(other)
        except UserError as error:
            raise UserError(f"config.sample.compare names {workdir}, where {error}") from error
    return workdirs


def load_run(workdir: str | os.PathLike, step: int | None = None) -> Run:
    """The newest checkpoint of a run that verifies, or that of one step; or an exported sampler.

    Raises:
      UserError: as `read_config`, and if no checkpoint, or not that of `step`, can be read.
    """
    config = read_config(workdir)
    if Path(workdir).is_file():
        params, about = exported.read_weights(workdir, config)
        if step not in (None, about["step"]):
            raise UserError(f"{workdir} holds the weights of step {about['step']}, not of step {step}")
        return Run(config, build_network(config), params, about["step"], params)

    import jax

    from s2dm_jax import checkpoint, heads, unet
    from s2dm_jax.head_runs import load_base
    from s2dm_jax.train_step import TrainState, make_optimizer

    network = build_network(config)
    params = (heads if config.head.kind else unet).param_shapes(network)
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    like = TrainState(np.zeros((), np.int32), params, params, jax.eval_shape(optimizer.init, params))
    manager = checkpoint.open_checkpoints(workdir, config.train.keep_checkpoints)
    try:
        state = checkpoint.restore_latest(manager, like, step=step)
    finally:
        manager.close()
    if state is None:
        raise _no_checkpoint(workdir)
    if config.head.kind:
        base = load_base(workdir, config)
        return Run(config, network, base, int(state.step), state.params, state.ema)
    return Run(config, network, state.ema, int(state.step), state.params)


def _no_checkpoint(workdir: str | os.PathLike) -> UserError:
    return UserError(f"{workdir} holds no checkpoint; train the run until it has saved one")


def hash_of(arrays: Iterable[ArrayLike]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the arrays' bytes, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
