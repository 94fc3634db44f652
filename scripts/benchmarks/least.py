"""The least bytes that a train step can move between memory and processor, from the network alone.

Every convolution and matrix product with input a, weight w and output y reads and writes each array once in each pass:
forward a, w and y; the gradient of its input dy, w and da; the gradient of its weight a, dy and dw. What is between two
of them (normalisation, SiLU, dropout, the addition of a residual) is one fused group, which forward reads y and writes
the next a, and backward reads the gradient of that a and y again and writes the gradient of y. Attention is one fused
group too: forward reads q, k, v and writes o; backward reads those and the gradient of o and writes those of q, k, v;
scores never leave the chip. The optimizer reads weights, gradient, both moments and EMA in float32, writes all but the
gradient, and writes the weights once more in the type of the activations. So the least is: activations once in and once
out per group. Not counted are what residual connections and statistics read beside that, biases, images, and random
numbers.
"""

import math
from typing import Any

from kernel_costs import ATTENTION, CONVOLUTION, ELEMENTWISE, OPTIMIZER, PRODUCT, Kernel


def least_kernels(network: Any, batch_size: int) -> list[Kernel]:
    """A train step of `batch_size` images that go through the network, as kernels that move the least.

    With K timesteps of an image, each counts.
    """
    import jax.numpy as jnp

    from s2dm_jax.models.flops import forward_products
    from s2dm_jax.models.network import num_params

    found = forward_products(network, batch_size)
    attention = [equation for equation in found if _is_attention(equation)]
    products = [equation for equation in found if not _is_attention(equation)]
    weights = num_params(network)
    update = weights * (9 * 4 + jnp.dtype(network.dtype).itemsize)
    return [
        *(kernel for equation in products for kernel in _product_kernels(equation)),
        *_group_kernels(products),
        *(kernel for i in range(0, len(attention), 2) for kernel in _attention_kernels(*attention[i : i + 2])),
        Kernel("optimizer", OPTIMIZER, update, 0, 1),
    ]


def _is_attention(equation: Any) -> bool:
    """Whether both factors of a product are activations: it is batched. The two of an attention follow each other."""
    return equation.primitive.name == "dot_general" and bool(equation.params["dimension_numbers"][1][0])


def _bytes(variable: Any) -> int:
    return math.prod(variable.aval.shape) * variable.aval.dtype.itemsize


def _product_kernels(equation: Any) -> list[Kernel]:
    from s2dm_jax.models.flops import product_flops

    kind = CONVOLUTION if equation.primitive.name == "conv_general_dilated" else PRODUCT
    moved = sum(_bytes(v) for v in (*equation.invars, *equation.outvars))
    # Each gradient moves three arrays of the same sizes.
    return [Kernel(equation.primitive.name, kind, moved, product_flops(equation), times=3)]


def _group_kernels(products: list[Any]) -> list[Kernel]:
    outputs = [_bytes(equation.outvars[0]) for equation in products]
    # The projections of attention have the same input.
    inputs = [_bytes(v) for v in {id(e.invars[0]): e.invars[0] for e in products}.values()]
    forward = [Kernel("read y", ELEMENTWISE, y, 0, 1) for y in outputs]
    backward = [Kernel("read y, write dy", ELEMENTWISE, 2 * y, 0, 1) for y in outputs]
    return [*forward, *backward, *(Kernel("write a, read da", ELEMENTWISE, 2 * a, 0, 1) for a in inputs)]


def _attention_kernels(scores: Any, weighted: Any) -> list[Kernel]:
    from s2dm_jax.models.flops import product_flops

    queries_and_keys = sum(_bytes(v) for v in scores.invars)  # as many as values and output
    flops = product_flops(scores) + product_flops(weighted)
    return [
        Kernel("attention", ATTENTION, 2 * queries_and_keys, flops, 1),
        Kernel("attention backward", ATTENTION, 4 * queries_and_keys, 2 * flops, 1),
    ]
