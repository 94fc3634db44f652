"""Training, from top to bottom: setting up a run, the loop over chunks of steps in one compiled program, the end.

Nothing about a run is hidden state: batch order, flips, timesteps, noise and dropout are functions of (seed, step), so
that a resumed run continues exactly as it would have. `training/step.py` has the step.
"""

import contextlib
import copy
import json
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import read_json, user_path, write_atomic
from s2dm_jax.common.images import image_grid, save_png
from s2dm_jax.common.signals import deferred, signal_advice
from s2dm_jax.config.defaults import FIELDS, default_config
from s2dm_jax.config.ema import parse_choice
from s2dm_jax.config.io import to_json
from s2dm_jax.data.batches import run_keys
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.data.device_feed import make_feed
from s2dm_jax.devices.distributed import agrees_with_main, any_process, is_main_process, make_agreement
from s2dm_jax.devices.hardware import peak_flops
from s2dm_jax.devices.sharding import replicate_key, replicated, state_shardings, unshard
from s2dm_jax.evaluation.evaluate import evaluate, show_results
from s2dm_jax.evaluation.features import FeaturesUnavailable
from s2dm_jax.inference.batches import device_batch_size
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.saturation import Fault
from s2dm_jax.models.network import Network
from s2dm_jax.models.variance_head import Head
from s2dm_jax.training.failures import check_finite, check_loss_scale, usual_cure
from s2dm_jax.training.setup import Setup, save_config, set_up
from s2dm_jax.training.step import Metrics, jit_step, make_train_chunk
from s2dm_jax.training.telemetry import MetricWriter, Profile, Progress, aggregate_metrics, overflows, run_summary
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.ema import chosen_weights, save_snapshot
from s2dm_jax.workdir.folder import open_workdir
from s2dm_jax.workdir.metadata import run_metadata
from s2dm_jax.workdir.results import results_table

# A chunk of steps is run in pieces that take about this long at most; between them a signal is noticed.
_PIECE_SECONDS = 2.0
# Shorter pieces are not waited for before the next is started, so that the device never waits for the host.
_QUEUED_SECONDS = 0.5
# A call that takes longer has done its steps when it returns: a GPU's backend runs a loop of unknown length within it.
_CALL_SECONDS = 0.02


def train(config: ConfigDict, workdir: str, *, network: Network | None = None) -> None:
    """Trains as `config` describes, resuming the run in `workdir` if there is one, and evaluates the result.

    Leaves in `workdir`: config.json, parameters.txt, metrics.jsonl, tensorboard/, samples/, checkpoints/, results.json
    and results.md. Each of several processes calls this; the main one writes.

    Args:
      config: a checked config.
      workdir: folder of the run, created if it is missing.
      network: what to train instead of the network that the config names.

    Raises:
      UserError: if the folder cannot be written to or is in use, no checkpoint in it can be read, or the loss stops
        being finite.
      SystemExit: after a signal, once the state is saved.
    """
    workdir = str(user_path(workdir, "workdir"))
    if not agrees_with_main(lambda: to_json(_without_paths(config))):
        raise UserError("the processes of this run have different configs; start all of them with the same command")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(open_workdir(workdir, config))
        finished = _finished_results(folder, config)
        if finished:
            if config.data.source and is_main_process():
                # The images may have moved since.
                save_config(config, folder, load_dataset(config))
            _log(f"{folder} is finished: {config.train.steps:,} steps trained and evaluated\n")
            _log(results_table(finished))
            return
        loop = TrainingLoop(set_up(config, folder, network), stack)
        loop.run()
        loop.evaluate()


