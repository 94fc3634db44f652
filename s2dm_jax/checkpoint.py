"""Save and restore training states; the only file that imports orbax."""

from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

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
    """
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    return manager.restore(step, args=ocp.args.StandardRestore(abstract))
