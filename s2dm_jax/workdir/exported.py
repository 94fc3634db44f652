"""Reads the file of an exported sampler: an .npz of compiled programs, weights and a description.

Imports no jax. docs/weights.md describes the file, and has a loader that does not need this module.
"""

import contextlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.file_kinds import kind_of_file
from s2dm_jax.common.files import ZIP_DAMAGE
from s2dm_jax.common.hashing import sha256_of_arrays

if TYPE_CHECKING:
    from s2dm_jax.models.network import Network

FORMAT = "s2dm_jax sampler, version 1"
WEIGHTS = "weights/"


def read_header(path: str | os.PathLike) -> dict:
    """The description in an exported sampler: config, step, sampler, programs, digests."""
    with _as_user_error(path), zipfile.ZipFile(path) as archive:
        header = json.loads(str(_member(archive, "about")))
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
        for name, expected in (("config", str), ("step", int), ("weights_sha256", str)):
            if type(header[name]) is not expected:
                raise ValueError(f"its {name} is no {expected.__name__}")
        return header


def read_weights(path: str | os.PathLike, network: "Network") -> tuple[dict, dict]:
    """The verified weights in an exported sampler, float32 as from `Network.init`, and the dict of `read_header`."""
    from flax import traverse_util

    header = read_header(path)
    shapes = traverse_util.flatten_dict(network.param_shapes(), sep=".")
    flat = {}
    with _as_user_error(path), zipfile.ZipFile(path) as archive:
        # Also checks the programs, which s2dm_jax does not run: whoever loads the file does.
        if archive.testzip():
            raise ValueError(f"bad CRC-32 of {archive.testzip()}")
        for name, leaf in shapes.items():
            flat[name] = _member(archive, f"{WEIGHTS}{name}")
            if flat[name].shape != leaf.shape or flat[name].dtype != leaf.dtype:
                raise ValueError(f"{name} has shape {flat[name].shape}, but the network needs {leaf.shape}")
        if sha256_of_arrays((flat[name] for name in sorted(flat)), digits=64) != header["weights_sha256"]:
            raise ValueError("its weights changed after it was written")
    return traverse_util.unflatten_dict(flat, sep="."), header


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # Reading all of a member checks its CRC-32, before its header can ask for any amount of memory.
    return np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)


def _reason(path, error):
    if isinstance(error, KeyError):
        return "it lacks an entry of one"
    if isinstance(error, zipfile.BadZipFile) and not zipfile.is_zipfile(path):
        return kind_of_file(path) or "it is no .npz"
    return str(error).strip().partition("\n")[0][:120] or type(error).__name__


@contextlib.contextmanager
def _as_user_error(path: str | os.PathLike) -> Iterator[None]:
    """Turns the readers' exceptions for a file that is damaged or of another kind into a `UserError`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); get permission to read it") from error
    except (*ZIP_DAMAGE, TypeError, MemoryError) as error:
        message = _reason(path, error)
        raise UserError(
            f"{path} is damaged or is not an exported sampler ({message}); export it again, or give the "
            "--workdir of a training run"
        ) from error
