"""The networks of the stage `evidence`: configs, compiled programs, training for a time, distances."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gpu_stages.evidence_plan import Size
from gpu_stages.evidence_weights import Trained
from gpu_stages.programs import published_config
from s2dm_jax.common.images import to_uint8
from s2dm_jax.config.build import build_network, build_schedule
from s2dm_jax.data.batches import run_keys
from s2dm_jax.data.device_feed import Feed
from s2dm_jax.devices.sharding import replicate, replicate_key, replicated, shard_batch
from s2dm_jax.diffusion.objectives import skip_scale
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.evaluation.evaluate import compute_metrics
from s2dm_jax.evaluation.features import Features
from s2dm_jax.evaluation.reference import Reference
from s2dm_jax.inference.sampler import resolve_program, run_sampler, sample_batches
from s2dm_jax.models.network import Network
from s2dm_jax.training.step import jit_step, make_train_chunk
from s2dm_jax.workdir.state import TrainState, build_optimizer, initial_loss_scale, new_state

METRICS = ["fid"]
# Of the weights that no program depends on, and of the noise that all samples start from.
SEED = 0


def config_of(size: Size, objective: str, images: Path) -> ConfigDict:
    """The config of an objective: that of CIFAR-10 with a small network, on the images."""
    fields = {"data.source": str(images), "eval.feature_extractor": "classifier", "eval.num_images": size.num_images}
    return published_config(f"configs/cifar10.py:{objective}", False, **size.fields, **fields)


class Program(NamedTuple):
    """A compiled program with the seconds that its compilation took."""

    run: Callable[..., Any]
    seconds: float


class Compiler:
    """Compiles the programs in threads, each once, during other work.

    Tracing holds Python's lock and is done by the caller; XLA does not.
    """

    def __init__(self, size: Size, images: Path):
        self.size, self.images = size, images
        config = config_of(size, "ddpm", images)
        self.network: Network = build_network(config)
        self.schedule: NoiseSchedule = build_schedule(config)
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "compile")
        self._programs: dict[str | int, Future[Program]] = {}

    def start(self, name: str | int) -> Future[Program]:
        """Traces the train steps of an objective, or the sampler of an NFE, and starts to compile them."""
        if name not in self._programs:
            began = time.perf_counter()
            lowered = self._lower_train(name) if isinstance(name, str) else self._lower_sampler(name)

            def compiled() -> Program:
                run = lowered.compile()
                return Program(run, time.perf_counter() - began)

            self._programs[name] = self._pool.submit(compiled)
        return self._programs[name]

    def get(self, name: str | int) -> Callable[..., Any]:
        """The compiled program."""
        return self.start(name).result().run

    def seconds(self) -> dict[str | int, float]:
        """What the compilation of each program took that did not fail."""
        done = {name: future for name, future in self._programs.items() if future.done() and not future.exception()}
        return {name: future.result().seconds for name, future in done.items()}

    def is_compiled(self, name: str | int) -> bool:
        """Whether `get` returns at once."""
        return name in self._programs and self._programs[name].done()

    def _lower_train(self, objective: str) -> jax.stages.Lowered:
        # The images are an argument, not rows of the dataset: no program waits for the dataset.
        config = config_of(self.size, objective, self.images)
        chunk = make_train_chunk(config, self.network, build_optimizer(config))
        batches = np.zeros((self.size.chunk, config.train.batch_size, *self.network.image_shape), np.uint8)
        arguments = shard_batch(batches, axis=1), replicate_key(run_keys(config.train.seed)[1])
        jitted = jit_step(chunk, out_shardings=replicated())
        return jitted.lower(new_state_of(config, self.network), None, *arguments)

    def _lower_sampler(self, nfe: int) -> jax.stages.Lowered:
        """DDIM of (weights, factors [T], indices [B]) → uint8 images: the factors are an argument."""
        ones = np.ones(self.schedule.T, np.float32)
        program, timesteps, arguments = resolve_program(self.network, self.schedule, "ddim", nfe=nfe, skip_scale=ones)

        def sample(params, scale, indices):
            images = run_sampler(program, params, timesteps, SEED, indices, **{**arguments, "scale": scale})
            return to_uint8(images)

        params, indices = replicate((self.network.init(SEED), ones)), shard_batch(np.arange(self.size.eval_batch))
        return jax.jit(sample).lower(*params, indices)


def new_state_of(config: ConfigDict, network: Network, trained: Trained | None = None) -> TrainState:
    """The state before the first step, or after those of an earlier run but with new moments of Adam."""
    optimizer, loss_scale = build_optimizer(config), initial_loss_scale(config)
    if trained is None:
        state = new_state(network.init(config.train.seed), optimizer, loss_scale)
    else:
        ema = jax.tree.map(np.copy, trained.ema_params)
        step = np.asarray(trained.record["step"], np.int32)
        state = new_state(trained.params, optimizer, loss_scale)._replace(step=step, ema_params=ema)
    return jax.device_put(state, replicated())


class Session(NamedTuple):
    """What a run trained of an objective.

    Attributes:
      state: after its last step.
      seconds: of training alone.
      losses: [step, seconds, mean L_simple] of every chunk.
    """

    state: TrainState
    seconds: float
    losses: list[tuple[int, float, float]]


def train(
    chunk: Callable[..., Any], feed: Feed, key: jax.Array, state: TrainState, steps: int, seconds: float
) -> Session:
    """Does chunks of `steps` until they have taken `seconds`; what a step sees is a function of (seed, step).

    Raises:
      FloatingPointError: for a loss that is not finite.
    """
    step, spent = int(state.step), 0.0
    losses: list[tuple[int, float, float]] = []
    while spent < seconds:
        began = time.perf_counter()
        state, metrics = chunk(state, None, batches(feed, step, steps), key)
        # Fetching waits for the chunk.
        loss = float(np.mean(metrics["loss_simple"]))
        spent += time.perf_counter() - began
        step += steps
        losses.append((step, spent, loss))
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss of the steps up to {step} is {loss}")
    return Session(state, spent, losses)


def batches(feed: Feed, step: int, steps: int) -> jax.Array:
    """The images of the steps from `step` on, uint8 [steps, B, H, W, C]."""
    rows = feed.batches(step, steps)
    return rows if feed.images is None else _gather(feed.images, rows)


@jax.jit
def _gather(images: jax.Array, rows: jax.Array) -> jax.Array:
    return images[rows]


class Measure(NamedTuple):
    """What samples are compared in and with."""

    features: Features
    reference: Reference


def distance(
    measure: Measure, sampler: Callable[..., jax.Array], params: dict, scale: np.ndarray, num_images: int, batch: int
) -> float:
    """Fréchet distance of images that a sampler makes of weights, its output scaled by `scale` [T]."""
    params, scale = replicate((params, scale))
    samples = sample_batches(
        lambda params, timesteps, seed, indices: sampler(params, scale, indices),
        params,
        np.empty(0),
        seed=SEED,
        num_images=num_images,
        batch_size=batch,
        progress=False,
        postprocess=measure.features.apply,
    )
    return compute_metrics(samples, measure.features, measure.reference, METRICS)["frechet_distance"]


def scale_of(schedule: NoiseSchedule, skip: int) -> np.ndarray:
    """The factor on the network's output that L_skip of this skip would train, float32 [T]; 1 for 0."""
    return (skip_scale(schedule, skip) if skip else np.ones(schedule.T)).astype(np.float32)
