"""Writes a network's weights as a run's folder, for PyTorch codes, for diffusers, as safetensors."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_outputs, user_path
from s2dm_jax.common.hashing import digest_of_file, sha256_of_arrays, sha256_of_tensors
from s2dm_jax.config.build import network_of, schedule_fields, schedule_spec
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.ema import extra_names
from s2dm_jax.config.io import from_json, to_json
from s2dm_jax.config.presets import set_head
from s2dm_jax.config.validate import check_config
from s2dm_jax.data.sources import UNKNOWN
from s2dm_jax.diffusion.betas import same_betas
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.network import Network, network_name
from s2dm_jax.models.unet import UNet
from s2dm_jax.models.variance_head import Head
from s2dm_jax.weights import diffusers_improved, diffusers_names, model_card, torch_names
from s2dm_jax.weights.formats import SUFFIXES
from s2dm_jax.weights.model_card import CARD, NOT_STATED
from s2dm_jax.weights.read import METADATA_PREFIX, SUMS, Weights
from s2dm_jax.weights.torch_pickle import write_torch
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.load import Run, load_run, read_config
from s2dm_jax.workdir.metadata import run_metadata
from s2dm_jax.workdir.state import build_optimizer, initial_loss_scale, new_state

# Which network each format is for, by the names of NETWORKS; the others take both.
_NETWORKS_OF = {
    "ddim": "unet",
    "sa_dpm": "unet",
    "pndm": "unet",
    "improved_diffusion": "improved_unet",
}
_INSTEAD = {
    "unet": "choose ddim, analytic_dpm or safetensors",
    "improved_unet": "choose improved_diffusion, analytic_dpm or safetensors",
}
# The published codes read every network's output as ε.
_EPSILON_ONLY = ("ddim", "sa_dpm", "pndm", "analytic_dpm", "improved_diffusion")
# Fields of the config's group `model` that are no part of the weights' network.
_FREE_FIELDS = ("name", "dropout", "dtype", "remat", "prediction")


def infer_config(weights: Weights, *, given: ConfigDict | None = None, data: str = "") -> ConfigDict:
    """The config of a run that continues from weights: `given`, else that of their card, else the defaults.

    Args:
      given: a config with the weights' network and schedule; others are a UserError.
      data: name of a dataset, or the path of your own images; by default the one dataset of images of that
        shape, or `UNKNOWN`.
    """
    network = weights.network
    if network.in_channels != network.out_channels:
        raise UserError(
            f"conv_out.weight has {network.out_channels} channels, conv_in.weight {network.in_channels}: networks that "
            "predict more than the noise are not supported"
        )
    inherited = from_json(json.dumps(weights.model_card["config"])) if weights.model_card else None
    config = given or inherited or default_config()
    shape = (network.resolution, network.in_channels)
    if data or not (given or inherited):
        names = [name for name, spec in DATASETS.items() if spec.shape == shape]
        # Faces, animals and bedrooms are of one size: what several datasets have says nothing.
        name = data or (names[0] if len(names) == 1 else UNKNOWN)
        if name in DATASETS:
            config.data.name, config.data.source = name, ""
        else:
            config.data.source = name
    if DATASETS[config.data.name].shape != shape or config.data.source:
        config.data.resolution, config.data.channels = shape
    if given:
        _check_network(given, weights)
    else:
        names = [*_network_fields(network, config), "prediction"]
        config.model.update(name=network_name(network), **{name: getattr(network, name) for name in names})
        if not inherited:
            config.model.dropout = _published_dropout(network)
        if weights.schedule:
            config.diffusion.update(weights.schedule._asdict())
        elif weights.assumed:
            config.diffusion.update(schedule=weights.assumed.schedule, T=weights.assumed.T)
    # The EMA that comes with the weights is where all start.
    config.train.ema_start = "initial"
    config.eval.nfe = tuple(nfe for nfe in config.eval.nfe if nfe <= config.diffusion.T) or (1,)
    check_config(config, trained=weights.schedule is not None or weights.assumed is not None)
    return config


def _network_fields(network: Network, config: ConfigDict) -> list[str]:
    """The fields that the network and the config's group `model` have under one name, those of training left out."""
    names = [field.name for field in dataclasses.fields(torch_names.as_published(network))]
    return [name for name in names if name in config.model and name not in _FREE_FIELDS]


def _published_dropout(network: UNet | ImprovedUNet) -> float:
    if network.dropout or isinstance(network, ImprovedUNet):
        return network.dropout
    return 0.0 if network.resolution >= 256 else 0.1


