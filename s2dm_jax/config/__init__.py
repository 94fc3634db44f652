"""Configs as plain data: what a config file imports."""

from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import load_config
from s2dm_jax.config.presets import HEADS, set_head, set_objective
from s2dm_jax.config.validate import check_config

__all__ = ["HEADS", "check_config", "default_config", "load_config", "set_head", "set_objective"]
