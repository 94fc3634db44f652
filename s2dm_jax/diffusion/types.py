"""The interfaces that hold the package together: networks and noise as functions."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

# (x: f32[B, H, W, C], t: f32[B]) -> the noise in x, same shape; t in [0, T), fractional in F-PNDM alone.
EpsFn = Callable[[jax.Array, jax.Array], jax.Array]

# Index of a sampling step, counted from 0 -> standard normal [B, H, W, C].
NoiseFn = Callable[[jax.Array], jax.Array]

# What a sampler returns: x_0, or with `return_x0` a pair, for which Any spares every other caller a check.
SamplerOutput = jax.Array | Any

# ε, or of a network with a second head both outputs.
Output = TypeVar("Output")

# (x: f32[B, H, W, C], t: f32[B]) -> the noise in x and the second head's output, both of x's shape.
EpsVarianceFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
