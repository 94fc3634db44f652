"""Peak rates and peak memory of the devices, and options of XLA."""

import functools
import os
import re
import resource
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.jax_environment import unusable_platform, xla_flags

# Dense bfloat16 and float16 (V100, T4: float16) TFLOP/s of the makers' data sheets. The first prefix of a device's
# name counts.
_PEAK_TFLOPS = {
    "NVIDIA GB200": 2500,
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA GH200": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100": 989,
    "NVIDIA A100": 312,
    "NVIDIA A10G": 70,
    "NVIDIA A10": 125,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 3090": 71,
    "Tesla V100": 125,
    "Tesla T4": 65,
    "TPU v6": 918,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v4": 275,
    "TPU v3": 123,
    "TPU v2": 45,
}

# Of what XLA:CPU leaves to YNNPACK, only the sums: its convolutions take three times as long as Eigen's over the
# weights' gradients, without its sums a step takes half as long again. Eigen's convolutions in a loop are wrong for
# some images on several devices of one CPU (jaxlib 0.10.2): `scripts/dev/xla_cpu_devices.py` shows it,
# `tests/devices/test_sharding.py` compares the steps of a training.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


# Settings of JAX that change the numbers a program computes, and their defaults.
_NUMERICS = {
    "jax_default_matmul_precision": None,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
}
# Variables of JAX that do not; others, also those of later versions, are taken to.
_NO_NUMERICS = re.compile(
    r"JAX_(COMPILATION_CACHE|PERSISTENT_CACHE|ENABLE_COMPILATION_CACHE|RAISE_PERSISTENT|PLATFORM|LOG|EXPLAIN|DEBUG_LOG"
    r"|TRACEBACK|INCLUDE|DUMP|COORDINATOR|PROCESS|NUM_PROCESSES|LOCAL_DEVICE|DISTRIBUTED|PROFILER|TRACER_ERROR|CAPTURED"
    r"|SHARE_BINARY).*"
)
# Of CUDA's libraries and of TPUs.
_OTHER_NUMERICS = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "LIBTPU_INIT_ARGS")


def check_devices() -> None:
    """Raises a `UserError` if a variable of the environment names a platform that this machine, or this installation of
    JAX, lacks; to call before the first computation.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    legacy = {name: os.environ[name] for name in ("JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE") if os.environ.get(name)}
    try:
        jax.devices()
        for name in legacy.values():
            jax.devices(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        if legacy and reason.startswith("Unknown backend"):
            settings = " ".join(f"{name}={value}" for name, value in legacy.items())
            raise UserError(f"{settings} names a platform that is not available here ({reason}); unset it") from error
        if not platforms:
            raise
        raise unusable_platform(platforms, reason) from error


def compiler_options(cpu_options: Mapping[str, str] = CPU_OPTIONS) -> dict[str, str]:
    """`jax.jit`'s `compiler_options` for a network: none but on a single CPU device whose jaxlib accepts them."""
    single_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return dict(cpu_options) if single_cpu and _accepts(tuple(cpu_options.items())) else {}


def jit_network(**options: Any) -> Callable[[Callable], Callable]:
    """A decorator: `jax.jit` with `compiler_options`, which depend on devices that are unknown until the first call.

    The function cannot be called inside another compiled one.
    """

    def decorate(function: Callable) -> Callable:
        compiled = functools.cache(lambda: jax.jit(function, compiler_options=compiler_options(), **options))
        return functools.wraps(function)(lambda *arguments: compiled()(*arguments))

    return decorate


@functools.cache
def _accepts(options):
    try:
        jax.jit(lambda x: x, compiler_options=dict(options))(0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def numerics() -> dict[str, Any]:
    """Settings of JAX, XLA and the devices' libraries that change results, if they are not the defaults."""
    settings = {name: getattr(jax.config, name) for name in _NUMERICS}
    found = {name: value for name, value in settings.items() if value != _NUMERICS[name]}
    if flags := xla_flags():
        found["XLA_FLAGS"] = sorted(flags)
    for name, value in sorted(os.environ.items()):
        unknown = name.startswith("JAX_") and name.lower() not in _NUMERICS and not _NO_NUMERICS.fullmatch(name)
        if value and (name, value) != ("JAX_NUM_CPU_DEVICES", "-1") and (unknown or name in _OTHER_NUMERICS):
            found[name] = value
    if jax.default_backend() != "cpu":
        found["device"] = jax.devices()[0].device_kind
    return found


def peak_flops(dtype: str) -> float | None:
    """FLOP/s of matrix products over all devices; None if unknown, as float32's, which depends on settings."""
    kind = jax.devices()[0].device_kind
    for name, tflops in _PEAK_TFLOPS.items():
        if kind.startswith(name) and dtype in ("bfloat16", "float16"):
            return tflops * 1e12 * jax.device_count()
    return None


def memory_limit() -> int:
    """Bytes that the smallest of this host's devices can hold, or on CPU the machine."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    reported = [limit for limit in limits if limit]
    return min(reported) if reported else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """The most bytes that the fullest of this host's devices held, or on CPU the process."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if reported := [peak for peak in peaks if peak is not None]:
        return max(reported)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
