"""Writes a network's weights as a run's folder, for PyTorch codes, for diffusers, as safetensors."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_outputs, user_path
from s2dm_jax.common.hashing import digest_of_file, sha256_of_tensors
from s2dm_jax.config.build import schedule_fields, schedule_spec
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.ema import extra_names
from s2dm_jax.config.io import from_json, to_json
from s2dm_jax.config.validate import check_config
from s2dm_jax.data.sources import UNKNOWN
from s2dm_jax.diffusion.betas import same_betas
from s2dm_jax.weights import diffusers_names, model_card, torch_names
from s2dm_jax.weights.model_card import CARD, NOT_STATED
from s2dm_jax.weights.read import METADATA_PREFIX, SUMS, Weights
from s2dm_jax.weights.torch_pickle import write_torch
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.load import Run
from s2dm_jax.workdir.metadata import run_metadata
from s2dm_jax.workdir.state import build_optimizer, initial_loss_scale, new_state

# The published codes read every network's output as ε.
_EPSILON_ONLY = ("ddim", "sa_dpm", "pndm")
# The config's group `model` has them under the same names.
_NETWORK_FIELDS = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resamp_with_conv")


def infer_config(weights: Weights, *, given: ConfigDict | None = None, data: str = "") -> ConfigDict:
    """The config of a run that continues from weights: the given one, else that of their card, else the defaults.

    Args:
      given: a config with the weights' network and schedule; others are a UserError.
      data: name of a dataset, or the path of your own images; by default the one dataset of images of that
        shape, or `UNKNOWN`.
    """
    network = weights.network
    if network.in_channels != network.out_channels:
        raise UserError(
            f"conv_out.weight has {network.out_channels} channels, conv_in.weight {network.in_channels}: a "
            "network that predicts more than the noise cannot be used"
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
        config.model.update({name: getattr(network, name) for name in (*_NETWORK_FIELDS, "prediction")})
        if not inherited:
            # As the published configs have it.
            config.model.dropout = network.dropout or (0.0 if network.resolution >= 256 else 0.1)
        if weights.schedule:
            config.diffusion.update(weights.schedule._asdict())
    # The EMA that comes with the weights is where all start.
    config.train.ema_start = "initial"
    config.eval.nfe = tuple(nfe for nfe in config.eval.nfe if nfe <= config.diffusion.T) or (1,)
    check_config(config, trained=weights.schedule is not None)
    return config


def _check_network(config: ConfigDict, weights: Weights) -> None:
    """UserError where the config has another network or schedule than the weights state."""
    # A file without card and schedule leaves open what the network predicts.
    names = (*_NETWORK_FIELDS, "prediction") if weights.model_card or weights.schedule else _NETWORK_FIELDS
    for name in names:
        value = getattr(weights.network, name)
        if config.model[name] != value:
            raise UserError(
                f"the weights are of a network with model.{name}={value}, but the config has "
                f"{config.model[name]}; give the config that suits"
            )
    if weights.schedule and not same_betas(weights.schedule, schedule_spec(config)):
        stated = {name: value for name, value in weights.schedule._asdict().items() if value is not None}
        raise UserError(
            f"the weights are of a network for {stated}, but the config has {schedule_fields(config)}; give the config "
            "that suits"
        )


def write_weights(
    out: str, kind: str, weights: Weights, config: ConfigDict, *, source: dict, license: str = ""
) -> None:
    """Writes weights in one of `formats.FORMATS`, atomically, with a model card; overwrites nothing.

    Args:
      out: file or folder.
      kind: one of `formats.FORMATS`.
      weights, config: from `read.read_weights` and `infer_config`.
      source: where they come from (`model_card.make_card`), for weights without a card of their own.
      license: for the card, instead of the one in theirs.

    Raises:
      UserError: if `out` exists or cannot be written, or the format is not for this network.
    """
    model = config.model
    if kind in _EPSILON_ONLY and model.prediction != "epsilon":
        raise UserError(
            f"the format {kind} is for networks that predict epsilon, but config.model.prediction="
            f"{model.prediction!r}; choose safetensors or diffusers"
        )
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
    suffix = ".safetensors" if kind == "safetensors" else ".pth"
    if path.suffix != suffix:
        raise UserError(f"{out} must end in {suffix}, to hold the format {kind}")
    with atomic_outputs(path, *model_card.card_paths(path)) as (file, *card_files):
        state = torch_names.to_torch(weights.ema_params)
        if kind == "safetensors":
            _save_safetensors(file, state, card)
        elif kind == "ddim":
            write_torch(file, _ddim_checkpoint(run, state), json.dumps(card))
        else:
            prefix = "module." if kind == "sa_dpm" else ""
            write_torch(file, {f"{prefix}{name}": value for name, value in state.items()}, json.dumps(card))
        model_card.write_card(card, *card_files)


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


def _write_diffusers(folder: Path, run: Run, card: dict) -> None:
    network = torch_names.as_unet(run.network)
    scheduler = diffusers_names.scheduler_config(schedule_spec(run.config), network.prediction)
    configs = {
        "model_index.json": {
            "_class_name": "DDIMPipeline",
            "_diffusers_version": diffusers_names.VERSION,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": diffusers_names.unet_config(network),
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, value in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    weights = "unet/diffusion_pytorch_model.safetensors"
    state = torch_names.to_torch(run.ema_params)
    _save_safetensors(folder / weights, diffusers_names.to_diffusers(state, network), card)
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
