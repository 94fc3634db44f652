"""Options of XLA worth a try, one by one, on a compiled chunk of train steps."""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_stages.parts import Settings
from gpu_stages.programs import ChunkRun, TrainProgram, differing_loss, ratio, spread

_CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"
# Names of jaxlib 0.11.2, in the order in which they are tried; those of which most is hoped come first.
FLAGS: dict[str, dict[str, Any]] = {
    "no command buffers": {"xla_gpu_enable_command_buffer": ""},
    "latency-hiding scheduler": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    "no autotuning": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False},
    "cuDNN product fusions": {"xla_gpu_cudnn_gemm_fusion_level": "2"},
    "cuDNN convolution fusions": {"xla_gpu_experimental_enable_conv_fusion": True},
    "loops in command buffers": {"xla_gpu_enable_command_buffer": f"{_CAPTURED},WHILE,CONDITIONAL"},
    "Triton multi-output fusions": {"xla_gpu_unsupported_enable_triton_multi_output_fusion": True},
    "block-level fusions": {"xla_gpu_experimental_enable_fusion_block_level_rewriter": True},
    "fusions tuned": {"xla_gpu_experimental_enable_fusion_autotuner": True},
    "concurrent command buffers": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    "programmatic launch": {"xla_gpu_enable_pdl": True},
    "loop unrolled twice": {"xla_gpu_enable_while_loop_unrolling": "WHILE_LOOP_UNROLLING_DOUBLE_BUFFER"},
    "cuDNN runtime fusions": {"xla_gpu_use_runtime_fusion": True},
    "two compute streams": {"xla_gpu_executable_num_compute_streams": 2},
    "exhaustive tiling": {"xla_gpu_exhaustive_tiling_search": True},
}
# So many are tried in a rehearsal, and one that no jaxlib has.
_REHEARSED = 1
_UNHEARD_OF = {"refused": {"xla_gpu_no_such_option": True}}
# A compilation keeps several cores busy: more at once would all end too late.
_WORKERS, _MOST_ROUNDS = 3, 9
_MARGIN_SECONDS = 5.0
# Shares of the time that is left in which a compilation may begin, and is waited for; the rest is for the rounds.
_BEGIN_SHARE, _WAIT_SHARE = 0.45, 0.75


def measure(program: TrainProgram, settings: Settings, end: float) -> dict[str, Any]:
    """Compiles the variants in threads, then times those that are ready, in turns with the program itself.

    `end` is the `time.time()` at which it must be done. Some options may end the process: what each has come to is in
    `why_flags.json` until the result is returned.
    """
    end -= _MARGIN_SECONDS
    table = {**dict(list(FLAGS.items())[:_REHEARSED]), **_UNHEARD_OF} if settings.tiny else FLAGS
    records: dict[str, dict[str, Any]] = {
        name: {"options": options, "status": "not reached"} for name, options in table.items()
    }
    workers = 2 if settings.tiny else _WORKERS
    path = settings.out / "why_flags.json"
    save = functools.partial(_save, path, records)
    runs, compiling = compile_variants(program, records, save, workers, *_limits(end))
    rounds = 2 if settings.tiny else _MOST_ROUNDS
    seconds = rounds_in_turns({"as trained": program.run, **runs}, records, rounds, end)
    base = seconds.pop("as trained", [])
    for name, taken in seconds.items():
        if taken and records[name]["status"] == "compiled":
            wrong = differing_loss(runs[name].losses, program.run.losses)
            status = f"wrong: {wrong}" if wrong else "measured"
            records[name].update(status=status, ratio=ratio(taken, base[: len(taken)]))
    result = {
        "flags": records,
        "rounds": len(base),
        "steps_per_round": program.steps,
        # Compilations that go on tune kernels on the same device.
        "compiling_meanwhile": compiling,
        "as_trained_ms": spread(1e3 * s / program.steps for s in base) if base else None,
    }
    path.unlink(missing_ok=True)
    return {**result, "summary": _summary(result)}


def _limits(end: float) -> tuple[float, float]:
    """Until when a compilation may begin, and until when it is waited for."""
    left = max(0.0, end - time.time())
    return time.time() + _BEGIN_SHARE * left, time.time() + _WAIT_SHARE * left


def _save(path: Path, records: Mapping[str, dict[str, Any]]) -> None:
    # A full disk must not cost the measurement.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")


def compile_variants(
    program: TrainProgram,
    records: Mapping[str, dict[str, Any]],
    save: Callable[[], None],
    workers: int,
    begin_until: float,
    wait_until: float,
) -> tuple[dict[str, ChunkRun], list[str]]:
    """Runs of the variants that were compiled in time, and the names of those that still compile.

    The status of each record becomes "compiled", "refused: …" or "still compiling", or stays "not reached".
    """
    runs: dict[str, ChunkRun] = {}
    todo, lock = iter(records), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                name = next(todo, None)
                if name is None or time.time() > begin_until:
                    return
                records[name]["status"] = "still compiling"
                save()
            began = time.time()
            try:
                run, _ = program.variant(records[name]["options"])
            except Exception as error:
                outcome, run = f"refused: {str(error).splitlines()[0][:200] if str(error) else repr(error)}", None
            else:
                outcome = "compiled"
            with lock:
                if records[name]["status"] == "still compiling":
                    records[name].update(status=outcome, compile_s=time.time() - began)
                    if run is not None:
                        runs[name] = run
                    save()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, wait_until - time.time()))
    with lock:
        late = [name for name, record in records.items() if record["status"] == "still compiling"]
        for name in late:
            records[name]["status"] = "not reached: still compiling"
        return dict(runs), late


def rounds_in_turns(
    runs: Mapping[str, Callable[[], float]], records: Mapping[str, dict[str, Any]], rounds: int, end: float
) -> dict[str, list[float]]:
    """Seconds of each run in each round that was in time, after one of each that does not count.

    A run that fails becomes its record's status and is left out: options may make programs that cannot run.
    """
    going = dict(runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        began = time.time()
        for name, run in list(going.items()):
            if time.time() > end:
                return seconds
            try:
                taken = run()
            except Exception as error:
                if name not in records:
                    raise
                records[name]["status"] = f"failed: {str(error)[:200]}"
                del going[name]
                continue
            if index:
                seconds[name].append(taken)
        if time.time() + (time.time() - began) > end:
            break
    return seconds


def _summary(result: dict[str, Any]) -> str:
    measured = {name: record for name, record in result["flags"].items() if record["status"] == "measured"}
    ordered = sorted(measured, key=lambda name: measured[name]["ratio"]["median"])
    ratios = ", ".join(f"{name} {measured[name]['ratio']['median']:.3f}" for name in ordered) or "none measured"
    others = len(result["flags"]) - len(measured)
    return f"step as trained = 1 ({result['rounds']} rounds): {ratios}; {others} of {len(result['flags'])} not measured"
