"""Loads runs: config, network, EMA; the base run of a variance head."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import user_path, write_atomic
from s2dm_jax.common.hashing import sha256_of_arrays
from s2dm_jax.common.jax_environment import check_jax_environment
from s2dm_jax.config.build import build_network
from s2dm_jax.config.defaults import dataset_name
from s2dm_jax.config.ema import EmaChoice, check_choice, extra_names, parse_choice
from s2dm_jax.config.io import from_json
from s2dm_jax.config.validate import check_config
from s2dm_jax.workdir import exported
from s2dm_jax.workdir.folder import check_readable_name, checkpoint_steps, unreadable_config
from s2dm_jax.workdir.power_ema import snapshot_steps

if TYPE_CHECKING:
    from s2dm_jax.models.network import Network
    from s2dm_jax.models.variance_head import Head
    from s2dm_jax.workdir.state import TrainState


class Run(NamedTuple):
    """A trained network; the run of a variance head has its base's network.

    Attributes:
      config: the run's config, checked.
      network: the network that `ema_params` belongs to.
      ema_params: nested dict of float32 arrays, the EMA of the network's weights: what to sample from
        (`ema.sampling_ema`).
      step: number of training steps, of the network or its variance head.
      params: nested dict of float32 arrays, the weights that training changes: the network's or the head's.
      variance_head: the variance head with the EMA of its weights, or None.
      ema_note: a sentence if `ema_params`, of a trained EMA, differ from the checkpoint's, else "".
      saturation: share of the values of its training images that are 0 or 255, or None if it is not recorded.
      ema: what was chosen to sample from, as in `config.sample.ema`; "" is the run's EMA.
    """

    config: ConfigDict
    network: "Network"
    ema_params: dict
    step: int
    params: dict
    variance_head: "Head | None" = None
    ema_note: str = ""
    saturation: float | None = None
    ema: str = ""


def checked_config(text: str, place: str | Path) -> ConfigDict:
    """A config from its JSON text, checked; `place`, where the text was found, begins the message of a `UserError`."""
    try:
        config = from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable_config(place, error) from error
    try:
        check_config(config, trained=True)
    except UserError as error:
        raise UserError(f"{place} cannot be used: {error}") from error
    return config


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The checked config of a run that has saved a checkpoint, or of an exported sampler; imports no jax."""
    path = user_path(workdir, "workdir")
    check_readable_name(path)
    if path.is_file():
        return checked_config(exported.read_header(path)["config"], path)
    if not path.is_dir():
        raise UserError(f"{workdir} is not a folder; give the --workdir of a training run")
    file = path / "config.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no config.json, so it is not a training run; give the --workdir of one"
        ) from error
    except (OSError, ValueError) as error:
        raise unreadable_config(file, error) from error
    config = checked_config(text, file)
    if not checkpoint_steps(path):
        raise _no_checkpoint(workdir)
    return config


def check_compared_runs(config: ConfigDict) -> list[str]:
    """The folders in `config.sample.compare`; raises a `UserError` if one has another dataset or cannot be sampled."""
    workdirs = [name.strip() for name in config.sample.compare.split(",") if name.strip()]
    for workdir in workdirs:
        try:
            other = read_config(workdir)
        except UserError as error:
            raise UserError(f"config.sample.compare names {workdir}, which cannot be compared: {error}") from error
        if dataset_name(other) != dataset_name(config):
            raise UserError(
                f"config.sample.compare names {workdir}, a run on {dataset_name(other)}, not "
                f"{dataset_name(config)}; compare runs on one dataset"
            )
        other.sample = config.sample
        try:
            check_config(other, trained=True)
        except UserError as error:
            raise UserError(f"config.sample.compare names {workdir}, where {error}") from error
    return workdirs


def load_run(
    workdir: str | os.PathLike,
    step: int | None = None,
    *,
    network: "Network | None" = None,
    correct_ema: bool = True,
    ema: str = "",
) -> Run:
    """The newest checkpoint of a run that verifies, or that of `step`; or an exported sampler.

    Args:
      workdir: folder of the run, or file of the sampler.
      step: of the checkpoint; a power-function EMA needs only a snapshot of it.
      network: what was trained, if that is not the network of the run's config.
      correct_ema: False leaves the EMA as it is in the checkpoint.
      ema: the weights to sample from, as in `config.sample.ema`.
    """
    config = read_config(workdir)
    choice = ema_of_run(workdir, config, ema, step)
    check_jax_environment()

    from s2dm_jax.devices.hardware import check_devices

    check_devices()
    workdir = user_path(workdir, "workdir")
    network = network or build_network(config)
    if workdir.is_file():
        params, header = exported.read_weights(workdir, network)
        if step not in (None, header["step"]):
            raise UserError(f"{workdir} holds the weights of step {header['step']}, not of step {step}")
        return Run(config, network, params, header["step"], params, saturation=header.get("saturation"))

    from s2dm_jax.models import variance_head
    from s2dm_jax.workdir import checkpoint
    from s2dm_jax.workdir.ema import chosen_weights, synthesized_weights

    if choice.kind == "sigma_rel" and step is not None and step not in checkpoint_steps(workdir):
        averaged, note = synthesized_weights(workdir, choice.value, step)
        params = averaged
    else:
        state = _restore(workdir, config, network, step)
        averaged, note = state.ema_params, ""
        if correct_ema:
            averaged, note = chosen_weights(config, network, state, workdir, choice)
        step, params = int(state.step), state.params
    saturation = checkpoint.read_metadata(workdir, step).get("saturation")
    run = Run(config, network, averaged, step, params, None, note, saturation, choice.name)
    if not config.variance_head.kind:
        return run
    base_params = load_base_params(workdir, config, network=network, record=False)
    head = variance_head.Head(config.variance_head.kind, averaged)
    return run._replace(ema_params=base_params, variance_head=head)


