"""Digests that files and caches depend on: fixed values, what they cover and what they do not."""

import hashlib

import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.hashing import digest_of_file, sha256_of_arrays, sha256_of_json, sha256_of_tensors


def test_arrays_are_hashed_as_their_bytes_one_after_another():
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7, np.int32)
    expected = hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest()
    assert sha256_of_arrays([a, b]) == expected[:16]
    assert sha256_of_arrays((x for x in (a, b)), digits=64) == expected
    # Layout in memory and device do not matter, order does.
    assert sha256_of_arrays([np.asfortranarray(a), jnp.asarray(b)]) == expected[:16]
    assert sha256_of_arrays([b, a]) != expected[:16]


def test_json_is_hashed_with_sorted_keys():
    expected = hashlib.sha256(b'{"a": [1, null], "b": 0.5}').hexdigest()
    assert sha256_of_json({"b": 0.5, "a": (1, None)}) == expected[:16]
    assert sha256_of_json({"a": [1, None], "b": 0.5}, digits=8) == expected[:8]
    assert sha256_of_json([2, "x"], digits=12) == hashlib.sha256(b'[2, "x"]').hexdigest()[:12]


def test_tensors_are_hashed_with_names_types_shapes_and_metadata():
    tensors, metadata = {"b": np.zeros((2, 3), np.float32), "a": np.ones(2, np.int32)}, {"format": "pt"}
    digest = sha256_of_tensors(tensors, metadata)
    assert len(digest) == 64
    assert sha256_of_tensors(dict(reversed(tensors.items())), metadata) == digest
    for other in (
        {**tensors, "b": np.zeros((3, 2), np.float32)},
        {**tensors, "b": np.zeros((2, 3), np.int32)},
        {"b": tensors["b"], "c": tensors["a"]},
    ):
        assert sha256_of_tensors(other, metadata) != digest
    assert sha256_of_tensors(tensors, {"format": "np"}) != digest


def test_files_are_hashed_by_any_algorithm(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert digest_of_file(path) == hashlib.sha256(b"abc").hexdigest()
    assert digest_of_file(path, "md5") == hashlib.md5(b"abc").hexdigest()