def _check_network(config: ConfigDict, weights: Weights) -> None:
    """UserError if the config has another network or schedule than the weights state."""
    name, network = network_name(weights.network), weights.network
    if config.model.name != name:
        raise UserError(
            f"the weights are of a network with model.name={name!r}, but the config has {config.model.name!r}; give "
            "a matching config"
        )
    try:
        wanted = network_of(config, "float32")
    except ValueError as error:
        raise UserError(f"config.model.{error}") from error
    # A file without card and schedule leaves open what the network predicts.
    always = () if not (weights.model_card or weights.schedule) else ("prediction",)
    for name in (*_network_fields(network, config), *always):
        value = getattr(network, name)
        if getattr(wanted, name) != value:
            raise UserError(
                f"the weights are of a network with model.{name}={value}, but the config has {getattr(wanted, name)}; "
                "give a matching config"
            )
    if weights.schedule and not same_betas(weights.schedule, schedule_spec(config)):
        stated = {name: value for name, value in weights.schedule._asdict().items() if value is not None}
        raise UserError(
            f"the weights are of a network for {stated}, but the config has {schedule_fields(config)}; give a matching "
            "config"
        )


def write_weights(
    out: str, kind: str, weights: Weights, config: ConfigDict, *, source: dict, license: str = ""
) -> None:
    """Writes weights in one of `formats.FORMATS`, atomically, with a model card; overwrites nothing.

    Args:
      out: file or folder.
      kind: one of `formats.FORMATS`.
      weights, config: from `read.read_weights` and `infer_config`.
      source: their origin (`model_card.make_card`), for weights without a card of their own.
      license: for the card, instead of the one in theirs.

    Raises:
      UserError: if `out` exists or cannot be written, or the format is not for this network.
    """
    model, name = config.model, network_name(weights.network)
    if _NETWORKS_OF.get(kind, name) != name:
        raise UserError(f"the format {kind} is for the network {_NETWORKS_OF[kind]}, not for {name}; {_INSTEAD[name]}")
    if weights.head and weights.head.kind and kind != "analytic_dpm":
        raise UserError(
            f"the format {kind} has no place for a variance head; choose analytic_dpm, or give the run of its base"
        )
    if kind in _EPSILON_ONLY and model.prediction != "epsilon":
        raise UserError(
            f"the format {kind} is for networks that predict epsilon, but config.model.prediction="
            f"{model.prediction!r}; choose safetensors or diffusers"
        )
    if kind == "diffusers" and isinstance(weights.network, ImprovedUNet):
        weights, config = _for_diffusers(weights, weights.network, config)
    network = dataclasses.replace(weights.network, dropout=model.dropout, prediction=model.prediction)
    run = Run(config, network, weights.ema_params, weights.step, weights.params)
    old = weights.model_card or {"license": "", "source": source, "metrics": None, "weights": {}}
    run = run._replace(ema_note=old["weights"].get("note") or "")
    license = license or old["license"]
    card = model_card.make_card(run, license=license, source=old["source"], metrics=old["metrics"])
    # Those chosen by --ema.
    card["weights"]["kind"] = old["weights"].get("kind", card["weights"]["kind"])
    path = user_path(out, "out")
    if kind in ("workdir", "diffusers"):
        write_folder = _write_workdir if kind == "workdir" else _write_diffusers
        with atomic_outputs(path) as (folder,):
            folder.mkdir()
            write_folder(folder, run, card)
        return
    suffixes = SUFFIXES[kind]
    if path.suffix not in suffixes:
        raise UserError(f"{out} must end in {' or '.join(suffixes)}, to hold the format {kind}")
    with atomic_outputs(path, *model_card.card_paths(path)) as (file, *card_files):
        state = torch_names.to_torch(weights.ema_params)
        if kind == "safetensors":
            _save_safetensors(file, state, card)
        elif kind == "ddim":
            write_torch(file, _ddim_checkpoint(run, state), json.dumps(card))
        else:
            prefix = "module." if kind == "sa_dpm" else ""
            if kind == "analytic_dpm" and weights.head:
                state |= torch_names.head_to_torch(weights.head.params, network)
            write_torch(file, {f"{prefix}{name}": value for name, value in state.items()}, json.dumps(card))
        model_card.write_card(card, *card_files)


def write_head_run(
    out: str, weights: Weights, config: ConfigDict, *, base: str, source: dict, license: str = ""
) -> None:
    """Writes the run of `weights.head`, and that of the frozen network if `base` does not exist.

    Args:
      weights: whose head has a kind.
      config: that of the frozen network, from `infer_config`, or the one to continue with, which has the head's kind.
      base: folder of the frozen network's run.
      out, source, license: as in `write_weights`; the card is that of the frozen network with the head.

    Raises:
      UserError: as `write_weights`; if `base` holds other weights than the file's.
    """
    head = cast(Head, weights.head)
    if not os.path.lexists(base):
        # The card of a file of ours is that of the head.
        alone = weights._replace(head=None, step=0, model_card=None)
        write_weights(base, "workdir", alone, _without_head(config), source=source, license=license)
    wanted = network_of(read_config(base), "float32")
    for name in _network_fields(weights.network, config):
        if getattr(wanted, name, None) != getattr(weights.network, name):
            raise UserError(
                f"--base={base} is the run of a network with {name}={getattr(wanted, name, None)}, but for this file "
                f"it is {getattr(weights.network, name)}; give another folder, or other flags"
            )
    frozen = load_run(base)
    digest = sha256_of_arrays(jax.tree.leaves(frozen.ema_params))
    if digest != sha256_of_arrays(jax.tree.leaves(weights.ema_params)):
        raise UserError(
            f"--base={base} holds other weights than the frozen network in the file; give the run that was made of "
            "them, or a folder that does not exist, for it to be written"
        )
    config = _with_head(config, head.kind, base, frozen.config)
    run = Run(config, frozen.network, frozen.ema_params, weights.step, head.params, head)
    old = weights.model_card or {"license": "", "source": source, "metrics": None}
    license = license or old["license"]
    card = model_card.make_card(run, license=license, source=old["source"], metrics=old["metrics"])
    with atomic_outputs(user_path(out, "out")) as (folder,):
        folder.mkdir()
        _write_workdir(folder, run._replace(ema_params=head.params), card)
        recorded = {"workdir": base, "step": frozen.step, "sha256": digest}
        (folder / "base.json").write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def _without_head(config: ConfigDict) -> ConfigDict:
    """The config of a network alone: a head's training and samplers are not the network's."""
    alone = default_config()
    for group in ("data", "diffusion", "model"):
        alone[group] = config[group]
    return alone if config.variance_head.kind else config


