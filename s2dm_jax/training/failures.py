"""Failures that stop a run: losses that are not finite, a loss scale that keeps falling."""

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import fixed_loss_scale

# So many steps without one finite loss: the weights are lost, skipping will not fix them.
_MAX_SKIPPED_IN_A_ROW = 100


def usual_cure(config: ConfigDict) -> str:
    """What usually cures a loss or gradient that is not finite."""
    scale = fixed_loss_scale(config)
    not_dynamic = scale is not None and (config.model.dtype == "float16" or scale != 1)
    return "config.train.loss_scale=dynamic, or " * not_dynamic + "a lower config.train.lr"


def check_finite(
    finite: np.ndarray,
    first: int,
    on_nonfinite: str,
    saved: int | None,
    in_a_row: int,
    cure: str = "a lower config.train.lr",
) -> int:
    """Stops a run, or prints what it skipped, if a chunk of steps had a loss or gradient that is not finite.

    Args:
      finite: bool [n], whether both loss and gradient norm are.
      first: the number of the chunk's first step.
      on_nonfinite: "stop" or "skip".
      saved: the newest checkpoint's step, or None.
      in_a_row: how many steps were skipped just before this chunk.
      cure: from `usual_cure`.

    Returns:
      How many steps at the end of the chunk were skipped, together with those before it where all were.

    Raises:
      UserError: with "stop" for any such step, with "skip" for a hundred in a row.
    """
    bad = first + np.flatnonzero(~finite)
    if not len(bad):
        return 0
    checkpoint = _last_checkpoint(saved)
    cure = f"{cure} in a new --workdir usually helps"
    if on_nonfinite == "stop":
        resume = "skips such steps" if saved is None else "resumes from there and skips such steps"
        raise UserError(
            f"the loss or its gradient is not finite from step {bad[0]} on, seen in steps {first} to "
            f"{first + len(finite) - 1}; {checkpoint}; the same command with --config.train.on_nonfinite=skip "
            f"{resume}, {cure}"
        )
    in_a_row = int(len(finite) - 1 - np.flatnonzero(finite)[-1] if finite.any() else in_a_row + len(finite))
    if in_a_row >= _MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"the loss or its gradient was not finite in {in_a_row} steps in a row, up to step {bad[-1]}: "
            f"skipping does not help; {checkpoint}; {cure}"
        )
    which = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
    print(f"skipped {len(bad)} steps whose loss or gradient is not finite ({which})", flush=True)
    return in_a_row


def check_loss_scale(metrics: dict[str, np.ndarray], first: int, saved: int | None) -> None:
    """Stops a run whose gradient overflows in float16 with a loss scale of 1 and less: the scale is not to blame.

    Args:
      metrics: "loss_scale" [n], after each of a chunk's steps, if it is dynamic.
      first, saved: as in `check_finite`.

    Raises:
      UserError: for a scale below 1.
    """
    below = np.flatnonzero(metrics.get("loss_scale", np.ones(1)) < 1)
    if len(below):
        raise UserError(
            f"the gradient is not finite at step {first + below[0]} with a loss scale of 1: config.train.loss_scale="
            f"dynamic has halved it after each overflow, from 65536 on; {_last_checkpoint(saved)}; a lower "
            "config.train.lr, or config.model.dtype=bfloat16 or float32, in a new --workdir usually helps"
        )


def _last_checkpoint(saved: int | None) -> str:
    return "no checkpoint was saved yet" if saved is None else f"the last good checkpoint is step {saved:,}"
