"""The interfaces between networks, objectives and samplers: networks and noise as functions."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

# (x float32 [B, H, W, C], t float32 [B]) → the noise in x, [B, H, W, C]; t in [0, T), fractional in F-PNDM alone.
EpsFn = Callable[[jax.Array, jax.Array], jax.Array]

# (x float32 [B, H, W, C], t float32 [B]) → the noise in x and the output of the variance head, or the network's learned
# variance v, both [B, H, W, C].
EpsVarianceFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# ε, or of a network with a variance head both outputs.
Output = TypeVar("Output")

# Index of a sampling step, counted from 0 → standard normal [B, H, W, C].
NoiseFn = Callable[[jax.Array], jax.Array]

# x_0, or with `return_x0` a pair of it and the predictions; Any, so that no caller has to narrow the type.
SamplerOutput = jax.Array | Any
