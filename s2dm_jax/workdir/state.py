"""The training state: weights, EMA, optimizer state, step, loss scale."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from s2dm_jax.config.defaults import decay_steps, fixed_loss_scale
from s2dm_jax.models.network import Network

# PyTorch's and Flax's default.
_INITIAL_LOSS_SCALE = 65536.0


class LossScale(NamedTuple):
    """A dynamic loss scale (`training/loss_scale.py`).

    Attributes:
      scale: float32 [], the factor on the loss.
      finite_steps: int32 [], number of steps without an overflow since it last changed.
    """

    scale: jax.Array | np.ndarray
    finite_steps: jax.Array | np.ndarray


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 [], number of steps done.
      params, ema_params: nested dicts of float32 arrays, the weights and their EMA.
      opt_state: of the optimizer.
      loss_scale: None unless it is dynamic.
      ema_extra: further EMAs by name (`config.ema.extra_names`), each like `ema_params`.
    """

    step: jax.Array | np.ndarray
    params: dict
    ema_params: dict
    opt_state: optax.OptState
    loss_scale: LossScale | None = None
    ema_extra: dict = {}  # noqa: RUF012


def make_optimizer(
    lr: float | optax.Schedule,
    grad_clip: float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Clipping to the global norm `grad_clip` (0: none), and Adam, by default with the betas and ε of the DDIM code.

    With a `weight_decay` it is AdamW (Loshchilov & Hutter 2019), which also subtracts lr·weight_decay of each weight.
    """
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    if weight_decay:
        return optax.chain(clip, optax.adamw(lr, b1, b2, eps, weight_decay=weight_decay))
    return optax.chain(clip, optax.adam(lr, b1, b2, eps))


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer that a checked config stands for."""
    train = config.train
    adam = {"b1": train.adam_b1, "b2": train.adam_b2, "eps": train.adam_eps}
    return make_optimizer(learning_rate(config), train.grad_clip, **adam, weight_decay=train.weight_decay)


def learning_rate(config: ConfigDict) -> float | optax.Schedule:
    """`train.lr`, or with a warm-up or decay the learning rate as a function of the number of updates before.

    The warm-up is lr·n/W for n < W; then cosine and linear decay go from lr at n = W to `lr_end` at n = D, and stay
    there: lr_end + (lr − lr_end)·(1 + cos(πf))/2 and lr_end + (lr − lr_end)·(1 − f) with f = (n − W)/(D − W).
    """
    train = config.train
    lr, warmup = train.lr, train.warmup_steps
    span = decay_steps(config) - warmup
    if train.lr_schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, span, alpha=train.lr_end / lr)
    elif train.lr_schedule == "linear":
        after = optax.linear_schedule(lr, train.lr_end, span)
    elif warmup:
        after = optax.constant_schedule(lr)
    else:
        return lr
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup]) if warmup else after


def num_updates(opt_state: optax.OptState) -> jax.Array | np.ndarray | int:
    """Adam's count: int32 [], the number of updates, without steps that were skipped; 0 for another optimizer."""
    # With a schedule the learning rate has an equal "count" of its own.
    adam = optax.tree.get(opt_state, "ScaleByAdamState")
    return 0 if adam is None else adam.count


def initial_loss_scale(config: ConfigDict) -> LossScale | None:
    """The loss scale before the first step, or None if it is not dynamic."""
    if fixed_loss_scale(config) is not None:
        return None
    return LossScale(np.full((), _INITIAL_LOSS_SCALE, np.float32), np.zeros((), np.int32))


def init_state(
    network: Network,
    optimizer: optax.GradientTransformation,
    seed: int,
    loss_scale: LossScale | None = None,
    ema_extra: Sequence[str] = (),
) -> TrainState:
    """The state before the first step; the EMAs, those of the names `ema_extra` too, start at the initial weights."""
    return new_state(network.init(seed), optimizer, loss_scale, ema_extra)


def new_state(
    params: dict,
    optimizer: optax.GradientTransformation,
    loss_scale: LossScale | None = None,
    ema_extra: Sequence[str] = (),
) -> TrainState:
    """The state before the first step, from initial weights."""
    # Adam starts from zeros; made by numpy, because compiling the optimizer's own init takes a second.
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params))
    # Steps donate their buffers, so the EMAs must not share them with the weights.
    ema, *extra = (jax.tree.map(np.copy, params) for _ in ("", *ema_extra))
    extras = dict(zip(ema_extra, extra, strict=True))
    return jax.device_put(TrainState(np.zeros((), np.int32), params, ema, opt_state, loss_scale, extras))
