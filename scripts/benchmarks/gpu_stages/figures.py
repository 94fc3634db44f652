"""The figures of a timed train step, the same keys for all of them, and their line of Markdown."""

import statistics
from collections.abc import Sequence
from typing import Any

from gpu_stages.parts import Settings, result_of
from gpu_stages.programs import TrainProgram, spread


def figures(program: TrainProgram, seconds: Sequence[float], rate: float | None, **others: Any) -> dict[str, Any]:
    """Figures of a chunk of train steps from its seconds in each round; `others` take the place of the program's own.

    `rate` is the measured FLOP/s of a matrix product. PyTorch's step is that of `program`: the same images and FLOPs.
    """
    median = statistics.median(seconds)
    flops = program.flops * program.steps / median
    return {
        "ms": spread(1e3 * each / program.steps for each in seconds),
        "images_per_s": program.images * program.steps / median,
        "tflops": flops / 1e12,
        "share_of_matmul_rate": flops / rate if rate else None,
        "memory_bytes": program.memory_bytes,
        "compile_s": program.compile_seconds,
        "trace_s": program.trace_seconds,
        "batch": program.images,
        "dtype": program.dtype,
        "steps_per_round": program.steps,
        "rounds": len(seconds),
        **others,
    }


def in_words(figure: dict[str, Any]) -> str:
    """ "14.2 ms (14.1 to 14.4), 9,010 images/s, 330 TFLOP/s, 42 % of the matrix rate, 6.1 GB"."""
    ms, share, memory = figure["ms"], figure["share_of_matmul_rate"], figure["memory_bytes"]
    words = [
        f"{ms['median']:,.4g} ms ({ms['low']:,.4g} to {ms['high']:,.4g})",
        f"{figure['images_per_s']:,.0f} images/s",
        f"{figure['tflops']:,.3g} TFLOP/s",
    ]
    if share is not None:
        words.append(f"{share:.0%} of the matrix rate".replace("%", " %"))
    if memory is not None:
        words.append(f"{memory / 1e9:.1f} GB")
    return ", ".join(words)


def times(ratio: dict[str, float]) -> str:
    """ "1.31× (1.30 to 1.33)"."""
    return f"{ratio['median']:.3f}× ({ratio['low']:.3f} to {ratio['high']:.3f})"


def measured_matmul_rate(settings: Settings) -> float | None:
    """FLOP/s of a matrix product, as part `rates` of this run found it; None without it."""
    rates = result_of(settings.out, "fast", "rates")
    return rates["matmul_flops_per_s"] if rates else None
