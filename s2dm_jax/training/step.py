"""One training step: the state, the update that the papers' code makes, a compiled chunk of steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from s2dm_jax.config.build import build_objective, build_schedule
from s2dm_jax.data.batches import gather_batch, preprocess_batch, step_keys
from s2dm_jax.devices.hardware import compiler_options
from s2dm_jax.devices.sharding import replicated
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.objectives import Objective
from s2dm_jax.diffusion.schedule import NoiseSchedule, add_noise
from s2dm_jax.models import unet, variance_head
from s2dm_jax.models.unet import UNet
from s2dm_jax.workdir.state import TrainState

# L_simple is told for as many equal groups of levels.
_TIMESTEP_GROUPS = 10


def jit_step(step: Callable, **options: Any) -> jax.stages.Wrapped:
    """`jax.jit` for a function of (state, …): the state's memory is used again, XLA told what is fast."""
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(), **options)


def update_ema(ema: dict, params: dict, rate: float, step: jax.Array | np.ndarray, start: str) -> dict:
    """ema ← rate·ema + (1−rate)·params, with no warm-up.

    Args:
      ema, params: the average before and the weights after step number `step` (from 0).
      rate: decay.
      step: int [].
      start: "initial": the average starts at the initial weights (DDIM code); "first_step": at the weights
        after the first step (SA-DPM code).
    """
    decay = jnp.where(step == 0, 0.0, rate) if start == "first_step" else rate
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def update(
    apply: Callable[..., jax.Array],
    schedule: NoiseSchedule,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_rate: float,
    ema_start: str,
    state: TrainState,
    x0: jax.Array,
    draws: objectives.NoiseSample,
    dropout_key: jax.Array | None,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the published training loop: gradient of the mean loss, clipping, Adam, moving average.

    Args:
      apply: the network, (params, x [N,H,W,C], t [N], dropout_key) → ε [N,H,W,C].
      schedule, objective, optimizer, ema_rate, ema_start: what the step is made of.
      state: before the step.
      x0: images in [−1, 1], [B, H, W, C].
      draws: levels and noise of the step.
      dropout_key: None for no dropout.
      accumulate: number of equal parts of the batch that go through the network one after another.

    Returns:
      The state after the step, and scalars: "loss", the mean of each of its terms, "grad_norm" before
      clipping; and "levels", L_simple by groups of levels (`loss_by_timestep`).
    """

    def mean_loss(params, x0, draws, dropout_key):
        def eps_fn(x, t):
            return apply(params, x, t, dropout_key)

        per_example, terms = objectives.loss(eps_fn, schedule, objective, x0, draws)
        levels = loss_by_timestep(terms["simple"], draws.t, schedule.T)
        return per_example.mean(), {**jax.tree.map(jnp.mean, terms), "levels": levels}

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    if accumulate == 1:
        (loss, terms), grads = gradient(state.params, x0, draws, dropout_key)
    else:
        # Part i holds the images i, i + n, …, so that a batch split over devices stays in place.
        parts = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0), (x0, draws)
        )

        def add_part(total, part):
            i, (x0, draws) = part
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            (loss, terms), grads = gradient(state.params, x0, draws, key)
            return jax.tree.map(jnp.add, total, grads), (loss, terms)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        total, (loss, terms) = jax.lax.scan(add_part, zeros, (jnp.arange(accumulate), parts))
        grads = jax.tree.map(lambda g: g / accumulate, total)
        levels = terms.pop("levels").sum(0)
        loss, terms = loss.mean(), {**jax.tree.map(jnp.mean, terms), "levels": levels}

    metrics = {"loss": loss, **terms, "grad_norm": optax.tree.norm(grads)}
    return apply_gradient(optimizer, ema_rate, ema_start, state, grads), metrics


def apply_gradient(
    optimizer: optax.GradientTransformation, ema_rate: float, ema_start: str, state: TrainState, grads: dict
) -> TrainState:
    """The state after a step with this gradient: clipping, Adam, moving average."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, ema_rate, state.step, ema_start)
    return TrainState(state.step + 1, params, ema, opt_state)


def update_variance_head(
    network: UNet,
    kind: str,
    schedule: NoiseSchedule,
    optimizer: optax.GradientTransformation,
    ema_rate: float,
    ema_start: str,
    frozen: dict,
    state: TrainState,
    x0: jax.Array,
    draws: objectives.NoiseSample,
    dropout_key: jax.Array | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of SN- or NPR-DPM's training (Bao et al. 2022b): the head learns, the network stays.

    Args:
      network, frozen: the network and its weights.
      kind: "sn" or "npr".
      schedule, optimizer, ema_rate, ema_start: what the step is made of.
      state: of the head, before the step.
      x0: images in [−1, 1], [B, H, W, C].
      draws: levels and noise of the step.
      dropout_key: None for no dropout in the frozen network.

    Returns:
      The head's state after the step, and metrics as `update`'s; "simple" and "levels" are the network's.
    """
    noise = draws.noise[:, 0]
    x_t = add_noise(schedule, x0, draws.t, noise)

    def mean_loss(head_params):
        eps_hat, head = variance_head.apply(network, frozen, head_params, x_t, draws.t, dropout_key)
        simple = jnp.square(noise - eps_hat).sum((1, 2, 3))
        terms = {"simple": simple.mean(), "levels": loss_by_timestep(simple, draws.t, schedule.T)}
        return variance_head.loss(kind, noise, eps_hat, head).mean(), terms

    (loss, terms), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    metrics = {"loss": loss, **terms, "grad_norm": optax.tree.norm(grads)}
    return apply_gradient(optimizer, ema_rate, ema_start, state, grads), metrics


def loss_by_timestep(simple: jax.Array, t: jax.Array, T: int) -> jax.Array:
    """Sums of L_simple [B] and counts of examples in equal groups of levels: float32 [2, groups]."""
    groups = min(_TIMESTEP_GROUPS, T)
    member = t[:, None] * groups // T == jnp.arange(groups)
    return jnp.stack([jnp.where(member, simple[:, None], 0.0).sum(0), member.sum(0).astype(jnp.float32)])


def make_train_chunk(
    config: ConfigDict, network: UNet, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function of (state, images, rows [n, B], key, frozen) that does n steps in one `lax.scan`.

    Where images is None, rows are the images themselves, uint8 [n, B, H, W, C]. `frozen` are the weights of
    the network whose head is trained, or None.

    Returns:
      The function; it returns the new state and each metric as an array [n, …].
    """
    schedule, accumulate = build_schedule(config), config.train.grad_accum_steps
    # A head's levels and noise are drawn as plain training's.
    objective = objectives.paper() if config.variance_head.kind else build_objective(config)

    def apply(params, *inputs):
        if config.train.shard_state:
            # Weights that are split are put together for a step; their gradients are split by the update.
            params = jax.lax.with_sharding_constraint(params, replicated())
        return unet.apply(network, params, *inputs)

    def chunk(state, images, rows, key, frozen=None):
        def step(state, rows):
            draw_key, dropout_key, flip_key = step_keys(key, state.step)
            flip_key = flip_key if config.data.random_flip else None
            if images is None:
                x0 = preprocess_batch(rows, flip_key)
            else:
                x0 = gather_batch(images, rows, flip_key)
            draws = objectives.sample_noise(objective, draw_key, schedule.T, x0.shape)
            how = optimizer, config.train.ema_decay, config.train.ema_start
            if config.variance_head.kind:
                dropout_key = dropout_key if config.variance_head.dropout else None
                new, metrics = update_variance_head(
                    network, config.variance_head.kind, schedule, *how, frozen, state, x0, draws, dropout_key
                )
            else:
                dropout_key = dropout_key if network.dropout else None
                new, metrics = update(
                    apply, schedule, objective, *how, state, x0, draws, dropout_key, accumulate
                )
            if config.train.on_nonfinite == "skip":
                finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
                kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
                new = kept._replace(step=new.step)
            return new, metrics

        return jax.lax.scan(step, state, rows)

    return chunk
