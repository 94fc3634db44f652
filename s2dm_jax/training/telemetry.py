"""Logging of a run: a progress bar or plain lines, `metrics.jsonl`, TensorBoard events, W&B, a profile."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from s2dm_jax.common.errors import naming
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.progress import ProgressDisplay
from s2dm_jax.common.version import __version__
from s2dm_jax.config.build import build_objective, schedule_ends
from s2dm_jax.config.defaults import FIELDS, decay_steps, fixed_loss_scale
from s2dm_jax.config.ema import ema_summary
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.hardware import peak_memory
from s2dm_jax.models.network import Network, num_params
from s2dm_jax.training.wandb_run import WandbRun


def run_summary(config: ConfigDict, network: Network, data: Dataset, step: int) -> str:
    """A few lines on what a run is about to do."""
    objective, train, diffusion = build_objective(config), config.train, config.diffusion
    loss = f"{objective.formula}, preset {config.loss.preset}"
    devices = jax.devices()
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    start = f"from step {step:,} of {train.steps:,}" if step else f"{train.steps:,} steps"
    batch = f"batch {train.batch_size} × {objective.num_timesteps_per_image} timestep(s)"
    lines = (
        f"s2dm_jax {__version__}, jax {jax.__version__}, {len(devices)} × {devices[0].device_kind}{hosts}",
        f"data     {data.provenance}",
        *data.split.splitlines(),
        f"network  {type(network).__name__}, {num_params(network):,} parameters, activations in {network.dtype}",
        f"loss     {loss}, {diffusion.schedule} schedule, T = {diffusion.T:,}{schedule_ends(diffusion)}",
        f"train    {start}, {batch}, {_optimizer_summary(config)}, {ema_summary(train)}, seed {train.seed}",
    )
    return "\n".join(lines)


def _optimizer_summary(config: ConfigDict) -> str:
    train = config.train
    parts = [f"AdamW {train.lr:g}, weight decay {train.weight_decay:g}" if train.weight_decay else f"Adam {train.lr:g}"]
    for name, label in (("adam_b1", "beta_1"), ("adam_b2", "beta_2"), ("adam_eps", "epsilon")):
        if train[name] != FIELDS[f"train.{name}"].default:
            parts.append(f"{label} {train[name]:g}")
    if train.warmup_steps:
        parts.append(f"warm-up over {train.warmup_steps:,} steps")
    if train.lr_schedule != "constant":
        parts.append(f"{train.lr_schedule} decay to {train.lr_end:g} by step {decay_steps(config):,}")
    scale = fixed_loss_scale(config)
    if scale != 1:
        parts.append("dynamic loss scale" if scale is None else f"loss scale {scale:g}")
    return ", ".join(parts)


_SECONDS_BETWEEN_FLUSHES = 30.0
_OF_THE_LAST_STEP = ("learning_rate", "loss_scale")


class _Events:
    """Appends to a file of TensorBoard events.

    tensorboardX's own `SummaryWriter` writes in a thread, whose errors are printed and lost, and waits forever for it
    once it has failed.
    """

    def __init__(self, folder: Path, purge_step: int):
        """Opens a new file; TensorBoard then hides what other files of the folder have from `purge_step` on, if > 0."""
        self._folder, self._flushed = folder, time.monotonic()
        self._open()
        if purge_step:
            self.add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _open(self) -> None:
        with naming(self._folder, self._folder):
            self._folder.mkdir(exist_ok=True)
            self._file = EventsWriter(str(self._folder / "events"))

    def add(self, event: Event) -> None:
        if not self._folder.is_dir():
            # It was removed: an open file would take everything and lose it.
            self._open()
        event.wall_time = time.time()
        with naming(self._folder):
            self._file.write_event(event)
            if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._folder):
            self._file.close()


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and TensorBoard events in `workdir`, images to the latter; both to W&B.

    A resumed run computes the steps after its checkpoint again: their old lines are dropped first. Only the main
    process writes.
    """

    def __init__(self, workdir: Path, resume_step: int, config: ConfigDict | None = None):
        """Opens the files of `workdir`, and its run on Weights & Biases if `config.train.wandb` is set."""
        self._writes = is_main_process()
        if not self._writes:
            return
        self._path = path = workdir / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            write_atomic(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= resume_step))
        self._events = _Events(workdir / "tensorboard", resume_step + 1 if resume_step else 0)
        self._wandb = WandbRun(workdir, config) if config is not None and config.train.wandb else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records `values` after `step` steps."""
        if not self._writes:
            return
        # Opened again for each line: one that is kept open is written to in vain once it was removed.
        with naming(self._path, self._path), self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add(Event(step=step, summary=summary.scalar(name, value)))
        if self._wandb:
            self._wandb.scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Records an image, uint8 [H, W, C]."""
        if not self._writes:
            return
        self._events.add(Event(step=step, summary=summary.image(name, image, dataformats="HWC")))
        if self._wandb:
            self._wandb.image(step, name, image)

    def results(self, results: dict) -> None:
        """Records the results of the run's evaluation, on Weights & Biases alone."""
        if self._writes and self._wandb:
            self._wandb.results(results)

    def close(self) -> None:
        if not self._writes:
            return
        if self._wandb:
            self._wandb.close()
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        # A line cut short by a crash belongs to the steps that are computed again.
        return float("inf")


