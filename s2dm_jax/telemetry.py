"""What a run tells while it runs: a progress bar or plain lines, `metrics.jsonl`, TensorBoard events."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

import s2dm_jax
from s2dm_jax import unet
from s2dm_jax.config import build_objective
from s2dm_jax.unet import UNetConfig

_SECONDS_BETWEEN_LINES = 10.0


def describe(config: ConfigDict, network: UNetConfig, provenance: str, step: int) -> str:
    """What a run is about to do, in a few lines."""
    o, train = build_objective(config), config.train
    loss = "L_simple"
    if o.has_skip:
        loss = f"{o.tau:g}·L_simple + {1 - o.tau:g}·L_skip (skip {o.skip}, {o.skip_noise} noise)"
    if o.has_sequence:
        loss += f" + {o.lam:g}·L_sa (K = {o.K})"
    devices = jax.devices()
    start = f"from step {step:,} of {train.steps:,}" if step else f"{train.steps:,} steps"
    return "\n".join(
        [
            f"s2dm_jax {s2dm_jax.__version__}, jax {jax.__version__}, {len(devices)} × "
            f"{devices[0].device_kind}",
            f"data     {provenance}",
            f"network  UNet, {unet.num_params(network):,} parameters, activations in {network.dtype}",
            f"loss     {loss}, preset {config.loss.preset}, {config.diffusion.schedule} schedule, "
            f"T = {config.diffusion.T:,}",
            f"train    {start}, batch {train.batch_size} × {o.num_levels} noise level(s), Adam {train.lr:g}, "
            f"EMA {train.ema_rate:g}, seed {train.seed}",
        ]
    )


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and TensorBoard events in `workdir`, pictures to the latter.

    A resumed run computes the steps after its checkpoint again: their old lines are dropped first.
    """

    def __init__(self, workdir: str, resume_step: int):
        self._path = Path(workdir) / "metrics.jsonl"
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= resume_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, self._path)
        self._lines = self._path.open("a")
        purge = {"purge_step": resume_step + 1} if resume_step else {}
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), **purge)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records `values` as they stand after `step` steps."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a uint8 picture [H, W, C]."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._lines.close()
        self._events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        # A line cut short by a crash belongs to the steps that are computed again.
        return float("inf")


class Progress:
    """Step, loss, images per second and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, start: int, total: int, images_per_step: int):
        self._start, self._total, self._images_per_step = start, total, images_per_step
        self._began = self._last_line = time.monotonic()
        self._shown = False
        self._bar = tqdm(
            total=total,
            initial=start,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]",
        )

    def update(self, step: int, loss: float) -> float:
        """Shows that `step` steps are done; returns images per second since the start."""
        now = time.monotonic()
        seconds_per_step = (now - self._began) / max(step - self._start, 1)
        images_per_second = self._images_per_step / seconds_per_step
        self._bar.set_postfix_str(f"loss {loss:.4g}, {images_per_second:,.0f} images/s", refresh=False)
        self._bar.update(step - self._bar.n)
        due = now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total or not self._shown
        self._shown = True
        if self._bar.disable and due:
            self._last_line = now
            left = tqdm.format_interval(seconds_per_step * (self._total - step))
            speed = f"{images_per_second:,.0f} images/s"
            print(f"step {step:,}/{self._total:,}  loss {loss:.4g}  {speed}  {left} left", flush=True)
        return images_per_second

    def close(self) -> None:
        self._bar.close()
