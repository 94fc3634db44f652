"""What the UNet of the DDIM code is made of: its blocks, GroupNorm, convolutions, the embedding of t."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from s2dm_jax.conv import conv2d, matmul, upsample_conv2d

NORM_GROUPS = 32
NORM_EPS = 1e-6

# NNX wants an initialiser to learn the shapes; the values come from `init_params`.
_ZEROS = nnx.initializers.zeros_init()
# `nnx.Linear` whose products are fast on CPU; the published 1×1 convolutions are such layers too.
Linear = functools.partial(nnx.Linear, kernel_init=_ZEROS, dot_general=lambda x, w, *_, **__: matmul(x, w))


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding, sines first, frequencies 10000^(−i/(dim/2−1)) (DDPM code).

    Args:
      t: float or int [B], level in 0 … T−1, not rescaled; fractions are allowed.
      dim: number of features, even.

    Returns:
      float32 [B, dim].
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _conv2d_for_nnx(x, kernel, strides, padding, **_):
    rows, columns = padding
    return conv2d(x, kernel, strides[0], (tuple(rows), tuple(columns)))


def _upsample_conv2d_for_nnx(x, kernel, *_, **__):
    return upsample_conv2d(x, kernel)


def conv3x3(
    c_in: int, c_out: int, dtype: DTypeLike, rngs: nnx.Rngs, stride: int = 1, upsample: bool = False
) -> nnx.Conv:
    """3×3 convolution, padded as in the published code; with `upsample`, of the image enlarged twice."""
    # The published downsampling pads one row at the bottom and one column on the right only.
    pad = (1, 1) if stride == 1 else (0, 1)
    return nnx.Conv(
        c_in,
        c_out,
        (3, 3),
        strides=stride,
        padding=(pad, pad),
        dtype=dtype,
        kernel_init=_ZEROS,
        conv_general_dilated=_upsample_conv2d_for_nnx if upsample else _conv2d_for_nnx,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018), 32 groups, statistics in float32.

    Sums run over pixels first and over the channels of a group second, and the result is one multiply-add
    per pixel: XLA fuses this, while a 4-D reduction over [H, W, C/32] costs two to three times as much.
    """

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        per_group = channels // NORM_GROUPS
        count = x.shape[1] * x.shape[2] * per_group

        def group_mean(pixels):
            sums = pixels.sum((1, 2)).reshape(-1, NORM_GROUPS, per_group).sum(-1) / count
            return jnp.repeat(sums, per_group, axis=-1)

        x32 = x.astype(jnp.float32)
        mean = group_mean(x32)
        variance = jnp.maximum(group_mean(x32 * x32) - mean * mean, 0.0)
        a = self.scale[...] * jax.lax.rsqrt(variance + NORM_EPS)
        b = self.bias[...] - mean * a
        return (x32 * a[:, None, None] + b[:, None, None]).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """norm → swish → conv → + time → norm → swish → dropout → conv → + shortcut."""

    def __init__(
        self, c_in: int, c_out: int, temb_dim: int, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.norm1 = GroupNorm(c_in)
        self.conv1 = conv3x3(c_in, c_out, dtype, rngs)
        self.temb_proj = Linear(temb_dim, c_out, rngs=rngs)
        self.norm2 = GroupNorm(c_out)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = conv3x3(c_out, c_out, dtype, rngs)
        if c_in != c_out:
            self.nin_shortcut = Linear(c_in, c_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = h + self.temb_proj(nnx.silu(temb))[:, None, None].astype(h.dtype)
        h = nnx.silu(self.norm2(h))
        h = self.dropout(h, deterministic=dropout_key is None, rngs=dropout_key)
        h = self.conv2(h)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nnx.Module):
    """Single-head self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels)
        self.q = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        tokens = self.norm(x).reshape(b, height * width, 1, c)
        attended = jax.nn.dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.proj_out(attended).reshape(x.shape)


def average_pool(x: jax.Array) -> jax.Array:
    """[B,H,W,C] → [B,H/2,W/2,C]: the published downsampling where it has no convolution."""
    b, height, width, c = x.shape
    return x.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))
