"""3×3 convolutions with four multiplications per output in the place of nine: F(2×2, 3×3) of Lavin & Gray 2015.

Two outputs along an axis, from four inputs x₀ … x₃ and the taps w₀, w₁, w₂ (arXiv 1509.09308, section 4.1), are

    d₀ = (x₀ − x₂)·w₀    s₀ = (x₁ + x₂)·(w₀ + w₁ + w₂)/2      y₀ =  d₀ + s₀ + s₁
    d₁ = (x₁ − x₃)·w₂    s₁ = (x₁ − x₂)·(w₁ − w₀ − w₂)/2      y₁ = −d₁ + s₀ − s₁

Along both axes the products are 16, in four groups of differences d and sums s of rows and of columns; summed over the
input channels each group is a batch of four matrix products. An axis of the image is kept as [tiles, 2], in which the
inputs of neighbouring tiles overlap by one pair. Rounding errors in float32 are as large as the direct form's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# The taps of an axis that d and s are multiplied by: [products, taps].
_TAPS_D = np.array([[1, 0, 0], [0, 0, 1]])
_TAPS_S = np.array([[0.5, 0.5, 0.5], [-0.5, 0.5, -0.5]])
# Of rows and columns, [4, 9] each, in the order in which groups are listed everywhere.
_TAPS = [np.kron(rows, columns) for rows in (_TAPS_D, _TAPS_S) for columns in (_TAPS_D, _TAPS_S)]


@jax.custom_vjp
def conv3x3(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolution with stride 1 and one pixel of zeros around the image, with gradients of the same form.

    Args:
      x, w: [B, H, W, I] with H and W even, and [3, 3, I, O], of one float type; the result is [B, H, W, O].
    """
    return _apart(_conv3x3, x, w)


def _forward(x, w):
    return conv3x3(x, w), (x, w)


def _backward(residuals, g):
    return _apart(_grads, *residuals, g)


conv3x3.defvjp(_forward, _backward)


def _apart(function, *arrays):
    """Calls a function that XLA compiles by itself.

    Each of the kernels that read an array would otherwise compute it again, with the activation function before it.
    """
    with set_xla_metadata(inlineable="false"):
        return function(*arrays)


@jax.jit
def _conv3x3(x, w):
    products = [_batched(a, b, 2, 1) for a, b in zip(_inputs(x), _taps(w), strict=True)]
    return _outputs(products, x.shape[:3])


@jax.jit
def _grads(x, w, g):
    grad_taps = [_batched(a, b, 1, 1) for a, b in zip(_inputs(x), _grad_products(g), strict=True)]
    return _conv3x3(g, lax.rev(w, (0, 1)).swapaxes(2, 3)), _grad_w(grad_taps)


def _batched(a, b, axis_a, axis_b):
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))))


def _groups(x: jax.Array, rows: int, columns: int, d: Callable, s: Callable) -> list[jax.Array]:
    """d and s of rows and columns of [B, H/2, 2, W/2, 2, C], whose axes are given: four of [4, tiles, C]."""
    found = [of_columns(of_rows(x, rows), columns) for of_rows in (d, s) for of_columns in (d, s)]
    return [each.transpose(2, 4, 0, 1, 3, 5).reshape(4, -1, x.shape[-1]) for each in found]


def _halves(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Both entries of an axis of length two, which stays."""
    return lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, 1, 2, axis=axis)


def _signs(x: jax.Array, axis: int) -> jax.Array:
    """(1, −1) along an axis."""
    return lax.expand_dims(jnp.array([1, -1], x.dtype), [i for i in range(x.ndim) if i != axis])


def _inputs(x):
    b, h, w, c = x.shape
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    x = x.reshape(b, h // 2 + 1, 2, w // 2 + 1, 2, c)

    def this_and_next(x, axis):
        return lax.slice_in_dim(x, 0, -1, axis=axis), lax.slice_in_dim(x, 1, None, axis=axis)

    def d(x, axis):
        this, following = this_and_next(x, axis)
        return this - following

    def s(x, axis):
        this, following = this_and_next(x, axis)
        (_, second), (third, _) = _halves(this, axis + 1), _halves(following, axis + 1)
        return second + _signs(x, axis + 1) * third

    return _groups(x, 1, 3, d, s)


def _taps(w):  # four of [4, I, O]
    return [(jnp.asarray(taps, w.dtype) @ w.reshape(9, -1)).reshape(4, *w.shape[2:]) for taps in _TAPS]


def _outputs(products, shape):  # [B, H, W, O]
    b, h, w = shape
    channels = products[0].shape[-1]
    dd, ds, sd, ss = (each.reshape(2, 2, b, h // 2, w // 2, channels) for each in products)

    def along(d, s, axis):
        first, second = _halves(s, axis)
        return first + _signs(d, axis) * (d + second)

    y = along(along(dd, ds, 1), along(sd, ss, 1), 0)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, h, w, channels)


def _grad_products(g):
    """The transpose of `_outputs`: four of [4, tiles, O]."""
    b, h, w, channels = g.shape

    def d(g, axis):
        return _signs(g, axis) * g

    def s(g, axis):
        first, second = _halves(g, axis)
        return first + _signs(g, axis) * second

    return _groups(g.reshape(b, h // 2, 2, w // 2, 2, channels), 2, 4, d, s)


def _grad_w(grad_taps):
    """The transpose of `_taps`: [3, 3, I, O]."""
    channels = grad_taps[0].shape[1:]
    grads = [jnp.asarray(taps.T, each.dtype) @ each.reshape(4, -1) for taps, each in zip(_TAPS, grad_taps, strict=True)]
    return sum(grads).reshape(3, 3, *channels)
