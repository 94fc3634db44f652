"""Loss scaling (Micikevicius et al. 2018), with which gradients in float16 neither vanish nor overflow.

The loss is multiplied by a factor before its gradient is taken, and the gradient of each weight, float32, is divided by
it. A dynamic factor halves after each step whose gradient overflows, and doubles after a number of steps without an
overflow. `flax.training.dynamic_scale` does the same for one call of `jax.value_and_grad`; here a gradient may be the
sum of several, and the doubling comes after exactly that number of steps, as in PyTorch's `GradScaler`.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.workdir.state import LossScale

Tree = TypeVar("Tree")
Factor = jax.Array | np.ndarray | float

# The largest power of two of float32.
_LARGEST = 2.0**127


def scale_loss(loss: jax.Array, factor: Factor) -> jax.Array:
    """The loss [] times the factor; itself for a factor of 1."""
    return loss if _is_one(factor) else loss * factor


def unscale_gradient(gradient: Tree, factor: Factor) -> Tree:
    """The gradient of the loss from that of the scaled one; exact for a power of two, but for what underflows."""
    return gradient if _is_one(factor) else jax.tree.map(lambda g: g / factor, gradient)


def _is_one(factor):
    # A number, not an array: the program is then that without scaling.
    return isinstance(factor, float) and factor == 1


def next_loss_scale(loss_scale: LossScale, overflow: jax.Array, growth_interval: int) -> LossScale:
    """The dynamic loss scale after a step.

    Args:
      loss_scale: before the step.
      overflow: bool [], whether the scaled gradient of the step was not finite.
      growth_interval: number of steps without an overflow after which the scale doubles.
    """
    scale, steps = loss_scale
    grows = steps + 1 >= growth_interval
    larger = jnp.where(grows, jnp.minimum(2 * scale, _LARGEST), scale)
    return LossScale(jnp.where(overflow, scale / 2, larger), jnp.where(overflow | grows, 0, steps + 1))
