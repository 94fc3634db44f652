"""`evidence_weights.npz`: the weights, their EMA and the records of all objectives, from which a run trains on."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from gpu_stages.records import free_name
from s2dm_jax.common.files import ZIP_DAMAGE, atomic_path

FILE = "evidence_weights.npz"

_ABOUT = "about"
_TREES = ("params", "ema_params")


class Trained(NamedTuple):
    """A trained objective.

    Attributes:
      params, ema_params: nested dicts; float32 in memory, float16 in the file.
      record: plain data with "step" and "seconds", and "sessions", "losses" and "rows" of `evidence_train`.
    """

    params: dict
    ema_params: dict
    record: dict[str, Any]


class Left(NamedTuple):
    """What a run leaves for the next one.

    Attributes:
      digest: of everything that the weights depend on.
      classifier: its weights by name, float32, so that distances of several runs are comparable.
      objectives: by name.
    """

    digest: str
    classifier: dict[str, np.ndarray]
    objectives: dict[str, Trained]


def write(folder: Path, left: Left) -> None:
    """Replaces the file of a folder."""
    records = {name: trained.record for name, trained in left.objectives.items()}
    arrays = {_ABOUT: np.array(json.dumps({"digest": left.digest, "records": records}))}
    arrays |= {f"classifier/{name}": np.asarray(value, np.float32) for name, value in left.classifier.items()}
    for objective, trained in left.objectives.items():
        for tree in _TREES:
            flat = traverse_util.flatten_dict(getattr(trained, tree), sep="/")
            arrays |= {f"{objective}/{tree}/{name}": np.asarray(value, np.float16) for name, value in flat.items()}
    with atomic_path(folder / FILE) as temporary:
        np.savez(temporary, **arrays)


def set_aside(folder: Path) -> None:
    """Renames the file of a folder, if there is one: weights of something else may have taken a long time."""
    path = folder / FILE
    if path.exists():
        path.rename(free_name(path))


def read(folder: Path, digest: str) -> tuple[Left | None, str]:
    """What is in the file of a folder, or None and, if there is a file, a sentence that says why it is ignored."""
    path = folder / FILE
    if not path.exists():
        return None, ""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop(_ABOUT)))
        if about["digest"] != digest:
            return None, f"{FILE} is of another network, other settings or other images, and is ignored"
        flat = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
        tree = traverse_util.unflatten_dict(flat, sep="/")
        records = about["records"]
        objectives = {name: Trained(tree[name]["params"], tree[name]["ema_params"], records[name]) for name in records}
        return Left(digest, tree["classifier"], objectives), ""
    except ZIP_DAMAGE as error:
        return None, f"{FILE} is damaged ({error}) and is ignored"
