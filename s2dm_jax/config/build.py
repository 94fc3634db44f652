"""Builds the objects that a config names; imports jax only when called."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.config.defaults import FIELDS, image_shape
from s2dm_jax.diffusion.betas import ScheduleSpec, log_snr, schedule_betas
from s2dm_jax.models.network import network_class

if TYPE_CHECKING:
    from s2dm_jax.diffusion.objectives import Objective
    from s2dm_jax.diffusion.schedule import NoiseSchedule
    from s2dm_jax.models.network import Network


def schedule_spec(config: ConfigDict) -> ScheduleSpec:
    """The `ScheduleSpec` in the group `diffusion` of a config."""
    return ScheduleSpec(**config.diffusion)


def schedule_fields(config: ConfigDict) -> dict:
    """The fields of the group `diffusion` that are set, as results record them."""
    return {name: value for name, value in config.diffusion.items() if value is not None}


def schedule_ends(fields: Mapping) -> str:
    """The ends of the betas that are set, as the end of a sentence: ", beta_start 0.0001, beta_end 0.02"."""
    ends = {name: fields.get(name) for name in ("beta_start", "beta_end")}
    return "".join(f", {name} {value:g}" for name, value in ends.items() if value is not None)


def log_snr_of(config: ConfigDict) -> np.ndarray:
    """λ at each timestep of the config's schedule, float64 [T]; imports no jax."""
    return log_snr(schedule_betas(schedule_spec(config)))


def build_schedule(config: ConfigDict) -> "NoiseSchedule":
    """The noise schedule that the config names."""
    from s2dm_jax.diffusion.schedule import NoiseSchedule

    return NoiseSchedule(schedule_betas(schedule_spec(config)))


def build_objective(config: ConfigDict) -> "Objective":
    """The objective that the config names: its preset with the options that are not None."""
    from s2dm_jax.diffusion.objectives import PRESETS

    values = {name: value for name, value in config.loss.items() if name != "preset" and value is not None}
    return PRESETS[config.loss.preset](**values)


def network_of(config: ConfigDict, dtype: str) -> "Network":
    """The network that the group `model` of a config names; imports no jax.

    Raises:
      ValueError: for fields that do not fit together; the message begins with the name of one.
    """
    network = network_class(config.model.name)
    resolution, channels = image_shape(config)
    stated = {name: value for name, value in config.model.items() if value is not None}
    values = {"resolution": resolution, "in_channels": channels, "out_channels": channels, **stated}
    names = {field.name for field in dataclasses.fields(network)}
    for name in stated.keys() - names:
        if FIELDS[f"model.{name}"].default is None:
            raise ValueError(f"{name}={stated[name]!r} is not a field of {network.__name__}; leave it None")
    if "prediction" not in names and config.model.prediction != "epsilon":
        raise ValueError(
            f"prediction={config.model.prediction!r} is not a field of {network.__name__}, which predicts epsilon; "
            "choose epsilon"
        )
    return network(**{name: value for name, value in values.items() if name in names} | {"dtype": dtype})


def build_network(config: ConfigDict) -> "Network":
    """The network that the config names; for dtype "auto" its activations are as this machine's devices prefer."""
    import jax

    dtype = config.model.dtype
    if dtype == "auto":
        # Convolutions in bfloat16 are slower than in float32 on CPU.
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return network_of(config, dtype)
