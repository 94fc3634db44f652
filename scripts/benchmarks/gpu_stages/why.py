"""Stage "why" of `gpu.py`: where the time of the CIFAR-10 step goes, and which options of XLA change it."""

import functools
import time
from collections.abc import Mapping
from typing import Any

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
# For running and reading a second profile.
_MARGIN_SECONDS = 15.0


@functools.lru_cache(maxsize=1)
def program(tiny: bool) -> TrainProgram:
    """The compiled chunk, once for the parts that share a process."""
    return compile_train(published_config(CONFIG, tiny), 2 if tiny else CHUNK)


def profile(settings: Settings) -> dict[str, Any]:
    """Profiles train steps as they are trained; and without command buffers, if those hide the kernels."""
    end = _end(settings, "profile")
    compiled = program(settings.tiny)
    compiled.run()
    events = trace.record(compiled.run, settings.scratch / "trace")
    if not events:
        raise RuntimeError("the profiler's trace has no events of the device; is CUPTI there?")
    text = compiled.compiled.as_text()
    kernels, contained = kernels_of(text)
    events = [event for event in events if event.hlo_op not in contained]
    window = trace.cut(events, compiled.steps, PROFILED)
    share = trace.known_share(window.events, kernels)
    record = {"ms_per_step": None, "known_share": share, "kernels_from": "as trained"}
    seen = window
    if share < 0.5 and settings.device == "gpu":
        if time.time() + compiled.compile_seconds + _MARGIN_SECONDS > end:
            record["kernels_from"] = "as trained, though command buffers hide most; no time for a second profile"
        else:
            seen, kernels = _without_command_buffers(compiled, settings)
            record["kernels_from"] = "a second profile, without command buffers"
            record["known_share_second"] = trace.known_share(seen.events, kernels)
    gaps, busy = trace.gaps(window)
    record.update(steps=window.steps, events_per_step=len(window.events) / window.steps, busy=busy, gaps=gaps)
    record.update(ms_per_step=busy["span_ms"], kernels=trace.costliest(seen, kernels))
    record["classes"] = _beside_prediction(trace.classes(seen, kernels), kernels, settings, record)
    return {**record, "summary": _profile_summary(record)}


def kernels_of(text: str) -> tuple[dict[str, Any], set[str]]:
    """The kernels of a compiled program by name, and the names of loops and calls, which contain others."""
    module = hlo.parse(text)
    instructions = (i for c in module.computations.values() for i in c.instructions.values())
    contained = {i.name for i in instructions if i.opcode in hlo.CONTAINERS}
    step = {kernel.name: kernel for kernel in kernel_costs.step_kernels(module)}
    # What runs once before and after the loop has no share in a step.
    outside = kernel_costs.program_kernels(module)
    return {name: step.get(name, kernel._replace(times=0)) for name, kernel in outside.items()}, contained


def _without_command_buffers(compiled: TrainProgram, settings: Settings) -> tuple[trace.Window, dict[str, Any]]:
    run, executable = compiled.variant(_NO_COMMAND_BUFFERS)
    run()
    kernels, contained = kernels_of(executable.as_text())
    events = trace.record(run, settings.scratch / "trace")
    return trace.cut([e for e in events if e.hlo_op not in contained], compiled.steps, PROFILED), kernels


def _beside_prediction(
    measured: dict[str, Any], kernels: Mapping[str, Any], settings: Settings, record: dict[str, Any]
) -> dict[str, Any]:
    """Each class with what it was predicted to take at the measured rates, if stage "fast" has measured them."""
    rates = result_of(settings.out, "fast", "rates") or {}
    rate = rates.get("matmul_flops_per_s") or _RATE
    bandwidth = rates.get("copy_bytes_per_s") or _BANDWIDTH
    predicted = predict.by_class((k for k in kernels.values() if k.times), rate, bandwidth)
    record["rates"] = {"flops_per_s": rate, "bytes_per_s": bandwidth, "measured": bool(rates)}
    record["predicted_ms_per_step"] = sum(of_class["ms"] for of_class in predicted.values())
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


PARTS = {"profile": Part(profile, 110), "flags": Part(measure_flags, 150)}
