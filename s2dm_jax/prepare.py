"""Prepared data sets: one uint8 .npy per split in a cache folder, made once, whole or not at all.

A folder of the cache appears by one rename, when everything in it is written. A file lock lets one process
of all that see the cache prepare, on however many hosts, while the rest wait; killing it at any moment leaves
only a temporary folder, which the next one removes. jax and tensorflow are not imported here.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from s2dm_jax.config import UserError, data_label, image_shape
from s2dm_jax.images import Treatment
from s2dm_jax.sources import check_source, fingerprint

_FORMAT = 1
PROVENANCE = "provenance.json"
SPLITS = ("train", "held_out")
_CROPS = {"celeba": "ddim"}
_RESULT = "result.json"


def cache_folder() -> Path:
    """Where prepared data sets are kept: $S2DM_JAX_DATA, or ~/.cache/s2dm_jax/data."""
    return Path(os.environ.get("S2DM_JAX_DATA") or "~/.cache/s2dm_jax/data").expanduser()


def treatment(config: ConfigDict) -> Treatment:
    """What the config does to every image."""
    size, channels = image_shape(config)
    crop = config.data.crop
    if crop == "auto":
        crop = "center" if config.data.source else _CROPS.get(config.data.name, "none")
    return Treatment(size, channels, crop, config.data.resize)


def prepare(config: ConfigDict) -> Path | None:
    """Makes sure that the config's images are in the cache, which may take minutes and use the network.

    Args:
      config: a checked config.

    Returns:
      The folder with train.npy, train_labels.npy, held_out.npy, held_out_labels.npy and provenance.json; None
      for the digits, which need no preparation.

    Raises:
      UserError: as `check_preparable`, or if too much of the source is unfit, or the cache cannot be used.
    """
    folder = _folder(config)
    if folder is None or is_ready(folder):
        return folder
    check_preparable(config)
    source = os.path.expanduser(config.data.source)
    name, lock, wanted = data_label(config), f"{folder.name}.lock", treatment(config)
    if not source:
        # One lock for all crops of a data set: they share what tensorflow-datasets downloads.
        lock = f"{name}.lock"
    with _locked(cache_folder() / lock, name):
        if is_ready(folder):
            return folder
        temporary = folder.with_name(f".{folder.name}.tmp")
        for leftover in (temporary, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir()
        try:
            if source:
                from s2dm_jax.prepare_source import prepare_source

                told = prepare_source(source, wanted, config.data.bad_limit, temporary)
            else:
                told = _run_tfds(name, wanted, temporary)
            _finish(temporary, folder, told, wanted)
        except KeyboardInterrupt:
            print(
                f"\nstopped; nothing of {name} was kept, and the same command starts again", file=sys.stderr
            )
            raise SystemExit(130) from None
        except OSError as error:
            raise UserError(
                f"preparing {name} in {cache_folder()} failed ({error.strerror or error}); set S2DM_JAX_DATA "
                "to a folder with enough space"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_preparable(config: ConfigDict) -> None:
    """Checks, in milliseconds, that what preparing the config's images needs is there; writes nothing.

    Raises:
      UserError: if the source, TensorFlow or a file to be got by hand is missing.
    """
    folder, name = _folder(config), config.data.name
    if folder is None or config.data.source or is_ready(folder):
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{name} is prepared by tensorflow-datasets, which needs TensorFlow once: run {sys.executable} "
            "-m pip install 'tensorflow-cpu>=2.21' (the extra prepare), then the same command again"
        )
    path = manual_folder() / "data256x256.tar"
    roots = (manual_folder().parents[1], cache_folder() / "tfds" / name)
    prepared = any((root / "celeb_a_hq" / "256").exists() for root in roots)
    if name == "celebahq" and not path.exists() and not prepared:
        raise UserError(
            f"CelebA-HQ cannot be downloaded: make data256x256.tar by hand and put it at {path}, or give its "
            "images as config.data.source (docs/data.md says how)"
        )


def _folder(config: ConfigDict) -> Path | None:
    """Where the config's images are or will be: a path that depends on the source and what is done to it."""
    source = os.path.expanduser(config.data.source)
    if source:
        check_source(source)
    elif config.data.name == "digits":
        return None
    wanted = treatment(config)
    name = Path(source).resolve().name if source else config.data.name
    identity = [_FORMAT, fingerprint(source) if source else name, *wanted]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return cache_folder() / f"{name}-{wanted.size}-{key}"


def is_ready(folder: Path) -> bool:
    """Whether a folder of the cache holds all that its provenance names, in full."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text())
        return all(
            (folder / name).stat().st_size == facts["bytes"] for name, facts in provenance["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _finish(temporary: Path, folder: Path, told: dict, wanted: Treatment) -> None:
    """Writes the provenance, makes sure that all is on the disk, and puts the folder in its place."""
    files = {}
    for path in sorted(temporary.glob("*.npy")):
        with path.open("rb") as file:
            files[path.name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": path.stat().st_size,
            }
            os.fsync(file.fileno())
    provenance = {
        **told,
        **wanted._asdict(),
        "files": files,
        "prepared": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    (temporary / _RESULT).unlink(missing_ok=True)
    with (temporary / PROVENANCE).open("w") as file:
        file.write(json.dumps(provenance, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)
    for split, facts in provenance["splits"].items():
        print(f"{split}: {facts['count']:,} images, {folder / split}.npy", flush=True)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Holds the lock of a data set, once no other process does; the system frees it when a process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(
            f"the cache of prepared data {path.parent} cannot be used ({error.strerror}); set S2DM_JAX_DATA "
            "to another folder"
        ) from error
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process prepares {name}; waiting for it …", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
            raise UserError(
                f"the file system of {path.parent} knows no file locks, so that two processes could prepare "
                "at once; set S2DM_JAX_DATA to another folder"
            ) from error
        # The child inherits the lock: as long as it lives, no other process prepares.
        os.set_inheritable(file.fileno(), True)
        yield


def _run_tfds(name: str, wanted: Treatment, temporary: Path) -> dict:
    """Lets tensorflow-datasets download and prepare in a child process, the only one to import tensorflow.

    The child ends when its standard input closes: with this process, however that ends.
    """
    print(f"preparing {name} with tensorflow-datasets in {cache_folder()}", flush=True)
    request = json.dumps([name, wanted, str(temporary / _RESULT), str(cache_folder() / "tfds" / name)])
    child = subprocess.Popen(
        tfds_command(request),
        stdin=subprocess.PIPE,
        close_fds=False,
        # Without the GPU's memory, and without remarks on how TensorFlow was built.
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            # Its bars, in a log.
            **({} if sys.stderr.isatty() else {"TQDM_MININTERVAL": "10"}),
        },
    )
    try:
        status = child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise
    finally:
        if child.stdin:
            child.stdin.close()
    try:
        told = json.loads((temporary / _RESULT).read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"preparing {name} failed with status {status}; what went wrong is printed above"
        ) from error
    if "error" in told:
        raise UserError(f"preparing {name} failed: {told['error']}")
    return told


def tfds_command(request: str) -> list[str]:
    """The command line of the child process."""
    return [sys.executable, "-m", "s2dm_jax.prepare_tfds", request]


def manual_folder() -> Path:
    """Where tensorflow-datasets looks for files got by hand: its own default place."""
    root = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(root).expanduser() / "downloads" / "manual"
