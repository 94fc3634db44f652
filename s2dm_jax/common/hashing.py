"""SHA-256 of arrays, JSON data and files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike


def sha256_of_arrays(arrays: Iterable[ArrayLike]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the arrays' bytes, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def sha256_of_weights(flat: dict) -> str:
    """SHA-256 of the arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(np.ascontiguousarray(flat[name]).data)
    return digest.hexdigest()


def sha256_of_json(depends_on: dict) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of named arrays, with their types and shapes, and of the text that goes with them."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def digest_of_file(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