def _with_head(config: ConfigDict, kind: str, base: str, frozen: ConfigDict) -> ConfigDict:
    """The config of a head's run, with the released code's training unless the config is a head's already."""
    if config.variance_head.kind != kind:
        config = default_config()
        set_head(config, kind)
    for group in ("data", "diffusion", "model"):
        config[group] = frozen[group]
    config.variance_head.base_workdir, config.train.ema_start = base, "initial"
    config.eval.nfe = tuple(nfe for nfe in config.eval.nfe if nfe <= config.diffusion.T) or (1,)
    check_config(config, trained=True)
    return config


def _write_workdir(folder: Path, run: Run, card: dict) -> None:
    optimizer = build_optimizer(run.config)
    extra = dict.fromkeys(extra_names(run.config.train), run.ema_params)
    state = new_state(run.params, optimizer, initial_loss_scale(run.config))
    state = state._replace(step=np.asarray(run.step, np.int32), ema_params=run.ema_params, ema_extra=extra)
    (folder / "config.json").write_text(to_json(run.config), encoding="utf-8")
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    manager = checkpoint.open_checkpoints(folder, run.config.train.max_to_keep)
    checkpoint.save(manager, run.step, jax.device_put(state), run_metadata(run.config))
    checkpoint.close(manager)


def _for_diffusers(weights: Weights, network: ImprovedUNet, config: ConfigDict) -> tuple[Weights, ConfigDict]:
    """An improved-diffusion network with its config as diffusers can have it: timesteps count from 0."""
    try:
        diffusers_improved.check_expressible(network)
    except ValueError as error:
        raise UserError(f"{error}; choose safetensors or improved_diffusion") from error
    network, params = diffusers_improved.from_zero(network, weights.ema_params)
    config = config.copy_and_resolve_references()
    config.model.t_offset = network.t_offset
    return weights._replace(network=network, ema_params=params, params=params), config


def _write_diffusers(folder: Path, run: Run, card: dict) -> None:
    network: UNet | ImprovedUNet = torch_names.as_published(run.network)
    names: Any = diffusers_improved if isinstance(network, ImprovedUNet) else diffusers_names
    scheduler = diffusers_names.scheduler_config(schedule_spec(run.config), network.prediction)
    configs = {
        "model_index.json": {
            "_class_name": "DDIMPipeline",
            "_diffusers_version": diffusers_names.VERSION,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": names.unet_config(network),
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, value in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    weights = "unet/diffusion_pytorch_model.safetensors"
    state = torch_names.to_torch(run.ema_params)
    _save_safetensors(folder / weights, names.to_diffusers(state, network), card)
    sums = [f"{digest_of_file(folder / name)}  {name}\n" for name in sorted([*configs, weights])]
    (folder / SUMS).write_text("".join(sums), encoding="utf-8")
    front_matter = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
    if card["license"] != NOT_STATED:
        front_matter["license"] = card["license"]
    model_card.write_card(card, folder / "README.md", folder / CARD, front_matter=front_matter)


def _save_safetensors(path: Path, state: dict, card: dict) -> None:
    # transformers and diffusers require "format"; the digest covers all the rest.
    metadata = {"format": "pt", f"{METADATA_PREFIX}card": json.dumps(card)}
    metadata[f"{METADATA_PREFIX}sha256"] = sha256_of_tensors(state, metadata)
    try:
        save_file(state, path, metadata)
    except SafetensorError as error:
        # What is wrong with the tensors was checked before: this is the file system's error, "… (os error 28)".
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _ddim_checkpoint(run: Run, ema: dict) -> list:
    """The list that the DDIM code's training saves; its sampling reads the last entry."""
    params = {f"module.{name}": value for name, value in torch_names.to_torch(run.params).items()}
    # Adam without its moments, which start from zero; torch's own layout.
    lr = float(run.config.train.lr)
    adam = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
    group = {**adam, "params": list(range(len(params)))}
    return [params, {"state": {}, "param_groups": [group]}, 0, run.step, ema]
