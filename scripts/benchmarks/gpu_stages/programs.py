"""Compiled train steps of the published configs, as training compiles them, ready to be timed."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Fields that make every config small enough for a rehearsal: 8 × 8 pixels.
_TINY = {
    "data.name": "digits",
    "model.ch": 32,
    "model.ch_mult": (1,),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (),
    "train.batch_size": 4,
}
_NUM_IMAGES = 1024


class ChunkRun:
    """A call does one chunk of a compiled program, waits for it and returns its seconds.

    All variants of a program take turns with one state, which every call donates. The first call of each begins at the
    initial state, so that what variants compute can be compared.

    Attributes:
      losses: of the steps of the first call; empty before it.
    """

    def __init__(self, program: Any, state: list[Any], initial: Callable[[], Any], arguments: tuple):
        self._program, self._state, self._initial, self._arguments = program, state, initial, arguments
        self.losses: list[float] = []

    def __call__(self) -> float:
        import jax
        import numpy as np

        if not self.losses:
            self._state[0] = jax.block_until_ready(self._initial())
        began = time.perf_counter()
        try:
            self._state[0], metrics = self._program(self._state[0], *self._arguments)
            jax.block_until_ready(metrics)
        except Exception:
            # What was donated to a program that failed is lost; the other variants go on from the start.
            self._state[0] = self._initial()
            raise
        seconds = time.perf_counter() - began
        if not self.losses:
            self.losses = np.asarray(metrics["loss"], float).tolist()
        return seconds


class TrainProgram(NamedTuple):
    """A compiled chunk of train steps.

    Attributes:
      run: does one chunk.
      steps: of a chunk.
      images: of a step.
      flops: of a step, as `models.flops.step_flops` counts them.
      parameters: of the network.
      trace_seconds, compile_seconds: what tracing and compiling took.
      memory_bytes: of its arguments and temporaries, as compiled; None where XLA does not tell.
      compiled: XLA's executable, for `as_text()` and `cost_analysis()`.
      variant: compiles the chunk with more options of XLA, without tracing it again: `run` and `compiled` of that. The
        runs of all variants take turns with one state, so only one may be in progress; several threads may compile.
      dtype: of the activations.
    """

    run: ChunkRun
    steps: int
    images: int
    flops: int
    parameters: int
    trace_seconds: float
    compile_seconds: float
    memory_bytes: int | None
    compiled: Any
    variant: Callable[[Mapping[str, Any]], tuple[ChunkRun, Any]]
    dtype: str


def published_config(name: str, tiny: bool, **fields: Any) -> Any:
    """The config "configs/NAME.py:OBJECTIVE", with fields such as `{"model.remat": True}`; `tiny` makes it small."""
    from s2dm_jax.config.io import load_config
    from s2dm_jax.config.validate import check_config

    config = load_config(name)
    for field, value in {**(_TINY if tiny else {}), **fields}.items():
        group, _, key = field.partition(".")
        config[group][key] = value
    check_config(config)
    return config


def compile_train(config: Any, steps: int, options: Mapping[str, str] | None = None) -> TrainProgram:
    """Compiles a chunk of `steps` train steps as training does, on random images that are on the device.

    `options` are XLA's, beside those of training.
    """
    import jax
    import numpy as np

    from s2dm_jax.config.build import build_network, build_objective
    from s2dm_jax.config.defaults import image_shape
    from s2dm_jax.devices import sharding
    from s2dm_jax.devices.hardware import compiler_options
    from s2dm_jax.models.flops import step_flops
    from s2dm_jax.models.network import num_params
    from s2dm_jax.training.step import make_train_chunk
    from s2dm_jax.workdir.state import build_optimizer, init_state, initial_loss_scale

    network, optimizer = build_network(config), build_optimizer(config)
    size, channels = image_shape(config)
    rng = np.random.default_rng(0)
    num_images = min(_NUM_IMAGES, 2**28 // (size * size * channels))
    images = sharding.replicate(rng.integers(0, 256, (num_images, size, size, channels), np.uint8))
    rows = rng.integers(0, num_images, (steps, config.train.batch_size)).astype(np.int32)
    arguments = images, sharding.shard_batch(rows, axis=1), sharding.replicate_key(jax.random.key(0))

    def initial() -> Any:
        return sharding.replicate(init_state(network, optimizer, 0, initial_loss_scale(config)))

    state = [initial()]
    chunk = jax.jit(
        make_train_chunk(config, network, optimizer),
        donate_argnums=0,
        out_shardings=sharding.replicated(),
        compiler_options={**compiler_options(), **(options or {})},
    )
    began = time.perf_counter()
    lowered = chunk.lower(state[0], *arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    ended = time.perf_counter()

    def variant(options: Mapping[str, Any]) -> tuple[ChunkRun, Any]:
        compiled = lowered.compile(compiler_options=dict(options))
        return ChunkRun(compiled, state, initial, arguments), compiled

    K = build_objective(config).num_timesteps_per_image
    return TrainProgram(
        ChunkRun(program, state, initial, arguments),
        steps,
        config.train.batch_size,
        step_flops(network, config.train.batch_size, K),
        num_params(network),
        traced - began,
        ended - traced,
        _memory_bytes(program),
        program,
        variant,
        network.dtype,
    )


def _memory_bytes(program: Any) -> int | None:
    # A program that comes from the compilation cache need not have it, and its time matters more.
    try:
        memory = program.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes
    except Exception as error:
        print(f"XLA does not report the memory of a program: {error!r}")
        return None


def interleave(
    runs: Mapping[str, Callable[[], float]], rounds: int, deadline: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one of each that does not count; one after the other in every round, so
    that a slow moment of the machine affects all of them. After `deadline` (`time.time()`) there are three rounds only.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        if index >= 3 and time.time() > deadline:
            break
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def differing_loss(losses: Sequence[float], expected: Sequence[float], tolerance: float = 0.02) -> str:
    """The first step whose loss differs by more than a relative `tolerance` from what is expected; "" if none does."""
    for step, (loss, right) in enumerate(zip(losses, expected, strict=False)):
        if not abs(loss - right) <= tolerance * abs(right):
            return f"the loss of step {step} is {loss:,.5g}, not {right:,.5g}"
    return ""


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest ratio of two interleaved runs."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    values = list(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
