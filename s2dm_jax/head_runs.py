"""A head's run and the run whose network it reads: which one, at which step, and that it stays the same."""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from s2dm_jax.config import UserError
from s2dm_jax.runs import hash_of, load_run, read_config, write_whole

_BASE = "base.json"


def with_base(config: ConfigDict) -> ConfigDict:
    """The config of a head with data, schedule and network of its base; any other config as it is.

    Raises:
      UserError: if the base is not given, is no run that has saved something, or is a head itself.
    """
    if not config.head.kind:
        return config
    if not config.head.base:
        raise UserError(
            f"config.head.base is missing: a head ({config.head.kind}) is trained on the frozen network of "
            "another run; give that run's workdir, --config.head.base=runs/digits"
        )
    base = read_config(config.head.base)
    if base.head.kind:
        raise UserError(
            f"config.head.base={config.head.base} is the run of a head itself; give its base, "
            f"{base.head.base}"
        )
    for group in ("data", "diffusion", "model"):
        config[group] = base[group]
    return config


def load_base(workdir: str | os.PathLike, config: ConfigDict) -> dict:
    """The moving average that the head in `workdir` reads: the base's newest when it began, and ever since.

    Raises:
      UserError: if the base cannot be read, or its weights at that step are others than they were.
    """
    import jax

    # The workdir may have moved, or the base; what counts is that the weights are the same.
    path = Path(workdir) / _BASE
    told = json.loads(path.read_text()) if path.exists() else {}
    run = load_run(config.head.base, told.get("step"))
    digest = hash_of(jax.tree.leaves(run.ema))
    if told and told["sha256"] != digest:
        raise UserError(
            f"{config.head.base} holds other weights at step {run.step:,} than those that the head in "
            f"{workdir} was trained on; train the head anew in a new --workdir"
        )
    if not told and jax.process_index() == 0:
        told = {"workdir": str(config.head.base), "step": run.step, "sha256": digest}
        write_whole(path, json.dumps(told, indent=1) + "\n")
    return run.ema
