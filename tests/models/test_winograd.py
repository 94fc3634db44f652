"""The convolution with fewer multiplications: against lax and exact sums, its products, and where it is used."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from s2dm_jax.models import cpu_ops
from s2dm_jax.models.cpu_ops import conv2d
from s2dm_jax.models.flops import equations, product_flops
from s2dm_jax.models.winograd import conv3x3

SAME = ((1, 1), (1, 1))


def direct(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), SAME, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def random_inputs(shape, channels_out, dtype=np.float32):
    rng = np.random.default_rng(0)
    x, w, g = (
        rng.standard_normal(size) for size in (shape, (3, 3, shape[-1], channels_out), (*shape[:-1], channels_out))
    )
    return [jnp.asarray(each, dtype) for each in (x, w / math.sqrt(9 * shape[-1]), g)]


def value_and_gradients(conv, x, w, g):
    def both(x, w, g):
        y, vjp = jax.vjp(conv, x, w)
        return (y, *vjp(g))

    return jax.jit(both)(x, w, g)


@pytest.mark.parametrize(("shape", "channels_out"), [((2, 6, 4, 3), 5), ((1, 2, 2, 1), 1), ((3, 2, 8, 4), 2)])
def test_value_and_gradients_are_those_of_the_direct_form(shape, channels_out):
    with jax.enable_x64(True):
        inputs = random_inputs(shape, channels_out, np.float64)
        found, expected = value_and_gradients(conv3x3, *inputs), value_and_gradients(direct, *inputs)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rounding_errors_are_those_of_the_direct_form():
    inputs = random_inputs((2, 8, 8, 128), 128)
    with jax.enable_x64(True):
        in_float64 = [jnp.asarray(np.asarray(each), np.float64) for each in inputs]
        exact = [np.asarray(each) for each in value_and_gradients(direct, *in_float64)]

    def errors(conv):
        found = value_and_gradients(conv, *inputs)
        return [np.abs(np.asarray(a, np.float64) - b).std() / b.std() for a, b in zip(found, exact, strict=True)]

    for ours, theirs in zip(errors(conv3x3), errors(direct), strict=True):
        assert ours < 2 * max(theirs, 2e-7)


def test_products_are_four_ninths_of_the_direct_forms():
    x, w, g = random_inputs((2, 8, 8, 6), 10)

    def flops(function, *arguments):
        found = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        products = [e for e in found if e.primitive.name in ("dot_general", "conv_general_dilated")]
        # Those of the taps alone have no batch and do not grow with the image.
        return sum(product_flops(e) for e in products if e.invars[0].aval.ndim > 2)

    forward = flops(conv3x3, x, w)
    assert 9 * forward == 4 * flops(direct, x, w)
    assert flops(lambda x, w, g: jax.vjp(conv3x3, x, w)[1](g), x, w, g) == 3 * forward


def test_gradients_of_gradients_and_of_each_image():
    x, w, g = random_inputs((2, 4, 4, 3), 3)

    def of_gradient_norm(conv):
        gradient = jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w)) * g), argnums=(0, 1))
        return jax.jit(jax.grad(lambda w: sum(jnp.sum(each**2) for each in gradient(x, w))))(w)

    def of_each_image(conv):
        return jax.jit(jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.sin(conv(x[None], w)))), (None, 0)))(w, x)

    for derivative in (of_gradient_norm, of_each_image):
        np.testing.assert_allclose(derivative(conv3x3), derivative(direct), rtol=1e-4, atol=1e-4)


def test_what_is_before_and_after_is_computed_once():
    """XLA would fuse it into each kernel that reads it: 4 times before the convolution, and again for its gradient."""
    x, w, g = random_inputs((1, 8, 8, 128), 128)

    def network(x, w):
        return jnp.sum(jnp.tanh(conv2d(jnp.exp(x), w, 1, SAME)) * g)

    program = jax.jit(jax.value_and_grad(network, argnums=1)).lower(x, w).compile().as_text()
    assert len(re.findall(r"= f32\[1,8,8,128\]\S* exponential\(", program)) == 1
    assert len(re.findall(r"= \S+ call\(", program)) == 2


USED = {
    "128 channels of 8×8": ((1, 8, 8, 128), 128, 1, np.float32, True),
    "more channels and images": ((3, 10, 8, 384), 128, 1, np.float32, True),
    "stride 2": ((1, 8, 8, 128), 128, 2, np.float32, False),
    "few channels in": ((1, 8, 8, 64), 128, 1, np.float32, False),
    "few channels out": ((1, 8, 8, 128), 3, 1, np.float32, False),
    "small image": ((1, 4, 4, 128), 128, 1, np.float32, False),
    "odd height": ((1, 9, 8, 128), 128, 1, np.float32, False),
    "bfloat16": ((1, 8, 8, 128), 128, 1, jnp.bfloat16, False),
}


def convolutions(shape, channels_out, stride, dtype):
    x, w = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((3, 3, shape[-1], channels_out), dtype)
    program = jax.make_jaxpr(lambda x, w: conv2d(x, w, stride, SAME))(x, w).jaxpr
    return sum(e.primitive.name == "conv_general_dilated" for e in equations(program))


@pytest.mark.parametrize("case", USED)
def test_where_it_is_used(case):
    *shapes, is_used = USED[case]
    assert convolutions(*shapes) == (0 if is_used else 1)


def test_other_backends_and_several_devices_have_the_direct_form(monkeypatch):
    *shapes, _ = USED["128 channels of 8×8"]
    with cpu_ops.plain_ops():
        assert convolutions(*shapes) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert convolutions(*shapes) == 1
