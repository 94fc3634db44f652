"""Process setup of a command before any work: the output's encoding, JAX's settings."""

import io
import os
import sys
import warnings

_OFF = frozenset({"", "0", "n", "no", "f", "false", "off"})
_ON = frozenset({"", "1", "y", "yes", "t", "true", "on"})
_ALLOW = frozenset({"", "allow"})

# Settings of JAX that change what the same command computes, or that its programs are not written for, with the values
# that do neither.
_IGNORED = {
    "JAX_ENABLE_X64": _OFF,
    "JAX_EXPLICIT_X64_DTYPES": frozenset({"", "warn"}),
    "JAX_NUMPY_DTYPE_PROMOTION": frozenset({"", "standard"}),
    "JAX_NUMPY_RANK_PROMOTION": _ALLOW,
    "JAX_DEBUG_NANS": _OFF,
    "JAX_DEBUG_INFS": _OFF,
    "JAX_DEBUG_KEY_REUSE": _OFF,
    "JAX_DISABLE_JIT": _OFF,
    "JAX_NO_TRACING": _OFF,
    "JAX_NO_EXECUTION": _OFF,
    "JAX_CHECK_TRACER_LEAKS": _OFF,
    "JAX_TRANSFER_GUARD": _ALLOW,
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": _ALLOW,
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": _ALLOW,
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": _ALLOW,
    "JAX_DEFAULT_PRNG_IMPL": frozenset({"", "threefry2x32"}),
    "JAX_RANDOM_SEED_OFFSET": frozenset({"", "0"}),
    "JAX_THREEFRY_PARTITIONABLE": _ON,
    "JAX_ENABLE_CUSTOM_PRNG": _OFF,
    "JAX_LEGACY_PRNG_KEY": _ALLOW,
}


def set_up_process() -> None:
    """Makes a command's output and results independent of its environment; before jax is imported.

    Characters that stdout and stderr cannot encode become question marks; a closed stdout or stderr, such as after
    `>&-`, is opened to nowhere, before a file that is written gets its descriptor. JAX settings in the environment that
    would change the results are removed, each with a line on stderr. Warnings are one line, without a line of source.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for name, neutral in _IGNORED.items():
        value = os.environ.pop(name, "")
        if value.strip().lower() not in neutral:
            print(f"note: {name}={value} is ignored: it would change results or break programs", file=sys.stderr)
