"""What a train step is predicted to take, from the costs of its kernels and the rates of a card; no jax.

A kernel takes max(FLOPs/rate, bytes/bandwidth), a step the sum of its kernels: none runs beside another.
"""

from collections.abc import Iterable
from typing import Any

from kernel_costs import CLASSES, Kernel

# Shortest time that a kernel is worth on a GPU: what it takes to start one.
_LAUNCH_SECONDS = 2e-6
_COSTLIEST = 20


def kernel_seconds(kernel: Kernel, rate: float, bandwidth: float) -> float:
    """Predicted seconds of one run of a kernel at a rate in FLOP/s and a bandwidth in bytes/s."""
    return max(kernel.flops / rate, kernel.bytes / bandwidth)


def by_class(kernels: Iterable[Kernel], rate: float, bandwidth: float) -> dict[str, dict[str, float]]:
    """{"kernels", "gflop", "gb", "ms"} of each class that occurs, in a step."""
    sums = {kind: {"kernels": 0, "gflop": 0.0, "gb": 0.0, "ms": 0.0} for kind in CLASSES}
    for kernel in kernels:
        of_class = sums[kernel.kind]
        of_class["kernels"] += kernel.times
        of_class["gflop"] += kernel.times * kernel.flops / 1e9
        of_class["gb"] += kernel.times * kernel.bytes / 1e9
        of_class["ms"] += kernel.times * kernel_seconds(kernel, rate, bandwidth) * 1e3
    return {kind: of_class for kind, of_class in sums.items() if of_class["kernels"]}


def predict(
    kernels: list[Kernel], least: list[Kernel], rate: float, bandwidth: float, images: int, flops: int
) -> dict[str, Any]:
    """The prediction as plain data.

    Args:
      kernels: of the compiled step.
      least: the kernels that would move the least (`least.py`).
      rate, bandwidth: FLOP/s and bytes/s.
      images, flops: of a step, the latter as `models.flops.step_flops` counts.
    """
    classes, least_classes = by_class(kernels, rate, bandwidth), by_class(least, rate, bandwidth)
    for kind, of_class in classes.items():
        of_least = least_classes.get(kind, {"gb": 0.0, "ms": 0.0})
        of_class.update(least_gb=of_least["gb"], least_ms=of_least["ms"])
    total, least_total = (sum(c["ms"] for c in table.values()) for table in (classes, least_classes))
    seconds = [kernel_seconds(kernel, rate, bandwidth) for kernel in kernels for _ in range(kernel.times)]
    short = [s for s in seconds if s < _LAUNCH_SECONDS]
    ordered = sorted(kernels, key=lambda k: -k.times * kernel_seconds(k, rate, bandwidth))
    return {
        "rate_tflops": rate / 1e12,
        "bandwidth_tb_per_s": bandwidth / 1e12,
        "classes": classes,
        "step_gflop": flops / 1e9,
        "ms": total,
        "images_per_s": images / total * 1e3,
        "share_of_rate": flops / (total / 1e3) / rate,
        "least_ms": least_total,
        "least_images_per_s": images / least_total * 1e3,
        "short_kernels": len(short),
        "ms_with_launches": total + (len(short) * _LAUNCH_SECONDS - sum(short)) * 1e3,
        "costliest": [kernel._asdict() for kernel in ordered[:_COSTLIEST]],
    }


def table(prediction: dict[str, Any]) -> str:
    """The prediction by class, and its sum, as a Markdown table."""
    columns = ("gflop", "gb", "least_gb", "ms", "least_ms")
    classes = prediction["classes"]
    total = {name: sum(c[name] for c in classes.values()) for name in ("kernels", *columns)}
    lines = [
        "| class | kernels | GFLOP | GB moved | GB least | predicted ms | least ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in {**classes, "total": total}.items():
        figures = f"{row['gflop']:,.0f} | {row['gb']:.2f} | {row['least_gb']:.2f} | {row['ms']:.2f}"
        lines.append(f"| {name} | {row['kernels']:,} | {figures} | {row['least_ms']:.2f} |")
    return "\n".join(lines)


def summary(prediction: dict[str, Any]) -> str:
    """The prediction in two sentences."""
    p = prediction
    return (
        f"predicted at {p['rate_tflops']:g} TFLOP/s and {p['bandwidth_tb_per_s']:g} TB/s: {p['ms']:.2f} ms per step, "
        f"{p['images_per_s']:,.0f} images/s, {p['share_of_rate']:.0%} of the rate; "
        f"the least is {p['least_ms']:.2f} ms\n"
        f"{p['short_kernels']:,} kernels are predicted below 2 µs, less than it takes to start one; at 2 µs each "
        f"{p['ms_with_launches']:.2f} ms per step"
    )
