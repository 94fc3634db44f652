"""Runs read back: config, network, EMA; the base run of a variance head."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.hashing import sha256_of_arrays
from s2dm_jax.config.build import build_network
from s2dm_jax.config.defaults import dataset_name
from s2dm_jax.config.io import from_json
from s2dm_jax.config.validate import check_config
from s2dm_jax.workdir import exported

if TYPE_CHECKING:
    from s2dm_jax.models.network import Network
    from s2dm_jax.models.variance_head import Head


class Run(NamedTuple):
    """A trained network and where it comes from; of a head's run its base's network.

    Attributes:
      config: the run's config, checked.
      network: the network that `ema_params` belongs to.
      ema_params: nested dict of float32 arrays, the EMA of the weights: what to sample from.
      step: number of training steps behind it, or behind the head.
      params: nested dict of float32 arrays, the weights that training changes: the network's or the head's.
      variance_head: its variance head, the EMA of its weights, or None.
    """

    config: ConfigDict
    network: "Network"
    ema_params: dict
    step: int
    params: dict
    variance_head: "Head | None" = None


def checked_config(text: str, place: str | Path) -> ConfigDict:
    """A config from its JSON text, checked.

    Raises:
      UserError: for what is no config of ours; `place` says where it was found.
    """
    try:
        config = from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} is not a config of ours ({error}); give another run") from error
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{place} cannot be used: {error}") from error
    return config


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config of the run in `workdir`, once sure that the run has saved something; imports no jax.

    Args:
      workdir: folder of a run, or the file of an exported sampler.

    Raises:
      UserError: if the folder is missing, or holds no run, a config that is not ours, or no checkpoint.
    """
    path = Path(workdir)
    if path.is_file():
        return checked_config(exported.read_header(path)["config"], path)
    if not path.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a training run")
    try:
        text = (path / "config.json").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no config.json, so it is no training run; give the --workdir of one"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} is not a config of ours ({error}); give another run") from error
    config = checked_config(text, path / "config.json")
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() or not any(entry.name.isdigit() for entry in checkpoints.iterdir()):
        raise _no_checkpoint(workdir)
    return config


def check_compared_runs(config: ConfigDict) -> list[str]:
    """The folders in `config.sample.compare`, once sure that each holds a run on the same images.

    Raises:
      UserError: as `read_config`, and for a run on another data set or with levels that do not suit it.
    """
    workdirs = [name.strip() for name in config.sample.compare.split(",") if name.strip()]
    for workdir in workdirs:
        other = read_config(workdir)
        if dataset_name(other) != dataset_name(config):
            raise UserError(
                f"config.sample.compare names {workdir}, a run on {dataset_name(other)}, not "
                f"{dataset_name(config)}; compare runs on one data set"
            )
        other.sample = config.sample
        try:
            check_config(other)
        except UserError as error:
            raise UserError(f"config.sample.compare names {workdir}, where {error}") from error
    return workdirs


def load_run(workdir: str | os.PathLike, step: int | None = None, *, network: "Network | None" = None) -> Run:
    """The newest checkpoint of a run that verifies, or that of one step; or an exported sampler.

    Args:
      workdir: folder of a run, or the file of an exported sampler.
      step: of the checkpoint; None for the newest.
      network: what was trained, where that is not the network that the run's config names.

    Raises:
      UserError: as `read_config`, and if no checkpoint, or not that of `step`, can be read.
    """
    config = read_config(workdir)
    network = network or build_network(config)
    if Path(workdir).is_file():
        params, header = exported.read_weights(workdir, network)
        if step not in (None, header["step"]):
            raise UserError(f"{workdir} holds the weights of step {header['step']}, not of step {step}")
        return Run(config, network, params, header["step"], params)

    import jax

    from s2dm_jax.models import variance_head
    from s2dm_jax.workdir import checkpoint
    from s2dm_jax.workdir.state import TrainState, make_optimizer

    kind = config.variance_head.kind
    params = variance_head.param_shapes(network) if kind else network.param_shapes()
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    like = TrainState(np.zeros((), np.int32), params, params, jax.eval_shape(optimizer.init, params))
    manager = checkpoint.open_checkpoints(workdir, config.train.max_to_keep)
    try:
        state = checkpoint.restore_latest(manager, like, step=step)
    finally:
        manager.close()
    if state is None:
        raise _no_checkpoint(workdir)
    if kind:
        head = variance_head.Head(kind, state.ema_params)
        base_params = load_base_params(workdir, config, network=network)
        return Run(config, network, base_params, int(state.step), state.params, head)
    return Run(config, network, state.ema_params, int(state.step), state.params)


def _no_checkpoint(workdir: str | os.PathLike) -> UserError:
    return UserError(f"{workdir} holds no checkpoint; train the run until it has saved one")


_BASE = "base.json"


def inherit_base_config(config: ConfigDict) -> ConfigDict:
    """The config of a head with data, schedule and network of its base; any other config as it is.

    Raises:
      UserError: if the base is not given, is no run that has saved something, or is a head itself.
    """
    if not config.variance_head.kind:
        return config
    if not config.variance_head.base_workdir:
        raise UserError(
            f"config.variance_head.base_workdir is missing: a head ({config.variance_head.kind}) is trained "
            "on the frozen network of another run; give that run's workdir, "
            "--config.variance_head.base_workdir=runs/digits"
        )
    base = read_config(config.variance_head.base_workdir)
    if base.variance_head.kind:
        raise UserError(
            f"config.variance_head.base_workdir={config.variance_head.base_workdir} is the run of a head "
            f"itself; give its base, {base.variance_head.base_workdir}"
        )
    for group in ("data", "diffusion", "model"):
        config[group] = base[group]
    return config


def load_base_params(workdir: str | os.PathLike, config: ConfigDict, *, network: "Network | None" = None) -> dict:
    """The EMA of the network that the head in `workdir` reads: the base's newest when it began, and ever
    since.

    Raises:
      UserError: if the base cannot be read, or its weights at that step are others than they were.
    """
    import jax

    # The workdir may have moved, or the base; what counts is that the weights are the same.
    path = Path(workdir) / _BASE
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = load_run(config.variance_head.base_workdir, told.get("step"), network=network)
    digest = sha256_of_arrays(jax.tree.leaves(run.ema_params))
    if told and told["sha256"] != digest:
        raise UserError(
            f"{config.variance_head.base_workdir} holds other weights at step {run.step:,} than those that "
            f"the head in {workdir} was trained on; train the head anew in a new --workdir"
        )
    if not told and jax.process_index() == 0:
        told = {"workdir": str(config.variance_head.base_workdir), "step": run.step, "sha256": digest}
        write_atomic(path, json.dumps(told, indent=1) + "\n")
    return run.ema_params
