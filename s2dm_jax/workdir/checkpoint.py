"""Save, verify and restore training states; the only file that imports orbax.

Orbax silently restores corrupted bytes: a digest of every leaf is saved with each state and checked on restore.
"""

import collections
import contextlib
import errno
import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from s2dm_jax.common.errors import UnfinishedWrite, UserError
from s2dm_jax.devices.distributed import any_process, barrier, is_main_process
from s2dm_jax.devices.sharding import replicated
from s2dm_jax.workdir.paths import checkpoint_folder, checkpoint_steps

State = TypeVar("State")

_policies = ocp.checkpoint_managers

# Errors that tell nothing about what a file holds.
_NOT_READ = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE)


def open_checkpoints(
    workdir: str | os.PathLike, max_to_keep: int = 1, keep_period: int = 0, best: str = ""
) -> ocp.CheckpointManager:
    """Opens `workdir`/checkpoints, created if missing; saves run in the background.

    Args:
      max_to_keep: number of newest checkpoints to keep.
      keep_period: also keep one checkpoint in this many steps permanently; 0 for none.
      best: also keep the checkpoint where this metric was lowest; "" for none.
    """
    _drop_reports_to_closed_loops()

    def value(metrics: dict) -> float:
        # No step since the checkpoint before has a finite value.
        return metrics.get(best, math.inf)

    policies = [_policies.LatestN(max_to_keep)]
    if keep_period:
        policies.append(_policies.EveryNSteps(keep_period, exact_interval=False))
    if best:
        policies.append(_policies.BestN(get_metric_fn=value, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    policy, best_fn = _policies.AnyPreservationPolicy(policies), value if best else None
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=best_fn, best_mode="min")
    return ocp.CheckpointManager(checkpoint_folder(workdir).absolute(), options=options)


@functools.cache
def _drop_reports_to_closed_loops() -> None:
    """Suppresses the hundreds of useless tracebacks of a failed save.

    Orbax closes its event loop at the first array that cannot be written, and raises that error; tensorstore then
    reports the other arrays to the closed loop, and prints a traceback for each through `sys.unraisablehook`.
    """
    report = sys.unraisablehook

    def unraisablehook(unraisable):
        outermost = unraisable.exc_traceback.tb_frame.f_code.co_name if unraisable.exc_traceback else ""
        # Anything else has more below it than the function of asyncio that tensorstore calls.
        if not (unraisable.exc_type is RuntimeError and outermost == "call_soon_threadsafe"):
            report(unraisable)

    sys.unraisablehook = unraisablehook


def save(
    manager: ocp.CheckpointManager, step: int, state: State, metadata: dict | None = None, metrics: dict | None = None
) -> None:
    """Starts saving `state`, unless `step` is saved already; raises as `finish` if the save before this one failed.

    Args:
      metadata: saved with the state, as JSON.
      metrics: floats by name, for `open_checkpoints(best=…)`.
    """
    if step in manager.all_steps():
        return
    state = _without_unused(state)
    metadata = {**(metadata or {}), "digests": digests(state)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(metadata))
    with _as_user_error(manager):
        manager.save(step, args=items, metrics=metrics)


def _without_unused(state: Any) -> Any:
    """A NamedTuple without the optional fields that hold no array; anything else as it is.

    What a state does not use is not stored, so that checkpoints of before a field existed are read as newer ones.
    """
    optional = getattr(state, "_field_defaults", {})
    unused = {name for name in optional if not jax.tree.leaves(getattr(state, name))}
    if not unused:
        return state
    used = {name: value for name, value in state._asdict().items() if name not in unused}
    return collections.namedtuple(type(state).__name__, used)(**used)


def _with_unused(state: Any, like: Any) -> Any:
    """What `_without_unused` has made of `like`, with the fields that it left out."""
    return state if type(state) is type(like) else like._replace(**state._asdict())


def read_metadata(workdir: str | os.PathLike, step: int) -> dict:
    """What was given to `save` as metadata, with the digests; empty for a checkpoint of version 0.1."""
    path = checkpoint_folder(workdir) / str(step) / "about" / "metadata"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until what `save` started is on the disk.

    Raises:
      UnfinishedWrite: if it could not be written, or was has been removed since.
    """
    with _as_user_error(manager):
        manager.wait_until_finished()
        # Orbax does not notice that its folder was removed or replaced.
        if (step := manager.latest_step()) is not None and not (Path(manager.directory) / str(step)).is_dir():
            raise FileNotFoundError(errno.ENOENT, "it was removed while it was being written", str(step))


def close(manager: ocp.CheckpointManager) -> None:
    """`finish`, then ends the manager's threads."""
    with _as_user_error(manager):
        manager.close()


@contextlib.contextmanager
def _as_user_error(manager):
    try:
        yield
    # Orbax and tensorstore raise ValueError for a write that failed as well as OSError.
    except (OSError, ValueError) as error:
        saved = checkpoint_steps(manager.directory.parent)
        earlier = f"step {max(saved):,}, saved before, is untouched" if saved else "none was saved before"
        raise UnfinishedWrite(
            f"a checkpoint could not be written to {manager.directory} ({_reason(error)}); {earlier}; "
            "free some space, or repair the disk or its permissions, and the same command resumes from there"
        ) from error


def restore_latest(
    manager: ocp.CheckpointManager,
    like: State,
    shardings: State | None = None,
    *,
    quarantine: bool = False,
    step: int | None = None,
) -> State | None:
    """The newest saved state that verifies, or None if nothing was saved; damaged ones are reported and skipped.

    Args:
      like: a state of the same structure, shapes and types (arrays or `jax.ShapeDtypeStruct`).
      shardings: of each leaf, on the present devices, which may differ from those of the save; None: replicated.
      quarantine: whether to move newer, damaged checkpoints to `workdir`/damaged_checkpoints; their steps can then be
        saved again.
      step: the one checkpoint to restore; None for the newest.

    Raises:
      UserError: if no checkpoint verifies, or `step` was not saved.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if step is not None:
        if step not in steps:
            saved = ", ".join(map(str, reversed(steps))) or "none"
            raise UserError(f"{manager.directory} holds no checkpoint of step {step}; there are: {saved}")
        steps = [step]
    if not steps:
        return None
    if shardings is None:
        shardings = jax.tree.map(lambda _: replicated(), like)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like, shardings
    )
    abstract = _without_unused(abstract)
    damaged = {}
    for candidate in steps:
        state, reason = _restore_verified(manager, candidate, abstract)
        if state is None:
            damaged[candidate] = reason
            continue
        for bad, why in damaged.items():
            _report(f"the checkpoint of step {bad:,} is damaged ({why}); step {candidate:,} is used instead")
        if quarantine and damaged:
            _quarantine(manager, list(damaged))
        return _with_unused(state, like)
    others = f", nor can the {len(steps) - 1} before it" if len(steps) > 1 else ""
    raise UserError(
        f"the checkpoint {Path(manager.directory) / str(steps[0])} cannot be read: it is damaged or of another network "
        f"({damaged[steps[0]]}){others}; give another --workdir to start over"
    )


def _restore_verified(manager: ocp.CheckpointManager, step: int, abstract: State) -> tuple[State | None, str]:
    """The state of a step, or None and what is wrong with it; the same on every process."""
    folder = Path(manager.directory) / str(step)
    _check_permission(folder)
    # Checkpoints of version 0.1 hold the state alone.
    old = (folder / "default").is_dir()
    state, expected, reason = None, dict[str, Any](), ""
    try:
        _read_through(folder / ("default" if old else "state"))
        if not old:
            expected = json.loads((folder / "about" / "metadata").read_text(encoding="utf-8")).get("digests", {})
    except (ValueError, OSError) as error:
        reason = _reason(error)
    # A checkpoint that one process cannot read no process may use: the others would wait for it forever.
    if any_process(bool(reason)):
        return None, reason or "another process cannot read it"
    item = ocp.args.StandardRestore(abstract)
    try:
        if old:
            state = manager.restore(step, args=item)
        else:
            state = manager.restore(step, args=ocp.args.Composite(state=item))["state"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        # Orbax's ValueError is for a structure that is not `like`'s; the others come from metadata that lack a part.
        reason = _reason(error)
    if not reason and not old:
        wrong = [name for name, digest in digests(state).items() if digest != expected.get(name)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            reason = f"{wrong[0]}{more} changed since it was saved"
    if any_process(bool(reason)):
        return None, reason or "another process cannot read it"
    return state, ""


def _check_permission(folder: Path) -> None:
    """Raises a `UserError` on every process if one of them may not read a file of a checkpoint: it is not damaged."""
    refused = ""

    def refuse(error: OSError) -> None:
        nonlocal refused
        if error.errno in _NOT_READ:
            refused = refused or f"{error.filename} ({error.strerror})"

    for parent, _, names in os.walk(folder, onerror=refuse):
        for path in (Path(parent) / name for name in names):
            try:
                path.open("rb").close()
            except OSError as error:
                refuse(error)
    if any_process(bool(refused)):
        raise UserError(
            f"the checkpoint {folder} cannot be read: {refused or 'another process may not'}; get permission to read "
            "it, or give another run"
        )


def _report(message: str) -> None:
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {Path(error.filename).name}"
    # tensorstore nests its errors, the innermost at the end of the line.
    line = str(error).strip().partition("\n")[0].rpartition('": ')[2]
    return line[:120] or type(error).__name__


def _quarantine(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    root = Path(manager.directory)
    if is_main_process():
        for step in steps:
            target = root.parent / "damaged_checkpoints" / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            target.parent.mkdir(exist_ok=True)
            os.rename(root / str(step), target)
            _report(f"it was moved to {target}")
    barrier("damaged checkpoints moved")
    manager.reload()


def _read_through(item: Path) -> None:
    """Reads everything that a saved pytree's index names, and discards it.

    Orbax reads its arrays concurrently: if a file is cut short it raises a bare Exception, and the reads still under
    way print a page of tracebacks each.
    """
    if not item.is_dir():
        raise ValueError(f"{item.name} is missing")
    for metadata in (item / "_METADATA", *item.glob("array_metadatas/*")):
        json.loads(metadata.read_text(encoding="utf-8"))
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
    keys = store.list().result()
    if not keys:
        raise ValueError("it holds no arrays")
    for key in keys:
        # From a missing file tensorstore reads nothing, without an error.
        if not store.read(key).result().value:
            raise ValueError(f"the file with {key.decode()} is missing")


def digests(state: State) -> dict[str, str]:
    """64 bits of each leaf's content, independent of its sharding, as 16 hexadecimal digits.

    Each element's bits are mixed with its position by a bijection and summed modulo 2³², twice: any change of one
    element changes the digest, one of several does but for one case in 2⁶⁴ or so.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = jax.device_get([_digest(leaf) for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{int(a):08x}{int(b):08x}"
        for (path, _), (a, b) in zip(leaves, sums, strict=True)
    }


@jax.jit
def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

    def mix(h):
        # The finaliser of MurmurHash3 (public domain, Appleby), a bijection of 32 bits.
        h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    first = mix(bits ^ (position * np.uint32(0x9E3779B1)))
    return first.sum(dtype=jnp.uint32), mix(first + np.uint32(0x7F4A7C15)).sum(dtype=jnp.uint32)
