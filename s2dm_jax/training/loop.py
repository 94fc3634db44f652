"""Training, from top to bottom: what a run holds, the loop over compiled chunks of steps, the end.

Nothing about a run is hidden: batch order, flips, levels, noise and dropout are functions of (seed, step),
so that a run resumed from a checkpoint goes on exactly as it would have. `training/step.py` has the step.
"""

import contextlib
import functools
import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.images import image_grid, save_png
from s2dm_jax.config.build import build_network, build_objective, build_schedule
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import to_json
from s2dm_jax.data.batches import run_keys
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.data.device_feed import make_feed
from s2dm_jax.devices.distributed import is_main_process, make_stop_vote
from s2dm_jax.devices.flops import forward_flops, step_flops
from s2dm_jax.devices.hardware import peak_flops
from s2dm_jax.devices.sharding import replicate, replicate_key, replicated, state_shardings, unshard
from s2dm_jax.evaluation.evaluate import evaluate, show_results
from s2dm_jax.evaluation.features import FeaturesUnavailable, check_features
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.sampler import sample_batches, sampler_options
from s2dm_jax.models import variance_head
from s2dm_jax.models.variance_head import Head
from s2dm_jax.samplers.specs import SAMPLERS
from s2dm_jax.training.failures import check_finite, finite_steps, install_signal_handlers
from s2dm_jax.training.step import jit_step, make_train_chunk
from s2dm_jax.training.telemetry import MetricWriter, Profile, Progress, aggregate_metrics, run_summary
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.folder import check_same_images, open_workdir
from s2dm_jax.workdir.load import load_base_params
from s2dm_jax.workdir.metadata import run_metadata
from s2dm_jax.workdir.results import results_table
from s2dm_jax.workdir.state import init_state, make_optimizer, new_state


def train(config: ConfigDict, workdir: str) -> None:
    """Trains as `config` says, resuming what `workdir` holds, and evaluates the result.

    Leaves in `workdir`: config.json, parameters.txt, metrics.jsonl, tensorboard/, samples/, checkpoints/,
    results.json and results.md. Each of several processes calls this; the first writes.

    Args:
      config: a checked config.
      workdir: folder of the run, created if it is missing.

    Raises:
      UserError: if the folder cannot be written to or is in use, no checkpoint in it can be read, or the loss
        stops being finite.
      SystemExit: after a signal, once the state is saved.
    """
    with contextlib.ExitStack() as held:
        _train(config, held.enter_context(open_workdir(workdir, config)), held)


