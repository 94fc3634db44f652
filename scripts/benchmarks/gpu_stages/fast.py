"""Stage 2 of `gpu.py`: how fast this card is, and train steps, sampling and evaluation on it.

Every timed train step is a dict of `figures.figures` under its name in "programs" of a part's result.
"""

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from train import cache_in, worker_settings
from workers import Worker, WorkerFailed

from gpu_stages import rates, sampling, torch_side
from gpu_stages.figures import figures, in_words, measured_matmul_rate, times
from gpu_stages.parts import Part, Settings
from gpu_stages.programs import TrainProgram, compile_train, differing_loss, interleave, published_config, ratio

_CIFAR10 = "configs/cifar10.py:ddpm"
_OBJECTIVES = {"plain": _CIFAR10, "L_skip": "configs/cifar10.py:s2_10", "K = 2": "configs/cifar10.py:sa_2"}
_CELEBA64 = "configs/celeba64.py:ddpm"
_CELEBAHQ256 = "configs/celebahq256.py:ddpm"
# Losses of its first steps in float32 on a CPU: what a tuned program computes is checked as well.
_CIFAR10_LOSSES = (3432.45, 2651.64)
# Steps of a round, which is about a second.
_STEPS = {"cifar10": 50, "celeba64": 20, "celebahq256": 8}
_MOST_ROUNDS = 5
# Seconds of a part that are left for its rounds, for compiling a program that it can do without, and for all that
# comes after a cold start.
_ROUNDS_SECONDS, _COMPILE_SECONDS, _AFTER_COLD_SECONDS = 40.0, 60.0, 60.0


def cifar10(settings: Settings) -> dict[str, Any]:
    """The step beside PyTorch's, its losses, and its compilation without and with the entries of a cache."""
    stop_at = _stop_at(settings, "cifar10")
    config = published_config(_CIFAR10, settings.tiny)
    # `torch.compile` takes longer than all of ours, the cold start included.
    with torch_side.torch_workers(settings, config, _variants(settings)) as workers:
        cold, notes = _cold_start(settings, _CIFAR10, stop_at)
        # The programs of the next part are compiled while PyTorch gets ready.
        found = _beside_torch(settings, "CIFAR-10 step", _CIFAR10, workers, stop_at, _OBJECTIVES.values())
    found["notes"] |= notes
    if cold:
        ours = found["programs"]["s2dm_jax"]
        warm = ours["compile_s"] if "JAX_COMPILATION_CACHE_DIR" in os.environ else None
        ours |= {"trace_s": cold["trace"], "compile_s": cold["compile"], "compile_warm_s": warm}
        ours["peak_bytes"] = cold["peak_bytes"]
        found["summary"] += f"; to compile {cold['compile']:.1f} s cold" + (f", {warm:.1f} s warm" if warm else "")
    wrong = "" if settings.tiny else differing_loss(_program(False, _CIFAR10).run.losses, _CIFAR10_LOSSES)
    if wrong:
        found["summary"] += f"; {wrong}"
    return {**found, "passed": not wrong}


def objectives(settings: Settings) -> dict[str, Any]:
    """Plain training, L_skip and K = 2 in turns. They may have been compiled beside PyTorch, which takes longer."""
    cases = {name: (config,) for name, config in _OBJECTIVES.items()}
    return _compare(settings, "CIFAR-10 objectives", cases, _stop_at(settings, "objectives"))


def celeba64(settings: Settings) -> dict[str, Any]:
    """The step of CelebA's config."""
    return _compare(settings, "CelebA 64 step", {"plain": (_CELEBA64,)}, _stop_at(settings, "celeba64"))


def celebahq256(settings: Settings) -> dict[str, Any]:
    """The step of CelebA-HQ's config, with the activations in memory and recomputed."""
    cases = {"plain": (_CELEBAHQ256,), "remat": (_CELEBAHQ256, True)}
    return _compare(settings, "CelebA-HQ 256 step", cases, _stop_at(settings, "celebahq256"))


