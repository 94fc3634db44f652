"""One training step: the update that the papers' code makes, and a compiled chunk of steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from s2dm_jax.config.build import build_objective, build_schedule
from s2dm_jax.config.defaults import fixed_loss_scale
from s2dm_jax.data.batches import preprocess_batch, step_keys
from s2dm_jax.devices.hardware import compiler_options
from s2dm_jax.devices.sharding import replicated
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.objectives import NoiseSample, Objective
from s2dm_jax.diffusion.schedule import NoiseSchedule, add_noise
from s2dm_jax.models import variance_head
from s2dm_jax.models.network import Network
from s2dm_jax.training.averages import Averages, averages_of, update_averages
from s2dm_jax.training.loss_scale import Factor, next_loss_scale, scale_loss, unscale_gradient
from s2dm_jax.workdir.state import TrainState, learning_rate, num_updates

# L_simple is logged for as many equal groups of timesteps.
_TIMESTEP_GROUPS = 10

Metrics = dict[str, jax.Array]
State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The components of every step of a run.

    Attributes:
      network: what is trained, or what is frozen while its variance head is trained.
      schedule: the forward process.
      objective: what is minimised.
      optimizer: clipping and Adam or AdamW (`state.build_optimizer`).
      averages: the EMAs of the weights.
      grad_accum_steps: number of equal parts of a batch that go through the network one after another.
      shard_state: whether weights, EMA and moments are split over the devices.
      variance_head: kind of the variance head that is trained, "" for the network itself.
      loss_scale: factor on the loss if the state has no dynamic one.
      loss_scale_growth_interval: number of steps without an overflow after which a dynamic one doubles.
    """

    network: Network
    schedule: NoiseSchedule
    objective: Objective
    optimizer: optax.GradientTransformation
    averages: Averages
    grad_accum_steps: int = 1
    shard_state: bool = False
    variance_head: str = ""
    loss_scale: float = 1.0
    loss_scale_growth_interval: int = 2000


def step_config(config: ConfigDict, network: Network, optimizer: optax.GradientTransformation) -> StepConfig:
    """The `StepConfig` that a checked config stands for."""
    kind = config.variance_head.kind
    # A variance head's timesteps and noise are sampled as plain training's.
    objective = objectives.paper() if kind else build_objective(config)
    fields = ("grad_accum_steps", "shard_state", "loss_scale_growth_interval")
    options = {name: config.train[name] for name in fields} | {"loss_scale": fixed_loss_scale(config) or 1.0}
    fixed = network, build_schedule(config), objective, optimizer, averages_of(config.train)
    return StepConfig(*fixed, variance_head=kind, **options)


def jit_step(step: Callable, **options: Any) -> jax.stages.Wrapped:
    """`jax.jit` for a function of (state, …) that reuses the state's memory, with the fastest compiler options."""
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(), **options)


def update(
    config: StepConfig, state: TrainState, x0: jax.Array, noise_sample: NoiseSample, dropout_key: jax.Array | None
) -> tuple[TrainState, Metrics]:
    """One step of the published training loop: gradient of the mean loss, clipping, Adam, EMA.

    Args:
      config: the components of the step.
      state: before the step.
      x0: images in [−1, 1], [B, H, W, C].
      noise_sample: timesteps and noise of the step.
      dropout_key: None for no dropout.

    Returns:
      The state after the step, and scalars: "loss", "loss_TERM" for the mean of each of its terms, "grad_norm" before
      clipping, "loss_scale" if it is dynamic; and "by_timestep", L_simple by groups of timesteps
      (`loss_by_timestep`).
    """
    # Forward and backward.
    gradient = _gradient if config.grad_accum_steps == 1 else _accumulated_gradient
    metrics, grads = gradient(config, state, x0, noise_sample, dropout_key)
    # Clipping, Adam, EMA.
    return _apply_scaled_gradient(config, state, metrics, grads)


def _loss_factor(config: StepConfig, state: TrainState) -> Factor:
    return config.loss_scale if state.loss_scale is None else state.loss_scale.scale


