"""Stage "why" of `gpu.py`: where the time of the CIFAR-10 step goes, and which options of XLA change it."""

import contextlib
import functools
import json
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import hlo
import kernel_costs
import predict

from gpu_stages import flags, trace
from gpu_stages.parts import Part, Settings, result_of
from gpu_stages.programs import TrainProgram, compile_train, published_config

CONFIG = "configs/cifar10.py:ddpm"
# Steps of a chunk, those of the stage "fast", whose compiled program is in the cache then; and of the profile.
CHUNK, PROFILED = 50, 20
# An H100's best measured rate of a bfloat16 product, and the bandwidth of its data sheet.
_RATE, _BANDWIDTH = 790e12, 3.35e12
_NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
# For compiling, running and reading a second profile; the first program may have come from the cache.
_SECOND_SECONDS = 75.0


class Observed(NamedTuple):
    """A profile, and the kernels of the program by name."""

    window: trace.Window
    kernels: dict[str, kernel_costs.Kernel]


@functools.lru_cache(maxsize=1)
def program(tiny: bool) -> TrainProgram:
    """The compiled chunk, once for the parts that share a process."""
    return compile_train(published_config(CONFIG, tiny), 2 if tiny else CHUNK)


def profile(settings: Settings) -> dict[str, Any]:
    """Profiles train steps as they are trained; and without command buffers, if those hide the kernels."""
    end = _end(settings, "profile")
    compiled = program(settings.tiny)
    first = _observe(compiled.run, compiled.compiled, compiled.steps, settings)
    found: dict[str, Any] = {"known_share": trace.known_share(*first), "kernels_from": "as trained"}
    if found["known_share"] >= 0.5 or settings.device == "cpu":
        return _reduce(found, first, first, settings)
    hidden = "as trained, though command buffers hide most"
    if time.time() + _SECOND_SECONDS > end:
        return _reduce({**found, "kernels_from": f"{hidden}; no time for a second profile"}, first, first, settings)
    # The second may end the process.
    saved = json.dumps(_reduce({**found, "kernels_from": hidden}, first, first, settings), indent=1)
    path = settings.out / "why_profile.json"
    with contextlib.suppress(OSError):
        path.write_text(saved, encoding="utf-8")
    try:
        second = _observe(*compiled.variant(_NO_COMMAND_BUFFERS), compiled.steps, settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return _reduce(
            {**found, "kernels_from": f"{hidden}; a second profile failed: {reason}"}, first, first, settings
        )
    finally:
        path.unlink(missing_ok=True)
    found["known_share_second"] = trace.known_share(*second)
    return _reduce({**found, "kernels_from": "a second profile, without command buffers"}, first, second, settings)


def _observe(run: Callable[[], float], executable: Any, steps: int, settings: Settings) -> Observed:
    """A profile of the middle steps of a chunk, and the kernels of its program."""
    run()
    events = trace.record(run, settings.scratch / "trace")
    try:
        kernels, contained = kernels_of(executable.as_text())
    except Exception:
        # Kernels without their bytes and FLOPs are better than none.
        traceback.print_exc()
        kernels, contained = {}, set()
    events = [event for event in trace.resolved(events, kernels) if event.hlo_op not in contained]
    if not events:
        raise RuntimeError("the profiler's trace has no events of the device; is CUPTI there?")
    return Observed(trace.cut(events, steps, PROFILED), kernels)


def _reduce(found: dict[str, Any], first: Observed, seen: Observed, settings: Settings) -> dict[str, Any]:
    """The part's result: gaps of the steps as trained, kernels of the profile in which they were seen."""
    window, kernels = first.window, seen.kernels
    gaps, busy = trace.gaps(window)
    rate, bandwidth, measured = _rates(settings)
    predicted = predict.by_class((k for k in kernels.values() if k.times), rate, bandwidth)
    result = {
        **found,
        "steps": window.steps,
        "events_per_step": len(window.events) / window.steps,
        "ms_per_step": busy["span_ms"],
        "predicted_ms_per_step": sum(of_class["ms"] for of_class in predicted.values()),
        "rates": {"flops_per_s": rate, "bytes_per_s": bandwidth, "measured": measured},
        "busy": busy,
        "classes": _beside(trace.classes(*seen), predicted),
        "kernels": trace.costliest(*seen),
        "gaps": gaps,
    }
    return {**result, "summary": _profile_summary(result)}


def kernels_of(text: str) -> tuple[dict[str, kernel_costs.Kernel], set[str]]:
    """The kernels of a compiled program by name, and the names of loops and calls, which contain others."""
    module = hlo.parse(text)
    instructions = (i for c in module.computations.values() for i in c.instructions.values())
    contained = {i.name for i in instructions if i.opcode in hlo.CONTAINERS}
    step = {kernel.name: kernel for kernel in kernel_costs.step_kernels(module)}
    # What runs once before and after the loop has no share in a step.
    outside = kernel_costs.program_kernels(module)
    return {name: step.get(name, kernel._replace(times=0)) for name, kernel in outside.items()}, contained


def _rates(settings: Settings) -> tuple[float, float, bool]:
    """FLOP/s, bytes/s, and whether stage "fast" measured them here."""
    rates = result_of(settings.out, "fast", "rates")
    if rates and rates.get("matmul_flops_per_s") and rates.get("copy_bytes_per_s"):
        return rates["matmul_flops_per_s"], rates["copy_bytes_per_s"], True
    return _RATE, _BANDWIDTH, False


def _beside(measured: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each class with what it was predicted to take."""
    nothing = {"ms": 0.0, "share": 0.0, "kernels": 0.0}
    return {
        kind: {
            **measured.get(kind, nothing),
            "predicted_ms": predicted.get(kind, {}).get("ms"),
            "gb": predicted.get(kind, {}).get("gb"),
            "gflop": predicted.get(kind, {}).get("gflop"),
        }
        for kind in dict.fromkeys((*measured, *predicted))
    }


def _profile_summary(record: dict[str, Any]) -> str:
    top = ", ".join(f"{kind} {of_class['ms']:.2f}" for kind, of_class in list(record["classes"].items())[:4])
    busy, first = record["busy"], record["kernels"][0]
    return (
        f"profile of {record['steps']} steps: {record['ms_per_step']:.2f} ms a step (predicted "
        f"{record['predicted_ms_per_step']:.2f}), busy {busy['busy_share']:.0%}; ms by class: {top}; costliest "
        f"`{first['op']}` {first['share']:.1%}; kernels from {record['kernels_from']}"
    )


def measure_flags(settings: Settings) -> dict[str, Any]:
    """The CIFAR-10 step with each option of `flags.FLAGS`, beside the step as it is trained."""
    end = _end(settings, "flags")
    return flags.measure(program(settings.tiny), settings, end)


def _end(settings: Settings, part: str) -> float:
    """When a part that begins now must be done: at the end of its time box or of the stage."""
    return min(settings.deadline, time.time() + PARTS[part].seconds)


PARTS = {"profile": Part(profile, 150), "flags": Part(measure_flags, 150)}