def cifar10_k2_torch(settings: Settings) -> dict[str, Any]:
    """K = 2 beside `torch.compile`."""
    return _beside_compiled(settings, "cifar10_K2_torch", "CIFAR-10 step with K = 2", _OBJECTIVES["K = 2"])


def celeba64_torch(settings: Settings) -> dict[str, Any]:
    """CelebA beside `torch.compile`."""
    return _beside_compiled(settings, "celeba64_torch", "CelebA 64 step", _CELEBA64)


# A process of its own, with none of the memory that JAX does not return: PyTorch needs it.
_FRESH = {"S2DM_JAX_BENCHMARK_PROCESS": "beside PyTorch"}
# What each part may take; the first six are expected to take four minutes together.
PARTS = {
    "rates": Part(rates.run, 30),
    "cifar10": Part(cifar10, 200),
    "objectives": Part(objectives, 250),
    "sampling": Part(sampling.sampling, 50),
    "inception": Part(sampling.inception, 50),
    "end_to_end": Part(sampling.end_to_end, 100),
    "celeba64": Part(celeba64, 100),
    "celebahq256": Part(celebahq256, 250),
    "cifar10_K2_torch": Part(cifar10_k2_torch, 120, _FRESH),
    "celeba64_torch": Part(celeba64_torch, 150, _FRESH),
}


def _compare(settings: Settings, title: str, cases: Mapping[str, tuple], stop_at: float) -> dict[str, Any]:
    """Programs in turns, by name and arguments of `_program`; the first is what the others are relative to."""
    programs = _compiled_in_time(settings.tiny, cases, stop_at)
    runs = {name: program.run for name, program in programs.items()}
    seconds = interleave(runs, _MOST_ROUNDS, _last_round(settings, stop_at))
    rate, (base, *others) = measured_matmul_rate(settings), programs
    found = {name: figures(program, seconds[name], rate) for name, program in programs.items()}
    line = f"{title}, batch {found[base]['batch']}, {found[base]['dtype']}: {in_words(found[base])}"
    for name in others:
        found[name][f"ratio_to_{base}"] = ratio(seconds[name], seconds[base])
        memory = found[name]["memory_bytes"]
        line += f"; {name} {times(found[name][f'ratio_to_{base}'])}"
        line += "" if memory is None else f", {memory / 1e9:.1f} GB"
    notes = dict.fromkeys(cases.keys() - programs.keys(), "there was no time to compile it")
    return {"summary": line + _in_words(notes), "programs": found, "notes": notes}


def _compiled_in_time(tiny: bool, cases: Mapping[str, tuple], stop_at: float) -> dict[str, TrainProgram]:
    """The first program, and of the others as many as can be compiled and timed before `time.time()` is `stop_at`."""
    programs, slowest = {}, 0.0
    for name, arguments in cases.items():
        began = time.time()
        if programs and began + 1.5 * slowest + _ROUNDS_SECONDS > stop_at:
            break
        programs[name] = _program(tiny, *arguments)
        slowest = max(slowest, time.time() - began)
    return programs


def _beside_compiled(settings: Settings, part: str, title: str, name: str) -> dict[str, Any]:
    """A config's step and that of `torch.compile`; a rehearsal has PyTorch in `cifar10` alone."""
    stop_at, variants = _stop_at(settings, part), ("torch.compile",) if settings.device == "gpu" else ()
    with torch_side.torch_workers(settings, published_config(name, settings.tiny), variants) as workers:
        return _beside_torch(settings, title, name, workers, stop_at)


