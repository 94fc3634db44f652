"""Convolutions, matrix products and attention that are fast on CPU, inside `lax.scan` too, and plain elsewhere.

XLA's compilers for GPU and TPU turn the gradients that autodiff makes into their own kernels; XLA:CPU does not.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from s2dm_jax.models.winograd import conv3x3

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Pad = tuple[tuple[int, int], tuple[int, int]]

# With fewer, the sums that Winograd's form adds cost what it saves. The number of images is not asked for, so that an
# image has the same result in every batch.
_MIN_CHANNELS, _MIN_PIXELS = 128, 64

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


def conv2d(x: jax.Array, w: jax.Array, stride: int, pad: Pad) -> jax.Array:
    """`lax.conv_general_dilated` with gradients that stay fast inside a loop on CPU (jax issue 12868).

    XLA:CPU rewrites convolutions to its fast form only in the entry computation. Inside `lax.scan` the backward
    convolutions that autodiff makes, whose layouts are permuted, fall to a naive loop 20-40 times slower. On CPU both
    are written in the fast form directly; the gradients are the same. Float32 convolutions of 3×3 with many channels
    take fewer multiplications there (`models.winograd`). Reverse mode of any order and vmap work; `jax.jvp` of it
    raises TypeError on CPU, so what needs it calls lax directly.

    Args:
      x, w: [B, H, W, I] and [KH, KW, I, O], of one float type; the result is [B, H', W', O].
      stride: of rows and columns.
      pad: ((top, bottom), (left, right)), none negative.
    """
    if not _on_cpu():
        return _plain_conv2d(x, w, stride, pad)
    return conv3x3(x, w) if _is_for_winograd(x, w, stride, pad) else _conv2d_on_cpu(x, w, stride, pad)


def _is_for_winograd(x, w, stride, pad):
    # The compiler may share out the images among several devices, but not those of a call that is kept apart.
    return (
        jax.device_count() == 1
        and x.dtype == jnp.float32
        and (w.shape[:2], stride, pad) == ((3, 3), 1, ((1, 1), (1, 1)))
        and min(w.shape[2:]) >= _MIN_CHANNELS
        and x.shape[1] * x.shape[2] >= _MIN_PIXELS
        and not any(size % 2 for size in x.shape[1:3])
    )


def _plain_conv2d(x, w, stride, pad):
    return lax.conv_general_dilated(x, w, (stride, stride), pad, dimension_numbers=_LAYOUT)


_conv2d_on_cpu = jax.custom_vjp(_plain_conv2d, nondiff_argnums=(2, 3))


def _forward(x, w, stride, pad):
    return _plain_conv2d(x, w, stride, pad), (x, w)


def _backward(stride, pad, residuals, g):
    x, w = residuals
    pad_for_x, pad_for_w = [], []
    for k, n, n_out, (low, _) in zip(w.shape[:2], x.shape[1:3], g.shape[1:3], pad, strict=True):
        span = (n_out - 1) * stride + 1
        pad_for_x.append((k - 1 - low, n - span + low))
        pad_for_w.append((low, span - 1 + k - n - low))
    w_flipped = jnp.flip(w, (0, 1)).swapaxes(2, 3)  # [KH, KW, O, I]
    dilation = (stride, stride)
    grad_x = lax.conv_general_dilated(g, w_flipped, (1, 1), pad_for_x, lhs_dilation=dilation, dimension_numbers=_LAYOUT)
    # The channels of x take the place of the batch, and the batch the place of the input channels.
    x_by_channel = x.transpose(3, 1, 2, 0)  # [I, H, W, B]
    g_as_kernel = g.transpose(1, 2, 0, 3)  # [H', W', B, O]
    grad_w = lax.conv_general_dilated(
        x_by_channel, g_as_kernel, (1, 1), pad_for_w, rhs_dilation=dilation, dimension_numbers=_LAYOUT
    )
    return grad_x, grad_w.transpose(1, 2, 0, 3)  # [I, KH, KW, O] → [KH, KW, I, O]


_conv2d_on_cpu.defvjp(_forward, _backward)


def upsample_conv2d(x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution of `enlarge(x)` [B, 2H, 2W, I] with w [3, 3, I, O] → [B, 2H, 2W, O], on CPU without enlarging.

    There each of the four pixels that one becomes is made from 2×2 of the small image, with those weights added that
    meet the same pixel: 16 multiply-adds in place of 36.
    """
    if not _on_cpu():
        return conv2d(enlarge(x), w, 1, ((1, 1), (1, 1)))

    def halves(w, axis):
        first, middle, last = jnp.split(w, 3, axis)
        pair = partial(jnp.concatenate, axis=axis)
        return (pair((first, middle + last)), (1, 0)), (pair((first + middle, last)), (0, 1))

    rows = []
    for w_row, pad_row in halves(w, 0):
        pixels = [conv2d(x, w_pixel, 1, (pad_row, pad)) for w_pixel, pad in halves(w_row, 1)]
        rows.append(jnp.stack(pixels, axis=3))  # [B, H, W, 2, O]
    b, height, width, _ = x.shape
    return jnp.stack(rows, axis=2).reshape(b, 2 * height, 2 * width, w.shape[-1])  # from [B, H, 2, W, 2, O]


def enlarge(x: jax.Array) -> jax.Array:
    """[B, H, W, C] → [B, 2H, 2W, C] by repeating pixels."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., I] · w [I, O] over the channels, on CPU with gradients that read their inputs as they lie in memory.

    XLA:CPU otherwise writes a transposed copy of x or of the incoming gradient, by steps so long that it takes several
    times the product itself.
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


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√C)·v for each head, [B, tokens, heads, C] each, on CPU with fewer passes over the scores.

    There the exponentials are divided by their sums after the product with the values, and the gradient is made from
    them (Dao et al. 2022, without the tiles). It is JAX's own for one head, where that saves 5 %, and for types other
    than float32 and float64.
    """
    if _on_cpu() and q.shape[2] > 1 and q.dtype in (jnp.float32, jnp.float64):
        # Transposed while they are read, rows of a head would be gathered value by value.
        heads_first = lax.optimization_barrier(tuple(x.swapaxes(1, 2) for x in (q, k, v)))
        return _attention_on_cpu(*heads_first).swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v)


@jax.custom_vjp
def _attention_on_cpu(q, k, v):
    return _attention_forward(q, k, v)[0]


def _attention_forward(q, k, v):  # [B, heads, tokens, C] each
    scores = jnp.einsum("bhqc,bhkc->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhqk,bhkc->bhqc", weights, v) / total
    return out, (q, k, v, weights, total, out)


def _attention_backward(residuals, g):
    q, k, v, weights, total, out = residuals
    g = g / total
    grad_v = jnp.einsum("bhqk,bhqc->bhkc", weights, g)
    grad_weights = jnp.einsum("bhqc,bhkc->bhqk", g, v)
    grad_scores = weights * (grad_weights - (g * out).sum(-1, keepdims=True)) / math.sqrt(q.shape[-1])
    return (
        jnp.einsum("bhqk,bhkc->bhqc", grad_scores, k),
        jnp.einsum("bhqk,bhqc->bhkc", grad_scores, q),
        grad_v,
    )


_attention_on_cpu.defvjp(_attention_forward, _attention_backward)
