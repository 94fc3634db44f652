"""Model FLOPs: two for each multiply-add of matrix products and convolutions."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from s2dm_jax.models.cpu_ops import plain_ops
from s2dm_jax.models.network import Network


def forward_flops(network: Network) -> int:
    """FLOPs of one image's forward pass through the network as published; nothing else is counted."""
    x = jax.ShapeDtypeStruct((1, *network.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    with plain_ops():
        # A function of its own: JAX would reuse what it has traced of `network.apply` itself.
        program = jax.make_jaxpr(lambda *inputs: network.apply(*inputs))(network.param_shapes(), x, t)
    return _count_flops(program.jaxpr)


def step_flops(network: Network, batch_size: int, num_timesteps_per_image: int) -> int:
    """FLOPs of a train step: forward and, at twice the cost, backward; rematerialisation is not counted."""
    return 3 * forward_flops(network) * batch_size * num_timesteps_per_image


def _count_flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "conv_general_dilated":
            kernel, out = shapes[1], shapes[2]  # [KH, KW, I, O], [B, H, W, O]
            total += 2 * math.prod(out[:3]) * math.prod(kernel)
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(shapes[2]) * math.prod(shapes[0][axis] for axis in contracted)
        parameters = list(equation.params.values())
        for inner in jax.tree.leaves(parameters, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += _count_flops(inner)
    return total
