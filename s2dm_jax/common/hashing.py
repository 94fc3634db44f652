"""SHA-256 of arrays, JSON data and files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def sha256_of_arrays(arrays: Iterable[ArrayLike], digits: int = 16) -> str:
    """The first of 64 hexadecimal digits of the SHA-256 of the arrays' bytes in turn, without types and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:digits]


def sha256_of_json(data: Any, digits: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of plain data, the keys of each dict in order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:digits]


def sha256_of_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of named arrays, with their types and shapes, and of their metadata; 64 digits."""
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
