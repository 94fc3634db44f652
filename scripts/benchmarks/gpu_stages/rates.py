"""What this device can do at most: matrix products, and reading and writing its memory."""

import time
from collections.abc import Callable
from typing import Any

from gpu_stages.parts import Settings


def run(settings: Settings) -> dict[str, Any]:
    """Part `rates`: FLOP/s of a bfloat16 matrix product, bytes read and written per second."""
    import jax

    flops = matmul_rate(128, 2) if settings.tiny else matmul_rate()
    copied = copy_rate(2**20) if settings.tiny else copy_rate()
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 1e9:.0f} GB usable" if memory else ""
    return {
        "summary": f"{device.device_kind}{size}: bfloat16 matrix product {flops / 1e12:,.4g} TFLOP/s, memory read and "
        f"written at {copied / 1e9:,.4g} GB/s",
        "matmul_flops_per_s": flops,
        "copy_bytes_per_s": copied,
        "device": device.device_kind,
        "memory_bytes": memory,
    }


def matmul_rate(size: int = 8192, repeats: int = 50) -> float:
    """FLOP/s of a large bfloat16 matrix product: the maximum of five measurements."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, repeats, lambda _, y: (x @ y) * jnp.bfloat16(0.01), x)

    return 2 * size**3 * repeats / _shortest(lambda: products(x).block_until_ready())


def copy_rate(size: int = 2**31, repeats: int = 20) -> float:
    """Bytes read and written per second, an array of `size` bytes in place: the maximum of five measurements."""
    import jax
    import jax.numpy as jnp

    # One program a pass, whose passes XLA cannot join; they are queued, so that the device does not wait for Python.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = [jnp.zeros(size // 4, jnp.float32)]

    def passes():
        for _ in range(repeats):
            x[0] = add(x[0])
        x[0].block_until_ready()

    return 2 * size * repeats / _shortest(passes)


def _shortest(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
