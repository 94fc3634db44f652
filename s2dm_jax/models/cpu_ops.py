"""Convolutions and matrix products that are fast on CPU, inside `lax.scan` too, and plain elsewhere.

XLA's compilers for GPU and TPU know the gradients that autodiff makes, and turn them into their own kernels;
the forms below are for what XLA:CPU lacks.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Pad = tuple[tuple[int, int], tuple[int, int]]


def conv2d(x: jax.Array, w: jax.Array, stride: int, pad: Pad) -> jax.Array:
    """`lax.conv_general_dilated` with gradients that stay fast inside a loop on CPU (jax issue 12868).

    XLA:CPU rewrites convolutions to its fast form only in the entry computation. Inside `lax.scan` the
    backward convolutions that autodiff makes, whose layouts are permuted, fall to a naive loop 20-40 times
    slower. On CPU both are written in the fast form to begin with; the gradients are the same. Reverse mode
    of any order and vmap work; `jax.jvp` of it raises TypeError on CPU, so what needs it calls lax directly.

    Args:
      x: float [B,H,W,I].
      w: [KH,KW,I,O], of x's type.
      stride: positive, the same for rows and columns.
      pad: ((top, bottom), (left, right)), none negative.

    Returns:
      [B,H',W',O], of x's type.
    """
    return _conv2d_on_cpu(x, w, stride, pad) if _on_cpu() else _plain_conv2d(x, w, stride, pad)


# Whether the plain forms are used on CPU too.
_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """What is traced inside has plain convolutions and products, as on GPU and TPU."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _on_cpu():
    return jax.default_backend() == "cpu" and not _plain.get()


def _plain_conv2d(x, w, stride, pad):
    return lax.conv_general_dilated(x, w, (stride, stride), pad, dimension_numbers=_LAYOUT)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d_on_cpu(x, w, stride, pad):
    return _plain_conv2d(x, w, stride, pad)


def _forward(x, w, stride, pad):
    return _plain_conv2d(x, w, stride, pad), (x, w)


def _backward(stride, pad, residuals, g):
    x, w = residuals

    def pad_for_x(axis):
        k, n, n_out = w.shape[axis], x.shape[axis + 1], g.shape[axis + 1]
        low = k - 1 - pad[axis][0]
        return low, n + k - 1 - ((n_out - 1) * stride + 1) - low

    def pad_for_w(axis):
        k, n, n_out = w.shape[axis], x.shape[axis + 1], g.shape[axis + 1]
        low = pad[axis][0]
        return low, (n_out - 1) * stride + k - n - low

    grad_x = lax.conv_general_dilated(
        g,
        jnp.flip(w, (0, 1)).swapaxes(2, 3),
        (1, 1),
        (pad_for_x(0), pad_for_x(1)),
        lhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    # The channels of x take the place of the batch, and the batch the place of the input channels.
    grad_w = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        g.transpose(1, 2, 0, 3),
        (1, 1),
        (pad_for_w(0), pad_for_w(1)),
        rhs_dilation=(stride, stride),
        dimension_numbers=_LAYOUT,
    )
    return grad_x, grad_w.transpose(1, 2, 0, 3)


_conv2d_on_cpu.defvjp(_forward, _backward)


def upsample_conv2d(x: jax.Array, w: jax.Array) -> jax.Array:
    """A 3×3 convolution of the image enlarged twice by repeating pixels, without enlarging it.

    On CPU each of the four pixels that one becomes is made from 2×2 of the small image, with those weights
    added that meet the same pixel: 16 multiply-adds in place of 36.

    Args:
      x: float [B,H,W,I].
      w: [3,3,I,O], of x's type.

    Returns:
      [B,2H,2W,O], of x's type.
    """
    if not _on_cpu():
        enlarged = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return conv2d(enlarged, w, 1, ((1, 1), (1, 1)))

    def halves(w, axis):
        first, middle, last = jnp.split(w, 3, axis)
        pair = partial(jnp.concatenate, axis=axis)
        return (pair((first, middle + last)), (1, 0)), (pair((first + middle, last)), (0, 1))

    rows = []
    for w_row, pad_row in halves(w, 0):
        pixels = [conv2d(x, w_pixel, 1, (pad_row, pad)) for w_pixel, pad in halves(w_row, 1)]
        rows.append(jnp.stack(pixels, axis=3))
    b, height, width, _ = x.shape
    return jnp.stack(rows, axis=2).reshape(b, 2 * height, 2 * width, w.shape[-1])


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x·w over the channels, on CPU with gradients that read their inputs as they lie in memory.

    XLA:CPU otherwise writes a transposed copy of x or of the incoming gradient, by steps so long that it
    takes several times the product itself.

    Args:
      x: float [..., I].
      w: [I, O], of x's type.

    Returns:
      [..., O], of x's type.
    """
    return _matmul_on_cpu(x, w) if _on_cpu() else x @ w


@jax.custom_vjp
def _matmul_on_cpu(x, w):
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(residuals, g):
    x, w = residuals
    # Fused into what computes them, their transposition would be slow.
    rows_x, rows_g = lax.optimization_barrier((x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])))
    return g @ w.T, lax.dot_general(rows_x, rows_g, (((0,), (0,)), ((), ())))


_matmul_on_cpu.defvjp(_matmul_forward, _matmul_backward)