class Progress:
    """Step, loss, speed and time left: a bar on a terminal, an occasional line elsewhere."""

    def __init__(self, start: int, total: int, images_per_step: int, flops_per_step: float, peak: float | None):
        """Starts the clock.

        Args:
          start: steps done before, of `total`.
          images_per_step, flops_per_step: of all devices together (`flops.step_flops`).
          peak: FLOP/s that all devices together could do, or None.
        """
        self._start, self._total = start, total
        self._images, self._flops, self._peak = images_per_step, flops_per_step, peak
        self._last_step, self._last_update, self._paused = start, time.monotonic(), 0.0
        bar = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"
        self._display = ProgressDisplay(sys.stdout, total, start, shown=is_main_process(), bar_format=bar)

    def update(self, step: int, loss: float, computed: float | None = None) -> dict[str, float]:
        """Shows that `step` steps are done, and were at `computed` (`time.monotonic`; None: now).

        Returns:
          Of the steps since the last update: "seconds_per_step", "images_per_second", "tflops_per_second", and "mfu"
          (its share of the peak) if the peak is available; of the run: "peak_memory_gb", "eta_seconds".
        """
        before = self._last_update + self._paused
        now = computed if computed and computed > before else time.monotonic()
        seconds_per_step = (now - before) / max(step - self._last_step, 1)
        due = self._last_step == self._start or step == self._total
        self._last_step, self._last_update, self._paused = step, now, 0.0
        speed = {
            "seconds_per_step": seconds_per_step,
            "images_per_second": self._images / seconds_per_step,
            "tflops_per_second": self._flops / seconds_per_step / 1e12,
        }
        rate = f"{speed['images_per_second']:,.0f} images/s"
        if self._peak:
            speed["mfu"] = self._flops / seconds_per_step / self._peak
            rate += f", {speed['mfu']:.0%} of peak"
        line = f"step {step:,}/{self._total:,}  loss {loss:.4g}  {rate}"
        self._display.update(step, line, postfix=f"loss {loss:.4g}, {rate}", due=due)
        return {**speed, "peak_memory_gb": peak_memory() / 1e9, "eta_seconds": self._display.seconds_left(step)}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside out of the time per step."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def close(self) -> None:
        self._display.close()


class Profile:
    """A trace of some steps for TensorBoard or Perfetto, in `workdir`/profile.

    The first chunk is left out: it waits for what the others do not.
    """

    def __init__(self, workdir: Path, start: int, steps: int):
        self._folder, self._start, self._steps = workdir / "profile", start, steps
        self._from: int | None = None

    def before_chunk(self, step: int) -> None:
        """Starts the trace where it is due; the steps before `step` have been dispatched."""
        if self._steps and self._from is None and step > self._start:
            jax.profiler.start_trace(str(self._folder))
            self._from = step

    def after_chunk(self, step: int, result: Any) -> None:
        """Ends the trace once it holds the requested number of steps."""
        if self._from is not None and step - self._from >= self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was traced."""
        if not self._steps or self._from is None:
            return
        self._steps = 0
        try:
            jax.profiler.stop_trace()
        except jax.errors.JaxRuntimeError as error:
            # As on a full disk. A training does not need its trace.
            print(f"no trace could be written to {self._folder} ({str(error).splitlines()[0]})", file=sys.stderr)
            return
        if is_main_process():
            print(f"trace of the steps from {self._from:,} on in {self._folder}", flush=True)


def overflows(metrics: dict[str, np.ndarray]) -> np.ndarray:
    """Steps whose gradient overflowed under a dynamic loss scale, which alone they changed: bool [n].

    `metrics` are "loss", "grad_norm" and, if the loss scale is dynamic, "loss_scale", each [n].
    """
    if "loss_scale" not in metrics:
        return np.zeros(len(metrics["loss"]), bool)
    return np.isfinite(metrics["loss"]) & ~np.isfinite(metrics["grad_norm"])


def aggregate_metrics(metrics: dict[str, np.ndarray], finite: np.ndarray, T: int) -> dict[str, float]:
    """The means over a chunk of steps, and learning rate and loss scale of the last one if these change.

    Steps that overflowed count in every mean but that of the gradient norm.

    Args:
      metrics: "by_timestep" [n, 2, G], sums of L_simple and counts of the examples in each of G equal groups of
        timesteps; everything else [n].
      finite: bool [n], the steps that count.
      T: number of timesteps.

    Returns:
      The mean of each metric, that of L_simple in each group of timesteps that occurred as
      "loss_simple_by_t/000-099"; "overflow_steps" if the loss scale is dynamic, "skipped_steps" if there are any.
    """
    overflow = overflows(metrics)
    counted = finite | overflow
    if not counted.any():
        return {"skipped_steps": len(finite)}
    means = {}
    for name, values in metrics.items():
        rows = finite if name == "grad_norm" else counted
        if name != "by_timestep" and rows.any():
            means[name] = float(values[-1] if name in _OF_THE_LAST_STEP else values[rows].mean())
    sums, counts = metrics["by_timestep"][counted].astype(np.float64).sum(0)  # [G] each
    edges = np.ceil(np.arange(len(sums) + 1) * T / len(sums)).astype(int)
    digits = len(str(T - 1))
    for i in np.flatnonzero(counts):
        name = f"loss_simple_by_t/{edges[i]:0{digits}d}-{edges[i + 1] - 1:0{digits}d}"
        means[name] = float(sums[i] / counts[i])
    if "loss_scale" in metrics:
        means["overflow_steps"] = int(overflow.sum())
    if not counted.all():
        means["skipped_steps"] = int((~counted).sum())
    return means
