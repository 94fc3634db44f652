"""The points of an evaluation as cached files: each is measured once per combination of its inputs."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from s2dm_jax.common.files import read_json, write_atomic
from s2dm_jax.common.hashing import sha256_of_json
from s2dm_jax.devices.distributed import is_main_process


def cached(folders: Sequence[Path], name: str, depends_on: dict, compute: Callable[[], dict]) -> dict:
    """The result of `compute`, or that of an earlier call with the same `depends_on`, from one of the folders; the
    first is written to.
    """
    label = "".join(c if c.isalnum() else "_" for c in name)
    paths = [folder / f"{label}_{sha256_of_json(depends_on)}.json" for folder in folders]
    for path in paths:
        # Several processes need not see the same files, and each must take part in computing.
        if jax.process_count() == 1 and (entry := read_json(path, ("values",), "it is measured again")):
            return entry["values"]
    began = time.monotonic()
    values = compute()
    entry = {"values": values, "seconds": time.monotonic() - began, "depends_on": depends_on}
    if is_main_process():
        folders[0].mkdir(parents=True, exist_ok=True)
        write_atomic(paths[0], json.dumps(entry, indent=1) + "\n")
    return values
