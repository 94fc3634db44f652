"""The run of the stage `evidence` in one process: everything prepared once, then an objective at a time."""

import concurrent.futures
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gpu_stages import evidence_data, evidence_weights
from gpu_stages.evidence_data import Anchors
from gpu_stages.evidence_plan import Distance, Size, State, has_state, read_state, size_of, write_state
from gpu_stages.evidence_train import (
    Compiler,
    Measure,
    Session,
    batches,
    config_of,
    distance,
    new_state_of,
    scale_of,
    train,
)
from gpu_stages.evidence_weights import Left, Trained
from gpu_stages.parts import Settings
from s2dm_jax.data.batches import run_keys
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.data.device_feed import Feed
from s2dm_jax.devices.sharding import replicate_key

_LOGGED_LOSSES = 20
# The stage ends by force at its deadline: a distance that would take longer than what is left is not begun.
_LAST_SECONDS = 1.0
# Of the time that is left, the most that is spent waiting for programs before anything else is done.
_COMPILING_FRACTION = 0.4


class Run(NamedTuple):
    """What every objective needs.

    Attributes:
      size: of networks and measurements.
      compiler: of its programs.
      feed: its batches.
      measure, anchors: the features, and distances to hold others against.
      left: what was trained so far, as in the file.
      note: why what an earlier run left is ignored, or "".
      seconds: that the preparation took, by what was done.
      images: how many, and their hash.
    """

    size: Size
    compiler: Compiler
    feed: Feed
    measure: Measure
    anchors: Anchors
    left: Left
    note: str
    seconds: dict[str, float]
    images: str


_RUNS: dict[Path, Run] = {}


def open_run(settings: Settings, images: Path, programs: Iterable[str | int]) -> Run:
    """What an earlier part of this process prepared, or all of it now, with these programs compiled meanwhile."""
    if settings.scratch not in _RUNS:
        _RUNS[settings.scratch] = _prepare(settings, images, programs)
    return _RUNS[settings.scratch]


def _prepare(settings: Settings, images: Path, programs: Iterable[str | int]) -> Run:
    size, seconds = size_of(settings), {}
    config = config_of(size, "ddpm", images)
    compiler, began = Compiler(size, images), time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_timed, load_dataset, config)
        compiling = [compiler.start(name) for name in programs]
        data, seconds["images"] = loading.result()
    # Nothing else should run on the device while XLA times its choices of kernels. A program that is late or fails is
    # the concern of the parts that need it.
    concurrent.futures.wait(compiling, _COMPILING_FRACTION * max(0.0, settings.deadline - time.time()))
    seconds["images and programs"] = time.perf_counter() - began

    digest = evidence_data.digest_of(size, images, data)
    begun = has_state(settings.scratch)
    left, note = evidence_weights.read(settings.out if begun else settings.resume, digest)
    if left is None:
        weights, seconds["classifier"] = _timed(evidence_data.train_classifier, size, data)
        left = Left(digest, weights, {})
    if not begun:
        if note or settings.resume != settings.out:
            evidence_weights.set_aside(settings.out)
        evidence_weights.write(settings.out, left)
        write_state(settings.scratch, State({}, None))
    began = time.perf_counter()
    measure = evidence_data.make_measure(config, size, data, left.classifier)
    anchors = evidence_data.measure_anchors(measure, size, data, left.classifier)
    feed = evidence_data.feed_of(config, data)
    # Compiled now, not in the first objective's time.
    jax.block_until_ready(batches(feed, 0, size.chunk))
    seconds["anchors"] = time.perf_counter() - began
    # Not the data's provenance, which has the path on this machine.
    counts = f"{len(data.train):,} for training, {len(data.held_out):,} held out, sha256 {data.digest[:16]}"
    return Run(size, compiler, feed, measure, anchors, left, note, seconds, counts)


def _timed(function: Any, *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def measure_batches(run: Run) -> dict[str, float]:
    """Seconds of sampling a batch and its features, by NFE as text."""
    params = jax.tree.map(np.zeros_like, run.compiler.network.init(0))
    seconds = {}
    for nfe in run.size.nfe:
        sampler, scale = run.compiler.get(nfe), scale_of(run.compiler.schedule, 0)
        arguments = run.measure, sampler, params, scale, 2 * run.size.eval_batch, run.size.eval_batch
        distance(*arguments)
        seconds[str(nfe)] = _timed(distance, *arguments)[1] / 2
    return seconds


def train_objective(settings: Settings, run: Run, images: Path, objective: str, seconds: float) -> dict[str, Any]:
    """Trains an objective on for so many seconds, writes its weights, and returns its record."""
    size, config = run.size, config_of(run.size, objective, images)
    before = run.left.objectives.get(objective)
    state = new_state_of(config, run.compiler.network, before)
    key = replicate_key(run_keys(config.train.seed)[1])
    session = train(run.compiler.get(objective), run.feed, key, state, size.chunk, seconds)
    record = _record(before, session, config.train.batch_size)
    params, ema_params = jax.device_get((session.state.params, session.state.ema_params))
    run.left.objectives[objective] = Trained(params, ema_params, record)
    evidence_weights.write(settings.out, run.left)
    return record


def _record(before: Trained | None, session: Session, batch_size: int) -> dict[str, Any]:
    earlier: dict[str, Any] = before.record if before else {"step": 0, "seconds": 0.0, "sessions": [], "losses": []}
    step, seconds = int(session.state.step), earlier["seconds"] + session.seconds
    steps = step - earlier["step"]
    this = {
        "device": jax.devices()[0].device_kind,
        "first_step": earlier["step"],
        "last_step": step,
        "seconds": session.seconds,
        "steps_per_second": steps / session.seconds,
        "moments": "new",
    }
    every = -(-len(session.losses) // _LOGGED_LOSSES)
    thinned = session.losses[::-1][::every][::-1]
    losses = [[step, earlier["seconds"] + spent, loss] for step, spent, loss in thinned]
    return {
        "step": step,
        "images": step * batch_size,
        "seconds": seconds,
        "sessions": [*earlier["sessions"], this],
        "losses": [*earlier["losses"], *losses],
        "rows": [],
    }


def measure(settings: Settings, run: Run, wanted: Iterable[Distance]) -> list[Distance]:
    """Adds distances to the records, in this order while time is left, and returns those that it did not reach."""
    size, batch_seconds, late = run.size, read_state(settings.scratch).batch_seconds, []
    for name, skip, nfe in wanted:
        expected = size.num_batches * batch_seconds.get(str(nfe), 0.0)
        if time.time() + expected + _LAST_SECONDS > settings.deadline:
            late.append((name, skip, nfe))
            continue
        trained = run.left.objectives[name]
        scale, sampler = scale_of(run.compiler.schedule, skip), run.compiler.get(nfe)
        found = distance(run.measure, sampler, trained.ema_params, scale, size.num_images, size.eval_batch)
        row = {"nfe": nfe, "skip_scale": skip, "frechet_distance": found, "num_images": size.num_images}
        trained.record["rows"].append(row)
    evidence_weights.write(settings.out, run.left)
    return late