def _beside_torch(
    settings: Settings, title: str, name: str, workers: dict[str, Worker], stop_at: float, later: Iterable[str] = ()
) -> dict[str, Any]:
    """A config's step and PyTorch's in turns; `later` are configs to compile while PyTorch gets ready."""
    program = _program(settings.tiny, name)
    ready_by = stop_at - _ROUNDS_SECONDS
    for other in later:
        waits = any(worker.is_preparing for worker in workers.values())
        if waits and time.time() + _COMPILE_SECONDS < ready_by:
            _program(settings.tiny, other)
    notes = torch_side.wait_until_ready(workers, program.parameters, ready_by)
    seconds, failed = torch_side.interleave_with_torch(
        program.run, workers, program.steps, _MOST_ROUNDS, _last_round(settings, stop_at)
    )
    rate = measured_matmul_rate(settings)
    ours = figures(program, seconds["s2dm_jax"], rate)
    found, line = {"s2dm_jax": ours}, f"{title}, batch {ours['batch']}, {ours['dtype']}: {in_words(ours)}"
    for name, worker in workers.items():
        relative = ratio(seconds[name], seconds["s2dm_jax"])
        ready = worker.ready()
        others = {"memory_bytes": worker.peak_bytes, "compile_s": ready["first_step"], "trace_s": None}
        others |= {"version": ready["version"], "ratio_to_s2dm_jax": relative}
        found[name] = figures(program, seconds[name], rate, **others)
        line += f"; {name} {times(relative)}"
    notes |= failed
    return {"summary": line + _in_words(notes), "programs": found, "notes": notes}


def _cold_start(settings: Settings, name: str, stop_at: float) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """What `train.py` reports of a config's program that it compiles with an empty cache, or else the reason.

    A process of its own, whose peak memory is that of this program alone. Its cache is this process's folder, emptied
    for as long, since some versions of JAX find an entry only in a folder of the same name: this process then
      compiles the
    same program with a warm cache.
    """
    limit = stop_at - time.time() - _AFTER_COLD_SECONDS
    if limit < _COMPILE_SECONDS:
        return None, {"cold start": "there was no time for it"}
    job = worker_settings(name, {}, _steps(settings.tiny, name), settings.device, settings.tiny)
    own = tempfile.mkdtemp(prefix="cold_", dir=settings.scratch)
    cache, aside = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{own}/cache")), Path(own, "aside")
    if cache.is_dir():
        shutil.move(cache, aside)
    try:
        with open(f"{own}/errors.txt", "w", encoding="utf-8") as errors:
            worker = Worker(sys.executable, "train.py", job, cache_in(str(cache)), errors)
        try:
            cold = worker.ready(limit)
            worker.run(job["steps"], timeout=20)
        finally:
            worker.stop()
    except WorkerFailed as failure:
        return None, {"cold start": str(failure)[:300]}
    finally:
        if aside.is_dir():
            shutil.copytree(aside, cache, dirs_exist_ok=True)
    return {**cold, "peak_bytes": worker.peak_bytes}, {}


@functools.cache
def _program(tiny: bool, name: str, remat: bool = False) -> TrainProgram:
    """A config's chunk of train steps, compiled once in a process for all parts that need it."""
    fields = {"model.remat": True} if remat else {}
    return compile_train(published_config(name, tiny, **fields), _steps(tiny, name))


def _steps(tiny: bool, name: str) -> int:
    return 2 if tiny else _STEPS[Path(name.partition(":")[0]).stem]


def _variants(settings: Settings) -> tuple[str, ...]:
    return ("torch.compile", "torch eager") if settings.device == "gpu" else ("torch eager",)


def _in_words(notes: Mapping[str, str]) -> str:
    return "".join(f"; {name}: {note}" for name, note in notes.items())


def _stop_at(settings: Settings, part: str) -> float:
    end = time.time() + PARTS[part].seconds
    # A rehearsal does everything.
    return end if settings.tiny else min(settings.deadline, end)


def _last_round(settings: Settings, stop_at: float) -> float:
    """When rounds beyond the third are no longer begun."""
    return 0.0 if settings.tiny else stop_at - 15
