"""The UNet of the DDIM code, layer for layer, in NHWC; parameters are a plain nested dict.

Attribute paths equal the published state_dict's names (`down.0.block.1.conv1`), so that `convert.py` needs
only a few rules. NNX describes the network; everything else sees `apply(config, params, x, t)`.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from s2dm_jax.conv import conv2d, matmul, upsample_conv2d
from s2dm_jax.steps import EpsFn

NORM_GROUPS = 32
NORM_EPS = 1e-6

# NNX wants an initialiser to learn the shapes; the values come from `init_params`.
_ZEROS = nnx.initializers.zeros_init()
_Linear = functools.partial(nnx.Linear, kernel_init=_ZEROS, dot_general=lambda x, w, *_, **__: matmul(x, w))


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of the network, with the names of the published configs.

    Attributes:
      resolution: height and width of the images.
      in_channels, out_channels: image channels in, predicted channels out.
      ch: channels of the first level, a multiple of 32 (GroupNorm's groups).
      ch_mult: channels of each level as multiples of `ch`; the resolution halves between levels.
      num_res_blocks: residual blocks per level on the way down (one more on the way up).
      attn_resolutions: resolutions whose blocks are followed by self-attention.
      dropout: rate inside each residual block.
      resamp_with_conv: whether a convolution follows (up) or does (down) the resampling.
      dtype: of activations; parameters, norms, softmax, time embedding and output stay in float32.
      remat: whether each block's activations are computed again in the backward pass instead of kept.
    """

    resolution: int
    in_channels: int
    out_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.0
    resamp_with_conv: bool = True
    dtype: str = "float32"
    remat: bool = False


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
        self.temb_proj = _Linear(temb_dim, c_out, rngs=rngs)
        self.norm2 = GroupNorm(c_out)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = conv3x3(c_out, c_out, dtype, rngs)
        if c_in != c_out:
            self.nin_shortcut = _Linear(c_in, c_out, dtype=dtype, rngs=rngs)

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
        self.q = _Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.k = _Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.v = _Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.proj_out = _Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        tokens = self.norm(x).reshape(b, height * width, 1, c)
        attended = jax.nn.dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.proj_out(attended).reshape(x.shape)


class UNet(nnx.Module):
    """ε-prediction network of DDIM (Song et al. 2021), also that of S²-DM and SA-DPM."""

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        ch, temb_dim = config.ch, 4 * config.ch
        levels = range(len(config.ch_mult))
        blocks = range(config.num_res_blocks)

        def block(c_in, c_out):
            return ResnetBlock(c_in, c_out, temb_dim, config.dropout, dtype, rngs)

        def attentions(level, count):
            if config.resolution >> level not in config.attn_resolutions:
                return nnx.Dict()
            return nnx.Dict(
                {str(j): AttnBlock(ch * config.ch_mult[level], dtype, rngs) for j in range(count)}
            )

        self.temb = nnx.Dict(
            dense=nnx.Dict(
                {"0": _Linear(ch, temb_dim, rngs=rngs), "1": _Linear(temb_dim, temb_dim, rngs=rngs)}
            )
        )
        self.conv_in = conv3x3(config.in_channels, ch, dtype, rngs)

        c = ch
        skips = [c]
        self.down: nnx.Dict = nnx.Dict()
        for i in levels:
            level = nnx.Dict(block=nnx.Dict(), attn=attentions(i, config.num_res_blocks))
            for j in blocks:
                level.block[str(j)] = block(c, ch * config.ch_mult[i])
                c = ch * config.ch_mult[i]
                skips.append(c)
            if i != levels[-1]:
                if config.resamp_with_conv:
                    level["downsample"] = nnx.Dict(conv=conv3x3(c, c, dtype, rngs, stride=2))
                skips.append(c)
            self.down[str(i)] = level

        self.mid = nnx.Dict(block_1=block(c, c), attn_1=AttnBlock(c, dtype, rngs), block_2=block(c, c))

        self.up: nnx.Dict = nnx.Dict()
        for i in reversed(levels):
            level = nnx.Dict(block=nnx.Dict(), attn=attentions(i, config.num_res_blocks + 1))
            for j in range(config.num_res_blocks + 1):
                level.block[str(j)] = block(c + skips.pop(), ch * config.ch_mult[i])
                c = ch * config.ch_mult[i]
            if i != 0 and config.resamp_with_conv:
                level["upsample"] = nnx.Dict(conv=conv3x3(c, c, dtype, rngs, upsample=True))
            self.up[str(i)] = level

        self.norm_out = GroupNorm(c)
        self.conv_out = conv3x3(c, config.out_channels, jnp.float32, rngs)

    def __call__(
        self, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """ε and the features that it is read from, [B, H, W, ch·ch_mult[0]]."""
        config = self.config
        levels = range(len(config.ch_mult))
        if dropout_key is None:
            next_key = lambda: None  # noqa: E731
        else:
            count = len(levels) * (2 * config.num_res_blocks + 1) + 2
            next_key = iter(jax.random.split(dropout_key, count)).__next__

        def run(block, *inputs):
            return jax.checkpoint(block)(*inputs) if config.remat else block(*inputs)

        temb = self.temb.dense["0"](timestep_embedding(t, config.ch))
        temb = self.temb.dense["1"](nnx.silu(temb))

        h = self.conv_in(x.astype(config.dtype))
        skips = [h]
        for i in levels:
            level = self.down[str(i)]
            for j in range(config.num_res_blocks):
                h = run(level.block[str(j)], h, temb, next_key())
                if str(j) in level.attn:
                    h = run(level.attn[str(j)], h)
                skips.append(h)
            if i != levels[-1]:
                h = level.downsample.conv(h) if config.resamp_with_conv else _average_pool(h)
                skips.append(h)

        h = run(self.mid.block_1, h, temb, next_key())
        h = run(self.mid.attn_1, h)
        h = run(self.mid.block_2, h, temb, next_key())

        for i in reversed(levels):
            level = self.up[str(i)]
            for j in range(config.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = run(level.block[str(j)], h, temb, next_key())
                if str(j) in level.attn:
                    h = run(level.attn[str(j)], h)
            if i != 0 and config.resamp_with_conv:
                h = level.upsample.conv(h)
            elif i != 0:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)

        return self.conv_out(nnx.silu(self.norm_out(h)).astype(jnp.float32)), h


def _average_pool(x):
    b, height, width, c = x.shape
    return x.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))


