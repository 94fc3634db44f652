"""Writes a network's weights as a run's folder, for PyTorch codes, for diffusers, as safetensors."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_outputs
from s2dm_jax.common.hashing import digest_of_file, sha256_of_tensors
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import from_json, to_json
from s2dm_jax.config.validate import check_config
from s2dm_jax.weights import diffusers_names, model_card, torch_names
from s2dm_jax.weights.model_card import CARD
from s2dm_jax.weights.read import OURS, SUMS, Weights, to_state
from s2dm_jax.weights.torch_pickle import write_torch
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.load import Run
from s2dm_jax.workdir.metadata import run_metadata
from s2dm_jax.workdir.state import TrainState, make_optimizer

# The source of images that nobody has named: sampling needs none.
UNKNOWN = "unknown"

# The published codes read every network's output as ε.
_EPSILON_ONLY = ("ddim", "sa_dpm", "pndm")


def infer_config(weights: Weights, *, given: ConfigDict | None = None, data: str = "") -> ConfigDict:
    """The config of a run that goes on from weights.

    Args:
      weights: as read.
      given: a config to train with, whose network must be that of the weights; by default the one in the
        weights' card, else the defaults.
      data: name of a data set, or the path of your own images; by default the data set of such images.

    Raises:
      UserError: for a network that this project has no config for, and where `given` has another one.
    """
    network = weights.network
    if network.in_channels != network.out_channels:
        raise UserError(
            f"conv_out.weight has {network.out_channels} channels, conv_in.weight {network.in_channels}: a "
            "network that predicts more than the noise cannot be used"
        )
    known = from_json(json.dumps(weights.card["config"])) if weights.card else None
    config = given or known or default_config()
    shape = (network.resolution, network.in_channels)
    if data or not (given or known):
        name = data or next((name for name, spec in DATASETS.items() if spec.shape == shape), UNKNOWN)
        if name in DATASETS:
            config.data.name, config.data.source = name, ""
        else:
            config.data.source = name
    if DATASETS[config.data.name].shape != shape or config.data.source:
        config.data.resolution, config.data.channels = shape
    fields = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resamp_with_conv")
    for name in fields:
        value = getattr(network, name)
        if given and config.model[name] != value:
            raise UserError(
                f"the weights are of a network with model.{name}={value}, but the config has "
                f"{config.model[name]}; give the config that suits"
            )
        config.model[name] = value
    stated = weights.card or weights.schedule
    if given and stated and given.model.prediction != network.prediction:
        raise UserError(
            f"the weights are of a network with model.prediction={network.prediction}, but the config has "
            f"{given.model.prediction}; give the config that suits"
        )
    if not given:
        config.model.prediction = network.prediction
    if known is None and given is None:
        # As the published configs have it.
        config.model.dropout = network.dropout or (0.0 if network.resolution >= 256 else 0.1)
    if weights.schedule:
        schedule = {"schedule": weights.schedule[0], "T": weights.schedule[1]}
        if given and config.diffusion.to_dict() != schedule:
            raise UserError(
                f"the weights are of a network for {schedule}, but the config has "
                f"{config.diffusion.to_dict()}; give the config that suits"
            )
        config.diffusion.update(schedule)
    # The average that comes with the weights is where it starts.
    config.train.ema_start = "initial"
    config.eval.nfe = tuple(nfe for nfe in config.eval.nfe if nfe <= config.diffusion.T) or (1,)
    check_config(config)
    return config


def write_weights(
    out: str,
    kind: str,
    weights: Weights,
    config: ConfigDict,
    *,
    source: dict,
    license: str = "",
) -> None:
    """Writes weights in one of `formats.FORMATS`, with a model card; nothing is overwritten or left
    half-written.

    Args:
      out: file or folder.
      kind: one of `formats.FORMATS`.
      weights, config: from `read.read_weights` and `infer_config`.
      source: where they come from (`model_card.make_card`), unless they have a card that tells it.
      license: for the card, in the place of what theirs has.

    Raises:
      UserError: if something is in the way, or `out` cannot be written.
    """
    model = config.model
    if kind in _EPSILON_ONLY and model.prediction != "epsilon":
        raise UserError(
            f"the format {kind} is for networks that predict epsilon, but config.model.prediction="
            f"{model.prediction!r}; choose safetensors or diffusers"
        )
    network = dataclasses.replace(weights.network, dropout=model.dropout, prediction=model.prediction)
    run = Run(config, network, weights.ema_params, weights.step, weights.params)
    known = weights.card or {"license": "", "source": source, "metrics": None}
    card = model_card.make_card(
        run, license=license or known["license"], source=known["source"], metrics=known["metrics"]
    )
    path = Path(out)
    if kind in ("workdir", "diffusers"):
        with atomic_outputs(path) as (folder,):
            folder.mkdir()
            if kind == "workdir":
                _write_workdir(folder, run, card)
            else:
                _write_diffusers(folder, run, card)
        return
    suffix = ".safetensors" if kind == "safetensors" else ".pth"
    if path.suffix != suffix:
        raise UserError(f"{out} must end in {suffix}, to hold the format {kind}")
    with atomic_outputs(path, *model_card.card_paths(path)) as (file, *card_files):
        state = to_state(weights.ema_params)
        if kind == "safetensors":
            _save_safetensors(file, state, card)
        elif kind == "ddim":
            write_torch(file, _ddim_checkpoint(run, state), json.dumps(card))
        else:
            prefix = "module." if kind == "sa_dpm" else ""
            state = {f"{prefix}{name}": value for name, value in state.items()}
            write_torch(file, state, json.dumps(card))
        model_card.write_card(card, *card_files)


def _write_workdir(folder: Path, run: Run, card: dict) -> None:
    optimizer = make_optimizer(run.config.train.lr, run.config.train.grad_clip)
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, run.params))
    state = TrainState(np.asarray(run.step, np.int32), run.params, run.ema_params, opt_state)
    (folder / "config.json").write_text(to_json(run.config), encoding="utf-8")
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    manager = checkpoint.open_checkpoints(folder, run.config.train.max_to_keep)
    checkpoint.save(manager, run.step, jax.device_put(state), run_metadata(run.config))
    checkpoint.close(manager)


def _write_diffusers(folder: Path, run: Run, card: dict) -> None:
    network = torch_names.as_unet(run.network)
    state = diffusers_names.to_diffusers(to_state(run.ema_params), network)
    diffusion = run.config.diffusion
    configs = {
        "model_index.json": {
            "_class_name": "DDIMPipeline",
            "_diffusers_version": diffusers_names.VERSION,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": diffusers_names.unet_config(network),
        "scheduler/scheduler_config.json": diffusers_names.scheduler_config(
            diffusion.schedule, diffusion.T, network.prediction
        ),
    }
    for name, value in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    _save_safetensors(weights, state, card)
    names = sorted([*configs, weights.relative_to(folder).as_posix()])
    (folder / SUMS).write_text(
        "".join(f"{digest_of_file(folder / name)}  {name}\n" for name in names), encoding="utf-8"
    )
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    front_matter = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation"}
    if card["license"] != "not stated":
        front_matter["license"] = card["license"]
    (folder / "README.md").write_text(model_card.card_to_markdown(card, front_matter), encoding="utf-8")


def _save_safetensors(path: Path, state: dict, card: dict) -> None:
    # transformers and diffusers want "format"; the digest covers all the rest.
    state = {name: np.ascontiguousarray(value) for name, value in state.items()}
    metadata = {"format": "pt", f"{OURS}card": json.dumps(card)}
    metadata[f"{OURS}sha256"] = sha256_of_tensors(state, metadata)
    save_file(state, path, metadata)


def _ddim_checkpoint(run: Run, ema: dict) -> list:
    """The list that the DDIM code's training saves and its sampling reads the last entry of."""
    params = {f"module.{name}": value for name, value in to_state(run.params).items()}
    # Adam without its moments, which start afresh; torch's own layout.
    group = {
        "lr": float(run.config.train.lr),
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "params": list(range(len(params))),
    }
    return [params, {"state": {}, "param_groups": [group]}, 0, run.step, ema]