def _restore(workdir: Path, config: ConfigDict, network: "Network", step: int | None) -> "TrainState":
    import jax

    from s2dm_jax.models import variance_head
    from s2dm_jax.workdir import checkpoint
    from s2dm_jax.workdir.state import TrainState, build_optimizer, initial_loss_scale

    params = variance_head.param_shapes(network) if config.variance_head.kind else network.param_shapes()
    opt_state = jax.eval_shape(build_optimizer(config).init, params)
    extra = dict.fromkeys(extra_names(config.train), params)
    like = TrainState(np.zeros((), np.int32), params, params, opt_state, initial_loss_scale(config), extra)
    with contextlib.closing(checkpoint.open_checkpoints(workdir, config.train.max_to_keep)) as manager:
        state = checkpoint.restore_latest(manager, like, step=step)
    if state is None:
        raise _no_checkpoint(workdir)
    return state


def ema_of_run(
    workdir: str | os.PathLike, config: ConfigDict, ema: str, step: int | None, group: str = ""
) -> EmaChoice:
    """The weights that `ema`, the field of a `group`, names; raises a `UserError` if the run has none such."""
    path = user_path(workdir, "workdir")
    try:
        choice = parse_choice(ema)
        if path.is_file() and choice.kind != "main":
            raise ValueError(
                f"ema={ema!r} is for a run: {workdir} is an exported sampler, which has one set of weights"
            )
        check_choice(choice, config.train)
    except ValueError as error:
        raise UserError(f"config.{group}.{error}" if group else f"{error}") from error
    if choice.kind == "sigma_rel" and step:
        steps = sorted({*checkpoint_steps(path), *snapshot_steps(path)})
        if step not in steps:
            raise UserError(
                f"{workdir} holds no checkpoint and no snapshot of its power-function EMAs of step {step}; there are: "
                f"{', '.join(map(str, steps))}"
            )
    return choice


def _no_checkpoint(workdir: str | os.PathLike) -> UserError:
    return UserError(f"{workdir} holds no checkpoint; train the run until it has saved one")


def inherit_base_config(config: ConfigDict) -> ConfigDict:
    """Copies data, diffusion and network of the base run into the config of a variance head; returns the config."""
    kind, base_workdir = config.variance_head.kind, config.variance_head.base_workdir
    if not kind:
        return config
    if not base_workdir:
        raise UserError(
            f"config.variance_head.base_workdir is missing: a variance head ({kind}) is trained on the frozen "
            "network of another run; give that run's workdir, --config.variance_head.base_workdir=runs/digits"
        )
    try:
        base = read_config(base_workdir)
    except UserError as error:
        raise UserError(f"config.variance_head.base_workdir={base_workdir} cannot be used: {error}") from error
    if base.variance_head.kind:
        raise UserError(
            f"config.variance_head.base_workdir={base_workdir} is itself the run of a variance head; give its base, "
            f"{base.variance_head.base_workdir}"
        )
    for group in ("data", "diffusion", "model"):
        config[group] = base[group]
    return config


def load_base_params(
    workdir: str | os.PathLike, config: ConfigDict, *, network: "Network | None" = None, record: bool = True
) -> dict:
    """The EMA of the base network of the variance head in `workdir`, at the step recorded when its training began.

    `record`: whether to record the step if none is recorded.
    """
    import jax

    # The workdir or the base may have moved; what counts is that the weights are the same.
    path, base_workdir = Path(workdir) / "base.json", config.variance_head.base_workdir
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(
            f"{path} is empty or damaged: it records which weights of {base_workdir} the variance head belongs to; "
            "restore it, or remove it if the base has not been trained further"
        ) from error
    run = load_run(base_workdir, recorded.get("step"), network=network)
    digest = sha256_of_arrays(jax.tree.leaves(run.ema_params))
    if run.ema_note and recorded and recorded["sha256"] != digest:
        # A head of before 0.3 was trained on the EMA as it is in the checkpoint.
        run = load_run(base_workdir, run.step, network=network, correct_ema=False)
        digest = sha256_of_arrays(jax.tree.leaves(run.ema_params))
    if recorded and recorded["sha256"] != digest:
        raise UserError(
            f"{base_workdir} holds other weights at step {run.step:,} than those that "
            f"the variance head in {workdir} was trained on; train the head again in a new --workdir"
        )
    if record and not recorded and jax.process_index() == 0:
        recorded = {"workdir": base_workdir, "step": run.step, "sha256": digest}
        write_atomic(path, json.dumps(recorded, indent=1) + "\n")
    if run.ema_note and jax.process_index() == 0:
        print(f"note: {base_workdir}: {run.ema_note}", file=sys.stderr)
    return run.ema_params
