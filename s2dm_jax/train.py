"""Training, from top to bottom: the state, one step, a compiled chunk of steps, the loop.

Nothing about a run is hidden: batch order, flips, levels, noise and dropout are functions of (seed, step),
so that a run resumed from a checkpoint goes on exactly as it would have.
"""

import functools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from s2dm_jax import checkpoint, losses, unet
from s2dm_jax.config import (
    UserError,
    build_network,
    build_objective,
    build_schedule,
    data_label,
    to_json,
)
from s2dm_jax.data import batch_at, load_dataset
from s2dm_jax.evaluate import evaluate, results_table
from s2dm_jax.feed import make_feed
from s2dm_jax.losses import Objective
from s2dm_jax.parallel import copy_to_all, on_all
from s2dm_jax.report import image_grid, save_png
from s2dm_jax.runs import check_same_images, prepare_workdir
from s2dm_jax.sample import configure, how, sample_batches
from s2dm_jax.schedule import NoiseSchedule
from s2dm_jax.telemetry import MetricWriter, Progress, describe
from s2dm_jax.unet import UNetConfig


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 [], number of steps done.
      params, ema: nested dicts of float32 arrays, the weights and their moving average.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def make_optimizer(lr: float, grad_clip: float) -> optax.GradientTransformation:
    """Global-norm clipping and Adam as in the DDIM code: betas 0.9, 0.999, eps 1e-8, constant lr.

    Args:
      lr: learning rate.
      grad_clip: largest global norm of the gradient; 0 for no clipping.
    """
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, optax.adam(lr))


