"""Model FLOPs: two for each multiply-add of matrix products and convolutions."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from s2dm_jax.models.cpu_ops import plain_ops
from s2dm_jax.models.network import Network


def forward_flops(network: Network) -> int:
    """FLOPs of one image's forward pass through the network as published; nothing else is counted."""
    return sum(map(product_flops, forward_products(network, 1)))


def step_flops(network: Network, batch_size: int, num_timesteps_per_image: int) -> int:
    """FLOPs of a train step: forward and, at twice the cost, backward; rematerialisation is not counted."""
    return 3 * forward_flops(network) * batch_size * num_timesteps_per_image


def forward_products(network: Network, batch_size: int) -> list[Any]:
    """The equations of the convolutions and matrix products of a batch's forward pass, in order."""
    x = jax.ShapeDtypeStruct((batch_size, *network.image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    with plain_ops():
        # A function of its own: JAX would reuse what it has traced of `network.apply` itself.
        program = jax.make_jaxpr(lambda *inputs: network.apply(*inputs))(network.param_shapes(), x, t)
    return [e for e in equations(program.jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")]


def product_flops(equation: Any) -> int:
    """FLOPs of the equation of a convolution or a matrix product."""
    first, second = (v.aval.shape for v in equation.invars)
    size = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "conv_general_dilated":
        return 2 * size * math.prod(second[:-1])  # [KH, KW, I, O]
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * size * math.prod(first[axis] for axis in contracted)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, each before those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        parameters = list(equation.params.values())
        for inner in jax.tree.leaves(parameters, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
