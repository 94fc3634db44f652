"""Save and restore training states; the only file that imports orbax."""

import json
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
import tensorstore

from s2dm_jax.config import UserError
from s2dm_jax.parallel import on_all

State = TypeVar("State")


def open_checkpoints(workdir: str, keep: int = 1) -> ocp.CheckpointManager:
    """Opens `workdir`/checkpoints, creating it if need be; saves there run in the background.

    Args:
      workdir: folder of the run.
      keep: number of newest checkpoints that a save leaves.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, step: int, state: State) -> None:
    """Starts saving `state` as `step`; `manager.wait_until_finished()` waits for it."""
    if manager.latest_step() != step:
        manager.save(step, args=ocp.args.StandardSave(state))


def restore_latest(manager: ocp.CheckpointManager, like: State) -> State | None:
    """The newest saved state, or None where there is none.

    Args:
      manager: from `open_checkpoints`.
      like: a state of the same structure, shapes and types (arrays or `jax.ShapeDtypeStruct`).

    Raises:
      UserError: if the checkpoint is cut short, or holds another structure.
    """
    step = manager.latest_step()
    if step is None:
        return None
    folder = Path(manager.directory) / str(step)
    # The devices of today, whose number need not be that of the run that saved.
    sharding = on_all()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
    )
    try:
        _read_through(folder)
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, TypeError, OSError) as error:
        # ValueError is tensorstore's for files that are missing or cut short, and Orbax's for a structure
        # that is not `like`'s or metadata that are no JSON; the others come from metadata that lack a part.
        reason = str(error).strip().partition("\n")[0][:120]
        raise UserError(
            f"the checkpoint {folder} cannot be read, it is damaged or of another network ({reason} …); "
            "delete that folder to go on from the checkpoint before it"
        ) from error


def _read_through(folder: Path) -> None:
    """Reads all that the checkpoint's index names, and keeps nothing.

    Orbax reads its arrays concurrently: where a file is cut short it raises a bare Exception, and the reads
    still under way print a page of tracebacks each.
    """
    item = folder / "default"
    for metadata in item.glob("array_metadatas/*"):
        json.loads(metadata.read_text())
    base = {"driver": "file", "path": f"{item}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = store.list().result()
    if not keys:
        raise ValueError("it holds no arrays")
    for key in keys:
        # Of a file that is gone tensorstore reads nothing, without an error.
        if not store.read(key).result().value:
            raise ValueError(f"the file with {key.decode()} is missing")
