"""Convolutions and products for CPU against lax: values, gradients; on other backends the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from s2dm_jax.models import cpu_ops
from s2dm_jax.models.cpu_ops import conv2d, matmul, softmax_attention, upsample_conv2d
from s2dm_jax.models.flops import equations

CASES = [
    # kernel, stride, pad, height, width
    (1, 1, ((0, 0), (0, 0)), 6, 5),
    (3, 1, ((1, 1), (1, 1)), 6, 5),
    (3, 2, ((0, 1), (0, 1)), 8, 8),
    (3, 2, ((1, 1), (1, 1)), 7, 8),
    (1, 2, ((0, 0), (0, 0)), 6, 7),
    (5, 1, ((2, 2), (2, 2)), 8, 7),
    (5, 2, ((1, 3), (0, 2)), 9, 8),
    (3, 1, ((0, 0), (4, 0)), 5, 6),
]
SAME = ((1, 1), (1, 1))
ASYMMETRIC = ((0, 1), (0, 1))


def plain(x, w, stride, pad):
    return lax.conv_general_dilated(x, w, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def inputs(kernel, height, width, dtype=jnp.float32):
    # numpy draws them: each shape of jax.random.normal costs seconds of compilation on a CPU.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, height, width, 3), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(rng.standard_normal((kernel, kernel, 3, 4), np.float32), dtype)


def loss(conv, x, w, stride, pad):
    return jnp.sum(jnp.sin(conv(x, w, stride, pad)).astype(jnp.float32))


@pytest.mark.parametrize(("kernel", "stride", "pad", "height", "width"), CASES)
def test_value_and_gradients_equal_lax(kernel, stride, pad, height, width):
    x, w = inputs(kernel, height, width)

    def both(conv):
        return jax.jit(jax.value_and_grad(lambda x, w: loss(conv, x, w, stride, pad), argnums=(0, 1)))(x, w)

    (value, grads), (expected, expected_grads) = both(conv2d), both(plain)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-6, atol=1e-5)


def test_gradients_equal_lax_in_bfloat16():
    x, w = inputs(3, 8, 8, jnp.bfloat16)

    def grads(conv):
        return jax.jit(jax.grad(lambda x, w: loss(conv, x, w, 2, ASYMMETRIC), argnums=(0, 1)))(x, w)

    for grad, expected in zip(grads(conv2d), grads(plain), strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_array_equal(grad.astype(jnp.float32), expected.astype(jnp.float32))


def enlarged(x, w):
    return plain(x.repeat(2, axis=1).repeat(2, axis=2), w, 1, SAME)


def test_upsampling_and_convolution_in_one_equal_one_after_the_other():
    x, w = inputs(3, 5, 4)

    def both(conv):
        value = lambda x, w: jnp.sum(jnp.sin(conv(x, w)))  # noqa: E731
        return jax.jit(conv)(x, w), jax.jit(jax.grad(value, argnums=(0, 1)))(x, w)

    (out, grads), (expected, expected_grads) = both(upsample_conv2d), both(enlarged)
    assert out.shape == (2, 10, 8, 4)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-4)


def test_vmap_of_gradient():
    x, w = inputs(3, 6, 6)

    def per_example(conv):
        one = jax.grad(lambda w, x: loss(conv, x[None], w, 1, SAME))
        return jax.jit(jax.vmap(one, (None, 0)))(w, x)

    assert per_example(conv2d).shape == (2, 3, 3, 3, 4)
    np.testing.assert_allclose(per_example(conv2d), per_example(plain), rtol=1e-6, atol=1e-5)


def test_second_order_gradient():
    x, w = inputs(3, 6, 6)

    def gradient_of_gradient_norm(conv):
        gradient = jax.grad(lambda w: loss(conv, x, w, 2, ASYMMETRIC))
        return jax.jit(jax.grad(lambda w: jnp.sum(gradient(w) ** 2)))(w)

    np.testing.assert_allclose(
        gradient_of_gradient_norm(conv2d), gradient_of_gradient_norm(plain), rtol=1e-5, atol=1e-3
    )


def convolution_layouts(jaxpr):
    convolutions = (e for e in equations(jaxpr) if e.primitive.name == "conv_general_dilated")
    return {e.params["dimension_numbers"] for e in convolutions}


def test_backward_convolutions_keep_the_layout_that_cpu_loops_run_fast():
    x, w = inputs(3, 8, 8)

    def layouts(conv, differentiate):
        value = lambda x, w: loss(conv, x, w, 2, ASYMMETRIC)  # noqa: E731
        function = jax.grad(value, argnums=(0, 1)) if differentiate else value
        return convolution_layouts(jax.make_jaxpr(function)(x, w).jaxpr)

    forward = layouts(plain, differentiate=False)
    assert len(forward) == 1
    assert layouts(conv2d, differentiate=True) == forward
    assert layouts(plain, differentiate=True) != forward


PLAIN = {
    "conv2d": (lambda x, w: conv2d(x, w, 2, ASYMMETRIC), lambda x, w: plain(x, w, 2, ASYMMETRIC)),
    "upsample_conv2d": (upsample_conv2d, enlarged),
    "matmul": (lambda x, w: matmul(x, w[0, 0]), lambda x, w: x @ w[0, 0]),
    "attention": (
        lambda x, w: softmax_attention(x, x, x * w[0, 0, 0, 0]),
        lambda x, w: jax.nn.dot_product_attention(x, x, x * w[0, 0, 0, 0]),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_on_other_backends_autodiff_takes_the_plain_form(monkeypatch, name):
    ours, theirs = PLAIN[name]
    x, w = inputs(3, 8, 8)

    def derivatives(function):
        value = lambda x, w: jnp.sum(jnp.sin(function(x, w)))  # noqa: E731
        # Fresh functions: a compiled program is cached by the function that it was traced from.
        return jax.jit(lambda: (jax.value_and_grad(value, (0, 1))(x, w), jax.jvp(value, (x, w), (x, w))))()

    monkeypatch.setattr(cpu_ops, "_on_cpu", lambda: True)
    with pytest.raises(TypeError, match="forward-mode"):
        derivatives(ours)
    monkeypatch.setattr(cpu_ops, "_on_cpu", lambda: False)
    # Bit for bit: the same operations, whose gradients are autodiff's own, in forward mode too.
    jax.tree.map(np.testing.assert_array_equal, derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_has_the_value_and_the_gradients_of_a_product(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5), np.float32), dtype)
    w = jnp.asarray(rng.standard_normal((5, 6), np.float32), dtype)

    def both(product):
        value = lambda x, w: jnp.sum(jnp.sin(product(x, w)).astype(jnp.float32))  # noqa: E731
        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(x, w)

    (value, grads), (expected, expected_grads) = both(matmul), both(jnp.matmul)
    tolerance = {jnp.float32: 1e-6, jnp.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        np.testing.assert_allclose(
            grad.astype(jnp.float32), expected_grad.astype(jnp.float32), rtol=tolerance, atol=10 * tolerance
        )


def test_per_example_and_second_order_gradients_of_matmul():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 5), np.float32))
    w = jnp.asarray(rng.standard_normal((5, 6), np.float32))

    def per_example(product):
        return jax.jit(jax.vmap(jax.grad(lambda w, x: jnp.sum(product(x, w) ** 3)), (None, 0)))(w, x)

    def of_gradient_norm(product):
        return jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(lambda w: jnp.sum(product(x, w) ** 3))(w) ** 2)))(w)

    for derivative in (per_example, of_gradient_norm):
        np.testing.assert_allclose(derivative(matmul), derivative(jnp.matmul), rtol=1e-4, atol=1e-3)


def test_attention_has_the_value_and_the_gradients_of_jaxs_own():
    q, k, v, g = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 5, 3, 7), np.float32))

    def found(attention):
        def first(q, k, v):
            return (attention(q, k, v) * g).sum()

        def second(q, k, v):
            return sum((grad**2).sum() for grad in jax.grad(first, (0, 1, 2))(q, k, v))

        per_query = jax.vmap(jax.grad(first), (0, None, None))(jnp.stack([q, 2 * q]), k, v)
        return (
            attention(q, k, v),
            per_query,
            *jax.grad(first, (0, 1, 2))(q, k, v),
            *jax.grad(second, (0, 1, 2))(q, k, v),
        )

    for ours, expected in zip(found(softmax_attention), found(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    # The exponentials of scores in the thousands are finite.
    assert jnp.isfinite(softmax_attention(1e3 * q, k, v)).all()
