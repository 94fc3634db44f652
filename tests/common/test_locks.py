"""Locks between processes, and file systems without them."""

import errno
import fcntl
import os

import numpy as np
import pytest

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.locks import acquire
from s2dm_jax.config import default_config
from s2dm_jax.data.cache import prepare_dataset
from s2dm_jax.workdir.folder import open_workdir


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    path = tmp_path / "lock"
    with path.open("a") as first, path.open("a") as second:
        assert acquire(first, fix="")
        assert not acquire(second, fix="")
    with path.open("a") as first, path.open("a") as second:
        assert acquire(first, fix="", shared=True)
        assert acquire(second, fix="", shared=True)


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EIO", "ESTALE"])
def test_a_file_system_without_locks_is_one_sentence_everywhere(tmp_path, monkeypatch, code):
    number = getattr(errno, code)

    def flock(file, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("S2DM_JAX_DATA", str(tmp_path / "cache"))
    config = default_config()
    with (
        pytest.raises(UserError, match=r"has no file locks .*; give another --workdir"),
        open_workdir(str(tmp_path / "run"), config),
    ):
        pass
    np.save(tmp_path / "images.npy", np.zeros((20, 8, 8, 1), np.uint8))
    config.data.source = str(tmp_path / "images.npy")
    with pytest.raises(UserError, match=r"has no file locks .*; set S2DM_JAX_DATA"):
        prepare_dataset(config)
