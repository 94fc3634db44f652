"""The weights of Inception: from a file or a URL, checked, converted once and cached."""

import os
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path, cache_dir
from s2dm_jax.common.hashing import digest_of_file
from s2dm_jax.common.progress import progress_bar
from s2dm_jax.evaluation.inception import fold_norms, parameter_shapes
from s2dm_jax.weights.torch_pickle import Tensor, open_torch

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_SECONDS_TO_CONNECT = 20
_CHUNK = 1 << 20


def inception_params(source: str = "", sha256: str = "") -> dict[str, np.ndarray]:
    """The parameters of Inception, as returned by `inception.fold_norms`.

    Args:
      source: a file or URL of the PyTorch port's state dict; "" for the cache, or else the standard URL.
      sha256: of that file; "" for the standard weights'.

    Raises:
      UserError: if the file is missing, cannot be fetched, has another SHA-256, or is not this network's.
    """
    sha256 = (sha256 or SHA256).lower()
    folder = cache_dir() / "inception"
    converted, manual = folder / f"{sha256}.npz", folder / Path(URL).name
    params = _read_converted(converted)
    if params is not None:
        return params
    remote = "://" in source or not (source or manual.exists())
    path = _fetch(source or URL, folder, manual) if remote else Path(source or manual)
    try:
        params = _convert(path, source or str(path), sha256)
    finally:
        if remote:
            path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(converted) as temporary:
            np.savez(temporary, **params)
    except OSError as error:
        print(f"the converted weights could not be cached in {folder} ({error.strerror})", file=sys.stderr)
    return params


def _read_converted(path):
    try:
        with np.load(path) as arrays:
            params = dict(arrays)
    # A missing or damaged file is converted again; zip files carry checksums.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    shapes = {name: value.shape for name, value in params.items()}
    return params if shapes == parameter_shapes() else None


def _fetch(url, folder, manual):
    temporary = folder / f".{manual.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_SECONDS_TO_CONNECT) as response, temporary.open("wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            print(f"fetching the weights of Inception from {url} …", file=sys.stderr, flush=True)
            with progress_bar(-(-length // _CHUNK) or None, "MiB") as advance:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    advance(1)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"the weights of Inception are not in the cache and {url} cannot be fetched ({reason}); get that file "
            f"elsewhere and put it at {manual} or give it as --config.eval.inception_weights=FILE, or use other "
            "features with --config.eval.feature_extractor=classifier, which needs labels, or FILE.py:function"
        ) from error
    return temporary


def _convert(path, source, sha256):
    try:
        digest = digest_of_file(path)
    except OSError as error:
        message = f"config.eval.inception_weights={source} cannot be read ({error.strerror}); get it from {URL}"
        raise UserError(message) from error
    if digest != sha256:
        raise UserError(
            f"{source} has the SHA-256 {digest}, not {sha256}: it is cut short or another file; get {URL} "
            "again, or give the SHA-256 of your own weights as --config.eval.inception_sha256"
        )
    with open_torch(path) as (contents, read, _):
        tensors = contents if isinstance(contents, dict) else {}
        arrays = {name: read(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    try:
        return fold_norms(arrays)
    except ValueError as error:
        raise UserError(f"{source} does not hold the FID Inception's weights: {error}") from error