def _gradient(
    config: StepConfig, state: TrainState, x0: jax.Array, noise_sample: NoiseSample, key: jax.Array | None
) -> tuple[Metrics, dict]:
    """Metrics of a batch, and the gradient of its mean loss times the loss scale."""

    def mean_loss(params):
        if config.shard_state:
            # Weights that are split are gathered for a step; their gradients are split by the update.
            params = jax.lax.with_sharding_constraint(params, replicated())
        eps_fn = config.network.eps_fn(params, config.schedule, key)
        per_example, terms = objectives.loss(eps_fn, config.schedule, config.objective, x0, noise_sample)  # [B] each
        by_timestep = loss_by_timestep(terms["simple"], noise_sample.t, config.schedule.T)
        means = {f"loss_{name}": term.mean() for name, term in terms.items()}
        loss = per_example.mean()
        metrics = {"loss": loss, **means, "by_timestep": by_timestep}
        return scale_loss(loss, _loss_factor(config, state)), metrics

    (_, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    return metrics, grads


def _accumulated_gradient(
    config: StepConfig, state: TrainState, x0: jax.Array, noise_sample: NoiseSample, key: jax.Array | None
) -> tuple[Metrics, dict]:
    """`_gradient` with the parts of the batch one after another."""
    n = config.grad_accum_steps

    def split(a):  # [B, …] → [n, B/n, …]
        # Part i holds the images i, i + n, …, so that a batch split over devices stays in place.
        return jnp.moveaxis(a.reshape(-1, n, *a.shape[1:]), 1, 0)

    def add_part(total, part):
        i, (x0, noise_sample) = part
        part_key = None if key is None else jax.random.fold_in(key, i)
        metrics, grads = _gradient(config, state, x0, noise_sample, part_key)
        return jax.tree.map(jnp.add, total, grads), metrics

    parts = jnp.arange(n), jax.tree.map(split, (x0, noise_sample))
    total, metrics = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, state.params), parts)
    by_timestep = metrics.pop("by_timestep").sum(0)  # [n, 2, groups] → [2, groups]
    grads = jax.tree.map(lambda g: g / n, total)
    return {**jax.tree.map(jnp.mean, metrics), "by_timestep": by_timestep}, grads


def _apply_scaled_gradient(
    config: StepConfig, state: TrainState, metrics: Metrics, scaled: dict
) -> tuple[TrainState, Metrics]:
    """`apply_gradient` with the gradient of a scaled loss, and the metrics with its norm.

    A step that overflows, whose loss is finite and whose gradient is not, changes only the step count and a
    dynamic loss scale. If the loss is not finite, the scale is not to blame and stays the same.
    """
    grads = unscale_gradient(scaled, _loss_factor(config, state))
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
    new = apply_gradient(config, state, grads)
    if state.loss_scale is None:
        return new, metrics
    finite = jnp.isfinite(metrics["grad_norm"])
    after = next_loss_scale(state.loss_scale, ~finite, config.loss_scale_growth_interval)
    loss_scale = _where(jnp.isfinite(metrics["loss"]), after, state.loss_scale)
    new = _where(finite, new, state._replace(step=new.step))._replace(loss_scale=loss_scale)
    return new, {**metrics, "loss_scale": jnp.asarray(loss_scale.scale)}


