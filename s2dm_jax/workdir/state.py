"""The training state: weights, EMA, optimizer state, step."""

from typing import NamedTuple

import jax
import numpy as np
import optax

from s2dm_jax.models.network import Network


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 [], number of steps done.
      params, ema_params: nested dicts of float32 arrays, the weights and their EMA.
      opt_state: of the optimizer.
    """

    step: jax.Array | np.ndarray
    params: dict
    ema_params: dict
    opt_state: optax.OptState


def make_optimizer(lr: float, grad_clip: float) -> optax.GradientTransformation:
    """Clipping to the global norm `grad_clip` (0: none), and Adam as in the DDIM code: betas 0.9, 0.999, eps 1e-8."""
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, optax.adam(lr))


def init_state(network: Network, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; the EMA starts at the initial weights."""
    return new_state(network.init(seed), optimizer)


def new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from initial weights."""
    # Adam starts from zeros; made by numpy, because compiling the optimizer's own init takes a second.
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params))
    # Steps donate their buffers, so the EMA must not share them with the weights.
    ema = jax.tree.map(np.copy, params)
    return jax.device_put(TrainState(np.zeros((), np.int32), params, ema, opt_state))