@functools.lru_cache
def _definition(config: UNetConfig) -> tuple[nnx.GraphDef, dict]:
    model = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def param_shapes(config: UNetConfig) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`, one for each parameter."""
    return _definition(config)[1]


def num_params(config: UNetConfig) -> int:
    """Number of scalar parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))


def init_params(config: UNetConfig, seed: int) -> dict:
    """`initial_values` of `param_shapes`."""
    return initial_values(param_shapes(config), seed)


def initial_values(shapes: dict, seed: int) -> dict:
    """Parameters as the published code starts: PyTorch's default U(−1/√fan_in, 1/√fan_in), norms 1 and 0.

    Each tensor is a function of (seed, its name) alone. Drawn by numpy: compiling JAX's initialisers
    takes longer than drawing.

    Returns:
      Nested dict of float32 numpy arrays with the paths of `shapes`.
    """
    shapes = traverse_util.flatten_dict(shapes, sep=".")

    def draw(name):
        module, leaf = name.rsplit(".", 1)
        shape = shapes[name].shape
        if f"{module}.scale" in shapes:
            return np.full(shape, leaf == "scale", np.float32)
        bound = 1 / math.sqrt(math.prod(shapes[f"{module}.kernel"].shape[:-1]))
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return traverse_util.unflatten_dict({name: draw(name) for name in shapes}, sep=".")


def apply(
    config: UNetConfig, params: dict, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None
) -> jax.Array:
    """Predicts the noise in x_t: ε_θ(x_t, t).

    Args:
      config: the network's shape.
      params: nested dict as from `init_params`.
      x: noisy images [B, H, W, C], H = W = config.resolution.
      t: [B], level in 0 … T−1 (may be fractional).
      dropout_key: key for dropout; None switches dropout off.

    Returns:
      float32 [B, H, W, out_channels].

    Raises:
      ValueError: if the images do not have the network's resolution and channels.
    """
    return apply_with_features(config, params, x, t, dropout_key)[0]


def apply_with_features(
    config: UNetConfig, params: dict, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`apply`, and the features [B, H, W, ch·ch_mult[0]] that the last norm and convolution read ε from."""
    expected = (config.resolution, config.resolution, config.in_channels)
    if x.shape[1:] != expected:
        raise ValueError(f"the network takes images of shape {expected}, not {x.shape[1:]}")
    return nnx.merge(_definition(config)[0], params)(x, t, dropout_key)


def eps_fn(config: UNetConfig, params: dict) -> EpsFn:
    """The network as samplers and losses see it: (x_t [B,H,W,C], t [B]) → ε [B,H,W,C], dropout off."""
    return functools.partial(apply, config, params)