def _where(condition: jax.Array, yes: State, no: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def apply_gradient(config: StepConfig, state: TrainState, grads: dict) -> TrainState:
    """The state after a step with this gradient: clipping, Adam, EMAs."""
    updates, opt_state = config.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    emas = state.ema_params, state.ema_extra
    ema_params, ema_extra = update_averages(config.averages, *emas, params, num_updates(state.opt_state))
    new = {"params": params, "ema_params": ema_params, "opt_state": opt_state, "ema_extra": ema_extra}
    return state._replace(step=state.step + 1, **new)


def update_variance_head(
    config: StepConfig,
    base_params: dict,
    state: TrainState,
    x0: jax.Array,
    noise_sample: NoiseSample,
    dropout_key: jax.Array | None,
) -> tuple[TrainState, Metrics]:
    """One step of SN- or NPR-DPM's training (Bao et al. 2022b): as `update`, but of the variance head.

    `base_params` are the weights of the frozen network, to which "loss_simple" and "by_timestep" belong.
    """
    schedule, noise, t = config.schedule, noise_sample.noise[:, 0], noise_sample.t  # noise [B, H, W, C]
    x_t = add_noise(schedule, x0, t, noise)

    def mean_loss(head_params):
        eps_hat, variance = variance_head.apply(config.network, base_params, head_params, schedule, x_t, t, dropout_key)
        simple = jnp.square(noise - eps_hat).sum((1, 2, 3))  # [B]
        by_timestep = loss_by_timestep(simple, t, schedule.T)
        loss = variance_head.loss(config.variance_head, noise, eps_hat, variance).mean()
        metrics = {"loss": loss, "loss_simple": simple.mean(), "by_timestep": by_timestep}
        return scale_loss(loss, _loss_factor(config, state)), metrics

    (_, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    return _apply_scaled_gradient(config, state, metrics, grads)


def loss_by_timestep(simple: jax.Array, t: jax.Array, T: int) -> jax.Array:
    """Sums of L_simple [B] and counts of examples in equal groups of timesteps: float32 [2, groups]."""
    groups = min(_TIMESTEP_GROUPS, T)
    member = t[:, None] * groups // T == jnp.arange(groups)  # [B, groups]
    return jnp.stack([jnp.where(member, simple[:, None], 0.0).sum(0), member.sum(0).astype(jnp.float32)])


def make_train_chunk(
    config: ConfigDict, network: Network, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A function of (state, images, rows [n, B], key, base_params, span) that does steps in one loop.

    If images is None, rows are the images themselves, uint8 [n, B, H, W, C]. `base_params` are the weights of the
    network whose variance head is trained, or None. `span`, int32 [2], are the first row of a step and the one behind
    the last: one compiled program does any number of steps up to n; by default all n. It returns the new state and
    each metric as an array [n, …], which is 0 in the rows without a step.
    """
    fixed = step_config(config, network, optimizer)
    random_flip, head_dropout = config.data.random_flip, config.variance_head.dropout
    skip_nonfinite = config.train.on_nonfinite == "skip"
    rate = learning_rate(config)

    def chunk(state, images, rows, key, base_params=None, span=None):
        # Traced once, for the shapes of the metrics and for the loop.
        @functools.partial(jax.jit, inline=True)
        def step(state, rows):
            # The batch, and everything random: functions of (seed, step).
            noise_key, dropout_key, flip_key = step_keys(key, state.step)
            flip_key = flip_key if random_flip else None
            x0 = preprocess_batch(rows if images is None else images[rows], flip_key)
            sample = objectives.sample_noise(fixed.objective, noise_key, fixed.schedule.T, x0.shape)
            # The update.
            if fixed.variance_head:
                dropout_key = dropout_key if head_dropout else None
                new, metrics = update_variance_head(fixed, base_params, state, x0, sample, dropout_key)
            else:
                new, metrics = update(fixed, state, x0, sample, dropout_key)
            if callable(rate):
                # Skipped steps are no updates.
                metrics["learning_rate"] = jnp.float32(rate(num_updates(state.opt_state)))
            # A step whose loss is not finite changes nothing but the count of steps.
            if skip_nonfinite:
                finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
                new = _where(finite, new, state._replace(step=new.step, loss_scale=new.loss_scale))
            return new, metrics

        def do_row(i, carry):
            state, metrics = carry
            state, of_step = step(state, jax.lax.dynamic_index_in_dim(rows, i, keepdims=False))
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return state, jax.tree.map(put, metrics, of_step)

        _, shapes = jax.eval_shape(step, state, rows[0])
        metrics = jax.tree.map(lambda leaf: jnp.zeros((len(rows), *leaf.shape), leaf.dtype), shapes)
        first, end = (0, len(rows)) if span is None else span
        return jax.lax.fori_loop(first, end, do_row, (state, metrics))

    return chunk
