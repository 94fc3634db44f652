"""The components of a run, built and checked before the first long work."""

from pathlib import Path
from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.config.build import build_network
from s2dm_jax.config.ema import extra_names
from s2dm_jax.config.io import to_json
from s2dm_jax.data.datasets import Dataset, load_dataset
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.hardware import memory_limit
from s2dm_jax.devices.sharding import replicate
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.evaluation.checks import check_evaluation
from s2dm_jax.models import variance_head
from s2dm_jax.models.flops import forward_flops, step_flops
from s2dm_jax.models.network import Network, num_params
from s2dm_jax.samplers.specs import SAMPLERS
from s2dm_jax.training.step import step_config
from s2dm_jax.training.wandb_run import check_wandb
from s2dm_jax.workdir.folder import check_same_images
from s2dm_jax.workdir.load import load_base_params
from s2dm_jax.workdir.state import TrainState, build_optimizer, init_state, initial_loss_scale, new_state

# Of each parameter, in float32: weight, EMA and Adam's two moments; each further EMA.
_STATE_BYTES, _EMA_BYTES = 16, 4


class Setup(NamedTuple):
    """The components of a run.

    Attributes:
      config: the run's, checked.
      workdir: its folder, open.
      data: the dataset.
      network, schedule, optimizer: as in `step.StepConfig`.
      base_params: weights of the frozen network whose variance head is trained, or None.
      init: the state before the first step.
      flops_per_step: model FLOPs.
    """

    config: ConfigDict
    workdir: Path
    data: Dataset
    network: Network
    schedule: NoiseSchedule
    optimizer: optax.GradientTransformation
    base_params: dict | None
    init: TrainState
    flops_per_step: int


def set_up(config: ConfigDict, workdir: Path, network: Network | None) -> Setup:
    """Builds and checks everything before the first long work; writes config.json."""
    network = network or build_network(config)
    optimizer = build_optimizer(config)
    step = step_config(config, network, optimizer)
    _check(config, step.objective.terms)
    _check_memory(config, network)
    if is_main_process():
        check_wandb(config)
    # Preparing a dataset may take hours.
    data = load_dataset(config)
    check_evaluation(config, data)
    if is_main_process():
        save_config(config, workdir, data)
        (workdir / "samples").mkdir(exist_ok=True)
    batch_size = config.train.batch_size
    extras = initial_loss_scale(config), extra_names(config.train)
    if config.variance_head.kind:
        base_params = replicate(load_base_params(workdir, config, network=network))
        state = new_state(variance_head.init_params(network, config.train.seed), optimizer, *extras)
        flops = forward_flops(network) * batch_size
    else:
        base_params, state = None, init_state(network, optimizer, config.train.seed, *extras)
        flops = step_flops(network, batch_size, step.objective.num_timesteps_per_image)
    return Setup(config, workdir, data, network, step.schedule, optimizer, base_params, state, flops)


def _check_memory(config: ConfigDict, network: Network) -> None:
    """Raises a `UserError` for a network whose weights, EMA and Adam's moments alone do not fit; activations come on
    top.
    """
    per_param = _STATE_BYTES + _EMA_BYTES * len(extra_names(config.train))
    state, limit = per_param * num_params(network), memory_limit()
    if config.train.shard_state:
        state //= jax.device_count()
    if state > limit:
        model = config.model
        raise UserError(
            f"config.model.ch={model.ch} with ch_mult={tuple(model.ch_mult)} and num_res_blocks={model.num_res_blocks} "
            f"is a network of {num_params(network):,} parameters, whose training state of {state / 1e9:,.0f} GB does "
            f"not fit into {limit / 1e9:,.0f} GB; choose a smaller one"
        )


def save_config(config: ConfigDict, workdir: Path, data: Dataset) -> None:
    """Writes config.json and the hashes of the images; raises a `UserError` if a run had other images."""
    check_same_images(workdir, data.digest, data.labels_digest, record=False)
    # Before the hashes: a folder that holds anything without it is not taken for a run.
    write_atomic(workdir / "config.json", to_json(config))
    check_same_images(workdir, data.digest, data.labels_digest)


def _check(config: ConfigDict, terms: tuple[str, ...]) -> None:
    """Checks what depends on the devices, the objective or the table of samplers."""
    train, sampler, devices = config.train, config.sample.sampler, jax.device_count()
    parts = devices * train.grad_accum_steps
    if train.batch_size % parts:
        raise UserError(
            f"config.train.batch_size={train.batch_size} must be a multiple of {parts}, the {devices} devices times "
            f"config.train.grad_accum_steps={train.grad_accum_steps}"
        )
    if SAMPLERS[sampler].requires == "ms_eps":
        raise UserError(
            f"config.sample.sampler={sampler!r} cannot sample during training: its statistic belongs to a trained "
            f"network; train with ddim, and use {sampler} with --mode=sample"
        )
    metrics = ("", "loss", *(f"loss_{name}" for name in terms), "grad_norm")
    if train.keep_best not in metrics:
        raise UserError(
            f"config.train.keep_best={train.keep_best!r} is not a metric of this run; choose one of "
            + ", ".join(name or "nothing" for name in metrics)
        )