def init_state(network: UNetConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; the moving average starts at the initial weights."""
    params = unet.init_params(network, seed)
    # Adam starts from zeros; made by numpy, because compiling the optimizer's own init takes a second.
    opt_state = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params)
    )
    # Steps donate their buffers, so the average must not share them with the weights.
    ema = jax.tree.map(np.copy, params)
    return jax.device_put(TrainState(np.zeros((), np.int32), params, ema, opt_state))


def update_ema(ema: dict, params: dict, rate: float, step: jax.Array, start: str) -> dict:
    """ema ← rate·ema + (1−rate)·params, with no warm-up.

    Args:
      ema, params: the average before and the weights after step number `step` (from 0).
      rate: decay.
      step: int [].
      start: "initial": the average starts at the initial weights (DDIM code); "first_step": at the weights
        after the first step (SA-DPM code).
    """
    if start == "first_step":
        rate = jnp.where(step == 0, 0.0, rate)
    return jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)


def update(
    apply: Callable[..., jax.Array],
    schedule: NoiseSchedule,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_rate: float,
    ema_start: str,
    state: TrainState,
    x0: jax.Array,
    draws: losses.Draws,
    dropout_key: jax.Array | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the published training loop: gradient of the mean loss, clipping, Adam, moving average.

    Args:
      apply: the network, (params, x [N,H,W,C], t [N], dropout_key) → ε [N,H,W,C].
      schedule, objective, optimizer, ema_rate, ema_start: what the step is made of.
      state: before the step.
      x0: images in [−1, 1], [B, H, W, C].
      draws: levels and noise of the step.
      dropout_key: None for no dropout.

    Returns:
      The state after the step, and scalars: "loss", the mean of each of its terms, "grad_norm" before
      clipping.
    """

    def mean_loss(params):
        def eps_fn(x, t):
            return apply(params, x, t, dropout_key)

        per_example, terms = losses.loss(eps_fn, schedule, objective, x0, draws)
        return per_example.mean(), jax.tree.map(jnp.mean, terms)

    (loss, terms), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, ema_rate, state.step, ema_start)
    metrics = {"loss": loss, **terms, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def make_chunk(
    config: ConfigDict, network: UNetConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function of (state, images, rows [n, B], key) that does n steps in one `lax.scan`.

    Where images is None, rows are the images themselves, uint8 [n, B, H, W, C].

    Returns:
      The function; it returns the new state and each metric as an array [n].
    """
    schedule, objective = build_schedule(config), build_objective(config)

    def chunk(state, images, rows, key):
        def step(state, rows):
            draw_key, dropout_key, flip_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
            x0 = batch_at(images, rows, flip_key if config.data.random_flip else None)
            return update(
                functools.partial(unet.apply, network),
                schedule,
                objective,
                optimizer,
                config.train.ema_rate,
                config.train.ema_start,
                state,
                x0,
                losses.draw(objective, draw_key, schedule.T, x0.shape),
                dropout_key if network.dropout else None,
            )

        return jax.lax.scan(step, state, rows)

    return chunk


def train(config: ConfigDict, workdir: str) -> None:
    """Trains as `config` says, resuming what `workdir` holds, and evaluates the result.

    Leaves in `workdir`: config.json, parameters.txt, metrics.jsonl, tensorboard/, samples/, checkpoints/,
    results.json and results.md.

    Args:
      config: a checked config.
      workdir: folder of the run, created if it is missing.

    Raises:
      UserError: if the folder cannot be written to, or the loss stops being finite.
    """
    workdir = prepare_workdir(workdir, config)
    finished = _finished_results(workdir, config)
    if finished:
        print(f"{workdir} is finished: {config.train.steps:,} steps trained and evaluated\n")
        print(results_table(finished))
        return
    (workdir / "config.json").write_text(to_json(config))
    (workdir / "samples").mkdir(exist_ok=True)
    data = load_dataset(config)
    check_same_images(workdir, data.digest)
    network = build_network(config)
    schedule = build_schedule(config)
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    steps, batch_size = config.train.steps, config.train.batch_size
    if batch_size % jax.device_count():
        raise UserError(
            f"config.train.batch_size={batch_size} must be a multiple of the {jax.device_count()} devices"
        )

    state = init_state(network, optimizer, config.train.seed)
    manager = checkpoint.open_checkpoints(workdir, config.train.keep_checkpoints)
    state = copy_to_all(checkpoint.restore_latest(manager, state) or state)
    step = int(state.step)
    if step > steps:
        raise UserError(
            f"config.train.steps={steps} is less than the {step} steps that {workdir} has trained"
        )
    (workdir / "parameters.txt").write_text(parameter_overview.get_parameter_overview(state.params) + "\n")
    print(describe(config, network, data.provenance, step), flush=True)

    # One stream orders the data, the other feeds the steps.
    order_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    feed = make_feed(data.train, order_key, batch_size, steps, config.data.device_share)
    print(f"images   {feed.told}", flush=True)
    step_key = copy_to_all(step_key)
    chunk = jax.jit(make_chunk(config, network, optimizer), donate_argnums=0, out_shardings=on_all())
    compiled = {}

    def compiled_chunk(length, rows):
        if length not in compiled:
            began = time.monotonic()
            print(f"compiling {length} training steps as one program …", flush=True)
            compiled[length] = chunk.lower(state, feed.images, rows, step_key).compile()
            print(f"compiled in {time.monotonic() - began:.1f} s", flush=True)
        return compiled[length]

    sampler, timesteps = configure(network, schedule, **how(config.sample))
    writer = MetricWriter(workdir, step)
    interrupted = _stop_on_signals()
    if step < steps:
        length = min(config.train.log_every, steps - step)
        compiled_chunk(length, feed.batches(step, length))
    progress = Progress(step, steps, batch_size)
    saved = manager.latest_step()

    def report(metrics, first, last):
        """Fetches the metrics of steps `first` … `last`−1, which blocks until they are computed."""
        metrics = jax.device_get(metrics)
        if not np.isfinite(metrics["loss"]).all():
            where = first + int(np.argmin(np.isfinite(metrics["loss"])))
            kept = "no checkpoint was saved" if saved is None else f"the last good checkpoint is step {saved}"
            raise UserError(
                f"the loss is not finite from step {where} on, seen in steps {first} to {last - 1}; {kept}; "
                "a lower config.train.lr in a new --workdir is the usual cure"
            )
        means = {name: float(values.mean()) for name, values in metrics.items()}
        means["images_per_second"] = progress.update(last, means["loss"])
        writer.scalars(last, means)

    pending = None
    while step < steps and not interrupted:
        length = min(config.train.log_every, steps - step)
        rows = feed.batches(step, length)
        state, metrics = compiled_chunk(length, rows)(state, feed.images, rows, step_key)
        first, step = step, step + length
        # The previous chunk's metrics are read while this one runs.
        if pending:
            report(*pending)
        pending = (metrics, first, step)
        if _crossed(first, step, config.train.sample_every) or step == steps:
            batches = sample_batches(
                sampler,
                state.ema,
                timesteps,
                seed=config.sample.seed,
                num_images=config.sample.num_images,
                batch_size=config.sample.batch_size,
                progress=False,
            )
            grid = image_grid(np.concatenate(list(batches)))
            save_png(workdir / "samples" / f"step_{step:07d}.png", grid)
            writer.picture(step, "samples", grid)
        if _crossed(first, step, config.train.checkpoint_every) or step == steps:
            report(*pending)
            pending = None
            checkpoint.save(manager, step, state)
            saved = step
    if pending:
        report(*pending)
    progress.close()
    writer.close()
    if step < steps:
        checkpoint.save(manager, step, state)
        manager.close()
        print(
            f"stopped at step {step:,} of {steps:,}, saved in {workdir}; the same command goes on from there"
        )
        raise SystemExit(128 + interrupted[0])

    if data.num_classes < 2:
        manager.close()
        print(
            f"trained {steps:,} steps; {data_label(config)} has no labels to train a classifier on, so no "
            f"distance to real images is measured\npictures: {workdir / 'samples'}"
        )
        return
    print(
        f"training a classifier on {data_label(config)}, then sampling {config.eval.num_images:,} images "
        f"in each of {', '.join(map(str, config.eval.nfe))} evaluations …",
        flush=True,
    )
    results = evaluate(config, network, state.ema, data, step)
    manager.close()
    table = results_table(results)
    (workdir / "results.md").write_text(f"{table}\n{results['provenance']['metric']}.\n")
    (workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table}\n{results['provenance']['metric']}.")
    print(f"pictures: {workdir / 'samples'}, numbers: {workdir / 'results.json'}")


def _finished_results(workdir: Path, config: ConfigDict) -> dict | None:
    """The results in `workdir` if they are those of this config's last step and evaluation."""
    path = workdir / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    same = results["step"] == config.train.steps and results["eval"] == json.loads(to_json(config))["eval"]
    return results if same else None


def _crossed(first: int, last: int, every: int) -> bool:
    return last // every > first // every


def _stop_on_signals() -> list[int]:
    """Turns the first SIGINT or SIGTERM into an entry of the list returned; the next acts as usual."""
    received = []

    def handler(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping after the steps under way; again to stop at once", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return received