class TrainingLoop:
    """A run in progress: its state, the compiled programs, logging and saving."""

    def __init__(self, setup: Setup, stack: contextlib.ExitStack):
        """Restores the newest checkpoint, prints the run's summary, compiles the program of the steps."""
        config, workdir, train = setup.config, setup.workdir, setup.config.train
        self.setup, self.config, self.workdir = setup, config, workdir

        # The state: new, or the newest checkpoint's.
        self.shardings = state_shardings(setup.init, train.shard_state)
        self.manager = checkpoint.open_checkpoints(workdir, train.max_to_keep, train.keep_period, train.keep_best)
        stack.callback(checkpoint.close, self.manager)
        restored = checkpoint.restore_latest(self.manager, setup.init, self.shardings, quarantine=True)
        self.state = jax.device_put(setup.init, self.shardings) if restored is None else restored
        self.step = int(self.state.step)
        if self.step > train.steps:
            raise UserError(
                f"config.train.steps={train.steps} is less than the {self.step} steps that {workdir} has trained"
            )
        params = unshard(self.state.params)
        if is_main_process():
            overview = parameter_overview.get_parameter_overview(params)
            write_atomic(workdir / "parameters.txt", overview + "\n")
        _log(run_summary(config, setup.network, setup.data, self.step))

        # Before the compilation, which takes minutes: Weights & Biases may refuse the run.
        self.writer = MetricWriter(workdir, self.step, config)
        stack.callback(self.writer.close)

        # The data, and the compiled program of all chunks.
        order_key, step_key = run_keys(train.seed)
        self.step_key = replicate_key(step_key)
        max_fraction = config.data.max_device_memory_fraction
        self.feed = make_feed(setup.data.train, order_key, train.batch_size, train.steps, max_fraction)
        _log(f"images   {self.feed.summary}")
        self.chunk_steps = min(train.log_every, train.steps)
        every = train.ema_snapshot_every or train.checkpoint_every
        self.snapshot_every = every if train.ema_sigma_rel else train.steps
        self.rows: jax.Array | None = None
        self.rows_from = -1
        self.program: Any = self._compile() if self.step < train.steps else None

        # What is logged, and what stops the run.
        peak = peak_flops(setup.network.dtype)
        self.progress = Progress(self.step, train.steps, train.batch_size, setup.flops_per_step, peak)
        self.profile = Profile(workdir, self.step, train.profile_steps)
        for opened in (self.progress, self.profile):
            stack.callback(opened.close)
        self.saturation = setup.data.saturation
        self.metadata = {**run_metadata(config), "saturation": self.saturation}
        self.saved = self.manager.latest_step()
        self.pending: list[tuple[Metrics, slice, int]] = []
        self.computed: float | None = None
        self.skipped = 0
        self.ema_note = ""
        self.since_save: list[dict[str, float]] = []
        self.seconds_per_step: float | None = None
        self.piece_ends = 0.0

    def run(self) -> None:
        """Trains until the last step or a signal, and saves the state; raises SystemExit after a signal."""
        with deferred(self._stopping) as received:
            self._train(received)
            self._log_pending(self.computed)
            self.progress.close()
            if self.saved != self.step:
                self._save()
            checkpoint.finish(self.manager)
        unfinished = self.step < self.config.train.steps
        if unfinished or any_process(bool(received)):
            saved = f"step {self.step:,} of {self.config.train.steps:,}, saved in {self.workdir}"
            _log(f"stopped at {saved}; run the same command to {'resume' if unfinished else 'evaluate it'}")
            raise SystemExit(128 + (received[0] if received else signal.SIGTERM))

    def _stopping(self) -> str:
        """What a signal's first line says."""
        seconds = max(1, round(self.piece_ends - time.monotonic()))
        duration = f", which takes about {seconds:,} s" if self.seconds_per_step else ""
        return f"stopping after the current steps{duration}; interrupt again to stop at once"

    def _train(self, received: list[int]) -> None:
        train, agree = self.config.train, make_agreement()
        while self.step < train.steps and (most := agree(0 if received else self._steps_in_time())):
            first = self.step - self.step % self.chunk_steps
            # A snapshot's step does not depend on the chunks.
            self._run_piece(first, min(most, self.snapshot_every - self.step % self.snapshot_every))
            if train.ema_sigma_rel and self.step % self.snapshot_every == 0:
                save_snapshot(self.workdir, self.config, self.state)
            # Samples and checkpoints after whole chunks, wherever the pieces end.
            last = self.step == train.steps
            if self.step < first + self.chunk_steps and not last:
                continue
            sample_now = _crossed(first, self.step, train.sample_every) or last
            save_now = _crossed(first, self.step, train.checkpoint_every) or last
            if sample_now or save_now:
                self._log_pending(self.computed)
                with self.progress.paused():
                    if sample_now:
                        self._save_samples()
                    if save_now:
                        self._save()

    def _steps_in_time(self) -> int:
        """The steps that take about `_PIECE_SECONDS`; one to begin with."""
        if self.seconds_per_step is None:
            return 1
        return max(1, min(int(_PIECE_SECONDS / self.seconds_per_step), self.chunk_steps))

    def _run_piece(self, first: int, most: int) -> None:
        """Runs the next steps of the chunk that begins at step `first`, `most` at most.

        A step is a function of (seed, step), so that the time, which decides about the pieces, changes no number.
        """
        begin = self.step - first
        end = min(begin + most, self.chunk_steps, self.config.train.steps - first)
        span = jax.make_array_from_callback((2,), replicated(), lambda _: np.array([begin, end], np.int32))
        self.profile.before_chunk(self.step)
        began, expected = time.monotonic(), (end - begin) * (self.seconds_per_step or _PIECE_SECONDS)
        self.piece_ends = began + expected
        # All that the steps need is on the devices.
        inputs = self.feed.images, self._rows(first), self.step_key, self.setup.base_params, span
        calling, before = time.monotonic(), self.computed
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.program(self.state, *inputs)
        called = time.monotonic()
        self.computed = called if called - calling > _CALL_SECONDS else None
        if begin == 0:
            # The previous chunk's metrics are read while this one runs.
            self._log_pending(before)
        self.step = first + end
        self.pending.append((metrics, slice(begin, end), self.step))
        self.profile.after_chunk(self.step, metrics)
        if expected > _QUEUED_SECONDS:
            jax.block_until_ready(metrics)
            self.computed = time.monotonic()
            self.seconds_per_step = (self.computed - began) / (end - begin)

    def evaluate(self) -> None:
        """Evaluates the trained run and writes the results to its folder."""
        _log(f"evaluating with {self.config.eval.num_images:,} images …")
        try:
            with signal_advice("the training is saved; run the same command to evaluate it"):
                results = evaluate(self._model(self.config.eval.ema), self.setup.data, self.workdir)
        except FeaturesUnavailable as error:
            _log(f"trained {self.config.train.steps:,} steps; no distance to real images is measured: {error}")
        else:
            show_results(self.workdir, results)
            self.writer.results(results)
        _log(f"samples: {self.workdir / 'samples'}")

    def _rows(self, first: int) -> jax.Array | None:
        """What the steps of the chunk that begins at step `first` see."""
        if first != self.rows_from:
            self.rows, self.rows_from = self.feed.batches(first, self.chunk_steps), first
        return self.rows

    def _compile(self) -> Any:
        """The program of (state, images, rows, key, base_params, span) for all of the run's steps."""
        chunk = make_train_chunk(self.config, self.setup.network, self.setup.optimizer)
        rows = self._rows(self.step - self.step % self.chunk_steps)
        span = jax.ShapeDtypeStruct((2,), np.int32, sharding=replicated())
        began = time.monotonic()
        _log("compiling the training steps as one program …")
        program = jit_step(chunk, out_shardings=(self.shardings, replicated()))
        lowered = program.lower(self.state, self.feed.images, rows, self.step_key, self.setup.base_params, span)
        compiled = lowered.compile()
        _log(f"compiled in {time.monotonic() - began:.1f} s")
        return compiled

    def _log_pending(self, computed: float | None = None) -> None:
        """Fetches and logs the newest metrics not yet logged, which blocks until their steps are computed.

        `computed` is when they were, where that may be earlier than now.
        """
        if not self.pending:
            return
        if not all(leaf.is_ready() for leaf in jax.tree.leaves(self.pending[-1][0])):
            computed = None
        pieces, self.pending = jax.device_get(self.pending), []
        metrics = {name: np.concatenate([values[name][rows] for values, rows, _ in pieces]) for name in pieces[0][0]}
        last = pieces[-1][2]
        first = last - len(metrics["loss"])
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
        good = finite | overflows(metrics)
        on_nonfinite, cure = self.config.train.on_nonfinite, usual_cure(self.config)
        self.skipped = check_finite(good, first, on_nonfinite, self.saved, self.skipped, cure)
        check_loss_scale(metrics, first, self.saved)
        means = aggregate_metrics(metrics, finite, self.setup.schedule.T)
        self.since_save.append(means)
        speed = self.progress.update(last, means.get("loss", np.nan), computed)
        self.seconds_per_step = speed["seconds_per_step"]
        self.writer.scalars(last, {**means, **speed})

    def _model(self, ema_name: str) -> Model:
        """The run so far, to sample from; prints a note the first time that its EMA is corrected."""
        setup = self.setup
        ema, note = chosen_weights(self.config, setup.network, self.state, self.workdir, parse_choice(ema_name))
        if note and not self.ema_note:
            _log(f"note: {note}")
        self.ema_note = note
        head, params = None, ema
        if setup.base_params is not None:
            head, params = Head(self.config.variance_head.kind, ema), setup.base_params
        notes = note, self.saturation, ema_name
        return Model(self.config, setup.network, setup.schedule, params, self.step, None, head, *notes)

    def _save_samples(self) -> None:
        """Writes a grid of samples to samples/ and TensorBoard."""
        # In the batches of the evaluation, which then finds the sampler compiled.
        sample = copy.deepcopy(self.config.sample)
        sample.batch_size = device_batch_size(sample.batch_size)
        batches = self._model(self.config.sample.ema).batches(sample, progress=False, report=self._report)
        grid = image_grid(np.concatenate(list(batches)))
        if is_main_process():
            save_png(self.workdir / "samples" / f"step_{self.step:07d}.png", grid)
        self.writer.image(self.step, "samples", grid)

    def _report(self, fault: Fault) -> None:
        _log(f"warning: the samples of step {self.step:,}: {fault.text}")

    def _save(self) -> None:
        """Starts saving a checkpoint, with the mean of each metric since the one before."""
        names = sorted({name for means in self.since_save for name in means if "/" not in name})
        values = {name: [means[name] for means in self.since_save if name in means] for name in names}
        metrics = {name: float(np.mean(values[name])) for name in names}
        checkpoint.save(self.manager, self.step, self.state, self.metadata, metrics)
        self.saved = self.step
        self.since_save.clear()


def _log(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def _finished_results(workdir: Path, config: ConfigDict) -> dict | None:
    """The results in `workdir` if they are those of this config's last step and evaluation."""
    keys = ("step", "eval", "rows", "provenance")
    results = read_json(workdir / "results.json", keys, "the run is evaluated again")
    if results is None:
        return None
    requested = json.loads(to_json(config))["eval"]
    # Results from before a field existed were made with its default.
    made = {**json.loads(to_json(default_config()))["eval"], **results["eval"]}
    return results if results["step"] == config.train.steps and made == requested else None


def _without_paths(config: ConfigDict) -> ConfigDict:
    """The config without the paths, which may differ between hosts."""
    config = copy.deepcopy(config)
    for name, field in FIELDS.items():
        if field.path:
            group, key = name.split(".")
            config[group][key] = ""
    return config


def _crossed(first: int, last: int, every: int) -> bool:
    return last // every > first // every