def _train(config: ConfigDict, workdir: Path, held: contextlib.ExitStack) -> None:
    say = functools.partial(print, flush=True) if is_main_process() else lambda *_: None
    finished = _finished_results(workdir, config)
    if finished:
        say(f"{workdir} is finished: {config.train.steps:,} steps trained and evaluated\n")
        say(results_table(finished))
        return

    # What the run is made of.
    data = load_dataset(config)
    check_features(config, data)
    network = build_network(config)
    schedule = build_schedule(config)
    optimizer = make_optimizer(config.train.lr, config.train.grad_clip)
    steps, batch_size = config.train.steps, config.train.batch_size
    parts = jax.device_count() * config.train.grad_accum_steps
    if batch_size % parts:
        raise UserError(
            f"config.train.batch_size={batch_size} must be a multiple of {parts}: of the "
            f"{jax.device_count()} devices times "
            f"config.train.grad_accum_steps={config.train.grad_accum_steps}"
        )
    if SAMPLERS[config.sample.sampler].requires == "ms_eps":
        raise UserError(
            f"config.sample.sampler={config.sample.sampler!r} cannot show a training as it goes on: its "
            "statistic is of a network that stays; train with ddim, and use it with --mode=sample"
        )

    if is_main_process():
        # First of all: a folder that holds anything without it is not taken for a run.
        write_atomic(workdir / "config.json", to_json(config))
        check_same_images(workdir, data.digest)
        (workdir / "samples").mkdir(exist_ok=True)

    # Its state: new, or the newest checkpoint's.
    if config.variance_head.kind:
        frozen = replicate(load_base_params(workdir, config))
        state = new_state(variance_head.init_params(network, config.train.seed), optimizer)
        flops = forward_flops(network) * batch_size
    else:
        frozen, state = None, init_state(network, optimizer, config.train.seed)
        flops = step_flops(network, batch_size, build_objective(config).num_timesteps_per_image)
    shardings = state_shardings(state, config.train.shard_state)
    manager = checkpoint.open_checkpoints(
        workdir, config.train.max_to_keep, config.train.keep_period, config.train.keep_best
    )
    held.callback(checkpoint.close, manager)
    restored = checkpoint.restore_latest(manager, state, shardings, quarantine=True)
    state = jax.device_put(state, shardings) if restored is None else restored
    step = int(state.step)
    if step > steps:
        raise UserError(
            f"config.train.steps={steps} is less than the {step} steps that {workdir} has trained"
        )
    params = unshard(state.params)
    if is_main_process():
        overview = parameter_overview.get_parameter_overview(params)
        (workdir / "parameters.txt").write_text(overview + "\n", encoding="utf-8")
    del params
    say(run_summary(config, network, data.provenance, step))

    order_key, step_key = run_keys(config.train.seed)
    step_key = replicate_key(step_key)
    feed = make_feed(data.train, order_key, batch_size, steps, config.data.max_device_memory_fraction)
    say(f"images   {feed.summary}")
    chunk = jit_step(make_train_chunk(config, network, optimizer), out_shardings=(shardings, replicated()))

    def compile_chunk(rows):
        began = time.monotonic()
        say(f"compiling {len(rows)} training steps as one program …")
        program = chunk.lower(state, feed.images, rows, step_key, frozen).compile()
        say(f"compiled in {time.monotonic() - began:.1f} s")
        return program

    length = min(config.train.log_every, steps - step)
    programs = {length: compile_chunk(feed.batches(step, length))} if length else {}

    # What it tells, and what it listens to.
    writer = MetricWriter(workdir, step)
    held.callback(writer.close)
    progress = Progress(step, steps, batch_size, flops, peak_flops(network.dtype))
    held.callback(progress.close)
    profile = Profile(workdir, step, config.train.profile_steps)
    held.callback(profile.close)
    received = install_signal_handlers()
    stop = make_stop_vote(received)
    about = run_metadata(config)
    saved = manager.latest_step()
    pending, skipped = None, 0
    since_save: list[dict[str, float]] = []

    def report():
        """Fetches the newest metrics not yet told, which blocks until their steps are computed."""
        nonlocal pending, skipped
        if pending is None:
            return
        (metrics, first, last), pending = jax.device_get(pending), None
        finite = finite_steps(metrics)
        skipped = check_finite(finite, first, config.train.on_nonfinite, saved, skipped)
        means = aggregate_metrics(metrics, finite, schedule.T)
        since_save.append(means)
        writer.scalars(last, {**means, **progress.update(last, means.get("loss", np.nan))})

    def trained():
        """The run so far, as what samples."""
        ema = unshard(state.ema)
        if frozen is None:
            return Model(config, network, schedule, ema, step)
        return Model(config, network, schedule, frozen, step, head=Head(config.variance_head.kind, ema))

    def draw_samples():
        model = trained()
        sample_fn, timesteps = model.sampler(**sampler_options(config.sample))
        batches = sample_batches(
            sample_fn,
            model.params,
            timesteps,
            seed=config.sample.seed,
            num_images=config.sample.num_images,
            batch_size=config.sample.batch_size,
            progress=False,
        )
        grid = image_grid(np.concatenate(list(batches)))
        if is_main_process():
            save_png(workdir / "samples" / f"step_{step:07d}.png", grid)
        writer.picture(step, "samples", grid)

    def save():
        nonlocal saved
        metrics = {
            name: float(np.mean([means[name] for means in since_save if name in means]))
            for name in ("loss", "simple", "skip", "sa", "grad_norm")
            if any(name in means for means in since_save)
        }
        checkpoint.save(manager, step, state, about, metrics)
        saved = step
        since_save.clear()

    while step < steps and not stop():
        length = min(config.train.log_every, steps - step)
        rows = feed.batches(step, length)
        if length not in programs:
            report()
            with progress.paused():
                programs[length] = compile_chunk(rows)
        profile.before_chunk(step)
        # All that the steps need is on the devices.
        with jax.transfer_guard("disallow"):
            state, metrics = programs[length](state, feed.images, rows, step_key, frozen)
        # The previous chunk's metrics are read while this one runs.
        report()
        first, step = step, step + length
        pending = (metrics, first, step)
        profile.after_chunk(step, metrics)
        sample_now = _crossed(first, step, config.train.sample_every) or step == steps
        save_now = _crossed(first, step, config.train.checkpoint_every) or step == steps
        if sample_now or save_now:
            report()
            with progress.paused():
                if sample_now:
                    draw_samples()
                if save_now:
                    save()
    report()
    progress.close()

    if step < steps:
        save()
        checkpoint.finish(manager)
        say(f"stopped at step {step:,} of {steps:,}, saved in {workdir}; the same command goes on from there")
        raise SystemExit(128 + (received[0] if received else signal.SIGTERM))

    checkpoint.finish(manager)
    say(f"evaluating with {config.eval.num_images:,} images …")
    try:
        results = evaluate(trained(), data, workdir)
    except FeaturesUnavailable as error:
        say(f"trained {steps:,} steps; no distance to real images is measured: {error}")
    else:
        show_results(workdir, results)
    say(f"pictures: {workdir / 'samples'}")


def _finished_results(workdir: Path, config: ConfigDict) -> dict | None:
    """The results in `workdir` if they are those of this config's last step and evaluation."""
    path = workdir / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(to_json(config))["eval"]
    # Results of before a field was there were made with its default.
    made = {**json.loads(to_json(default_config()))["eval"], **results["eval"]}
    return results if results["step"] == config.train.steps and made == wanted else None


def _crossed(first: int, last: int, every: int) -> bool:
    return last // every > first // every
