"""Model FLOPs of a forward pass and of a training step."""

from typing import Any

import jax
import jax.numpy as jnp

from s2dm_jax.models import unet
from s2dm_jax.models.unet import UNet


def forward_flops(network: UNet) -> int:
    """FLOPs of one image's way through the published network: two for each multiply-add of its matrix
    products and convolutions; nothing else is counted."""
    x = jax.ShapeDtypeStruct((1, network.resolution, network.resolution, network.in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    program = jax.make_jaxpr(lambda *inputs: unet.apply(network, *inputs))(unet.param_shapes(network), x, t)
    return _count_flops(program.jaxpr)


def _count_flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "conv_general_dilated":
            # Kernels are [KH, KW, I, O]. Four of 2×2 stand for one of 3×3 over four times the pixels, as
            # published (`cpu_ops.upsample_conv2d`).
            kernel, out = shapes[1], shapes[2]
            area = 9 if kernel[:2] == (2, 2) else kernel[0] * kernel[1]
            total += 2 * out[0] * out[1] * out[2] * area * kernel[2] * kernel[3]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            elements = 1
            for size in (*shapes[2], *(shapes[0][axis] for axis in contracted)):
                elements *= size
            total += 2 * elements
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                total += _count_flops(inner)
    return total


def step_flops(network: UNet, batch_size: int, num_timesteps_per_image: int) -> int:
    """Model FLOPs of a training step: forward and, at twice the cost, backward; nothing computed again."""
    return 3 * forward_flops(network) * batch_size * num_timesteps_per_image
