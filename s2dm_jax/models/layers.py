"""The layers of the DDIM code's UNet: its blocks, GroupNorm, convolutions, the embedding of t."""

import math
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from s2dm_jax.models.cpu_ops import conv2d, matmul, softmax_attention, upsample_conv2d
from s2dm_jax.models.network import NORM_EPS, NORM_GROUPS


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding of t, float32 [B, dim]: sines first, frequencies 10000^(−i/(dim/2−1)) (DDPM code).

    Args:
      t: float or int [B], timesteps in 0 … T−1, not rescaled; may be fractional.
      dim: number of features, even.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies  # [B, dim/2]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def add(x: jax.Array, per_channel: jax.Array) -> jax.Array:
    """x [..., C] + per_channel in float32, in x's type.

    The gradient of what is added to every pixel is a sum over all of them; a GPU with native bfloat16 addition would
    otherwise sum them in bfloat16.
    """
    return (x.astype(jnp.float32) + per_channel).astype(x.dtype)


class Linear(nnx.Module):
    """x·kernel + bias over the channels; the published 1×1 convolutions are such layers too."""

    def __init__(self, c_in: int, c_out: int, dtype: DTypeLike = jnp.float32):
        self.kernel = nnx.Param(jnp.zeros((c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., c_in] → [..., c_out]
        return add(matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype)), self.bias[...])


class Conv3x3(nnx.Module):
    """3×3 convolution with `pad` rows and columns before and after; with `upsample`, of the image enlarged twice."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        dtype: DTypeLike,
        stride: int = 1,
        pad: tuple[int, int] = (1, 1),
        upsample: bool = False,
    ):
        self.kernel = nnx.Param(jnp.zeros((3, 3, c_in, c_out)))
        self.bias = nnx.Param(jnp.zeros(c_out))
        self.dtype, self.stride, self.pad, self.upsample = dtype, stride, pad, upsample

    def __call__(self, x: jax.Array) -> jax.Array:
        x, w = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.upsample:
            return add(upsample_conv2d(x, w), self.bias[...])  # [B, 2H, 2W, c_out]
        return add(conv2d(x, w, self.stride, (self.pad, self.pad)), self.bias[...])  # [B, H/stride, W/stride, c_out]


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018), 32 groups, statistics in float32.

    Sums run over pixels first and over the channels of a group second, and the result is one multiply-add per pixel:
    XLA fuses this, while a 4-D reduction over [H, W, C/32] costs two to three times as much.
    """

    def __init__(self, channels: int, eps: float = NORM_EPS):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.eps = eps

    def __call__(self, x: jax.Array, scale_shift: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """x [B, H, W, C] normalised; then times 1 + scale, plus shift, where these are given, float32 [B, C] each."""
        _, height, width, channels = x.shape
        per_group = channels // NORM_GROUPS
        count = height * width * per_group

        def group_mean(pixels):
            sums = pixels.sum((1, 2)).reshape(-1, NORM_GROUPS, per_group).sum(-1) / count  # [B, groups]
            return jnp.repeat(sums, per_group, axis=-1)  # [B, C]

        x32 = x.astype(jnp.float32)
        mean = group_mean(x32)
        variance = jnp.maximum(group_mean(x32 * x32) - mean * mean, 0.0)
        a = self.scale[...] * jax.lax.rsqrt(variance + self.eps)
        b = self.bias[...] - mean * a
        if scale_shift is not None:
            scale, shift = scale_shift
            a, b = a * (1 + scale), b * (1 + scale) + shift
        return (x32 * a[:, None, None] + b[:, None, None]).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """norm → swish → conv → + time → norm → swish → dropout → conv → + shortcut."""

    def __init__(self, c_in: int, c_out: int, temb_dim: int, dropout: float, dtype: DTypeLike):
        self.norm1 = GroupNorm(c_in)
        self.conv1 = Conv3x3(c_in, c_out, dtype)
        self.temb_proj = Linear(temb_dim, c_out)
        self.norm2 = GroupNorm(c_out)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = Conv3x3(c_out, c_out, dtype)
        if c_in != c_out:
            self.nin_shortcut = Linear(c_in, c_out, dtype)

    def __call__(self, x: jax.Array, temb: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))  # [B, H, W, c_in] → [B, H, W, c_out]
        h = add(h, self.temb_proj(nnx.silu(temb))[:, None, None])
        h = nnx.silu(self.norm2(h))
        h = self.dropout(h, deterministic=dropout_key is None, rngs=dropout_key)
        h = self.conv2(h)
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nnx.Module):
    """Single-head self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, dtype: DTypeLike):
        self.norm = GroupNorm(channels)
        self.q = Linear(channels, channels, dtype)
        self.k = Linear(channels, channels, dtype)
        self.v = Linear(channels, channels, dtype)
        self.proj_out = Linear(channels, channels, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        tokens = self.norm(x).reshape(b, height * width, 1, c)  # [B, H·W, 1 head, C]
        attended = attention(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.proj_out(attended).reshape(x.shape)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√C)·v for each head, [B, tokens, heads, C] each, with the softmax in float32."""
    if q.dtype != jnp.float16:
        return softmax_attention(q, k, v)
    # For float16, JAX's own asks for a product that only GPUs have.
    logits = jnp.einsum("bqhc,bkhc->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits).astype(v.dtype), v)


def average_pool(x: jax.Array) -> jax.Array:
    """[B, H, W, C] → [B, H/2, W/2, C]: the published downsampling where it has no convolution."""
    b, height, width, c = x.shape
    return x.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))


def split_module(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """A module's structure, and its parameters' shapes as a nested dict, computing nothing."""
    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def pytorch_default_init(shapes: dict, seed: int) -> dict:
    """Initial parameters as in the published code: PyTorch's default U(−1/√fan_in, 1/√fan_in), norms 1 and 0.

    A nested dict of float32 numpy arrays with the paths of `shapes`. Each is a function of (seed, its name) alone.
    Sampled by numpy: compiling JAX's initialisers takes longer.
    """
    shapes = traverse_util.flatten_dict(shapes, sep=".")

    def init(name):
        module, leaf = name.rsplit(".", 1)
        shape = shapes[name].shape
        if f"{module}.scale" in shapes:
            return np.full(shape, leaf == "scale", np.float32)
        bound = 1 / math.sqrt(math.prod(shapes[f"{module}.kernel"].shape[:-1]))
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return traverse_util.unflatten_dict({name: init(name) for name in shapes}, sep=".")
