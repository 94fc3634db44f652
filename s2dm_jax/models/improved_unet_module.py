"""The layers of improved-diffusion's UNet, layer for layer, in NHWC; `improved_unet.py` is its public face."""

import functools
import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from s2dm_jax.models.cpu_ops import enlarge
from s2dm_jax.models.layers import (
    Conv3x3,
    GroupNorm,
    Linear,
    add,
    attention,
    average_pool,
    pytorch_default_init,
    split_module,
)


def embedding_frequencies(dim: int) -> np.ndarray:
    """10000^(−i/(dim/2)) for i = 0 … dim/2 − 1, float64; dim is even."""
    half = dim // 2
    return np.exp(-math.log(10000) * np.arange(half) / half)


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal embedding of t [B], float32 [B, dim]: cosines of t times each frequency first, then sines."""
    angles = t.astype(jnp.float32)[:, None] * embedding_frequencies(dim).astype(np.float32)  # [B, dim/2]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ResBlock(nnx.Module):
    """norm → swish → conv → norm, scaled and shifted by the embedding → swish → dropout → conv → + shortcut.

    Without `scale_shift_norm` the embedding is added before the second norm.
    """

    def __init__(self, c_in: int, c_out: int, emb_dim: int, config: Any):
        dtype = jnp.dtype(config.dtype)
        self.scale_shift_norm = config.scale_shift_norm
        self.in_layers = nnx.Dict({"0": GroupNorm(c_in, config.norm_eps), "2": Conv3x3(c_in, c_out, dtype)})
        self.emb_layers = nnx.Dict({"1": Linear(emb_dim, 2 * c_out if config.scale_shift_norm else c_out)})
        self.out_layers = nnx.Dict({"0": GroupNorm(c_out, config.norm_eps), "3": Conv3x3(c_out, c_out, dtype)})
        self.dropout = nnx.Dropout(config.dropout)
        if c_in != c_out:
            self.skip_connection = Linear(c_in, c_out, dtype)

    def __call__(self, x: jax.Array, emb: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        h = self.in_layers["2"](nnx.silu(self.in_layers["0"](x)))  # [B, H, W, c_in] → [B, H, W, c_out]
        emb = self.emb_layers["1"](nnx.silu(emb))
        if self.scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.out_layers["0"](h, (scale, shift))
        else:
            h = self.out_layers["0"](add(h, emb[:, None, None]))
        h = self.dropout(nnx.silu(h), deterministic=dropout_key is None, rngs=dropout_key)
        h = self.out_layers["3"](h)
        return h + (self.skip_connection(x) if hasattr(self, "skip_connection") else x)


class AttentionBlock(nnx.Module):
    """Self-attention of several heads over the pixels, added to its input.

    The channels of `qkv` are query, key and value of the first head, then those of the second. The published code
    multiplies query and key by the fourth root of 1/head channels each, against overflow in float16; here their
    product, in float32, is divided once.
    """

    def __init__(self, channels: int, config: Any):
        dtype = jnp.dtype(config.dtype)
        self.num_heads = config.num_heads
        self.norm = GroupNorm(channels, config.norm_eps)
        self.qkv = Linear(channels, 3 * channels, dtype)
        self.proj_out = Linear(channels, channels, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, height, width, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, height * width, self.num_heads, 3, c // self.num_heads)
        attended = attention(qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])
        return x + self.proj_out(attended.reshape(x.shape))


class Downsample(nnx.Module):
    """Half the height and width: a convolution of stride 2, or the mean of four pixels."""

    def __init__(self, channels: int, config: Any):
        if config.resamp_with_conv:
            self.op = Conv3x3(channels, channels, jnp.dtype(config.dtype), stride=2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.op(x) if hasattr(self, "op") else average_pool(x)


class Upsample(nnx.Module):
    """Twice the height and width: pixels repeated, then perhaps a convolution."""

    def __init__(self, channels: int, config: Any):
        if config.resamp_with_conv:
            self.conv = Conv3x3(channels, channels, jnp.dtype(config.dtype), upsample=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x) if hasattr(self, "conv") else enlarge(x)


class ImprovedUNetModule(nnx.Module):
    """The network of improved-diffusion (Nichol & Dhariwal 2021)."""

    # `config` is an `improved_unet.ImprovedUNet`; that file imports this one.
    def __init__(self, config: Any):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        ch, emb_dim = config.ch, 4 * config.ch
        last = len(config.ch_mult) - 1

        def layers(c_in, c_out, *more):
            """A block of `input_blocks` or `output_blocks`."""
            return nnx.Dict({str(i): layer for i, layer in enumerate([ResBlock(c_in, c_out, emb_dim, config), *more])})

        def attention_at(level):
            attends = config.resolution >> level in config.attn_resolutions
            return [AttentionBlock(ch * config.ch_mult[level], config)] if attends else []

        self.time_embed = nnx.Dict({"0": Linear(ch, emb_dim), "2": Linear(emb_dim, emb_dim)})
        if config.num_classes:
            self.label_emb = nnx.Dict(embedding=nnx.Param(jnp.zeros((config.num_classes, emb_dim))))

        c = ch
        down: list[nnx.Dict] = [nnx.Dict({"0": Conv3x3(config.in_channels, ch, dtype)})]
        skips = [c]
        for i, factor in enumerate(config.ch_mult):
            for _ in range(config.num_res_blocks):
                down.append(layers(c, ch * factor, *attention_at(i)))
                c = ch * factor
                skips.append(c)
            if i != last:
                down.append(nnx.Dict({"0": Downsample(c, config)}))
                skips.append(c)
        self.input_blocks = nnx.Dict({str(i): block for i, block in enumerate(down)})

        self.middle_block = layers(c, c, AttentionBlock(c, config), ResBlock(c, c, emb_dim, config))

        up = []
        for i, factor in reversed(list(enumerate(config.ch_mult))):
            for j in range(config.num_res_blocks + 1):
                ends = i != 0 and j == config.num_res_blocks
                upsample = [Upsample(ch * factor, config)] if ends else []
                up.append(layers(c + skips.pop(), ch * factor, *attention_at(i), *upsample))
                c = ch * factor
        self.output_blocks = nnx.Dict({str(i): block for i, block in enumerate(up)})

        channels_out = config.out_channels * (2 if config.learned_variance else 1)
        self.out = nnx.Dict({"0": GroupNorm(c, config.norm_eps), "2": Conv3x3(c, channels_out, jnp.float32)})

    def __call__(
        self, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None, labels: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The network's output, with the learned variance's channels last, and the features that it is read from."""
        config = self.config
        num_blocks = len(config.ch_mult) * (2 * config.num_res_blocks + 1) + 2
        keys = itertools.repeat(None) if dropout_key is None else iter(jax.random.split(dropout_key, num_blocks))

        t = (t.astype(jnp.float32) + config.t_offset) * config.t_scale
        emb = self.time_embed["0"](timestep_embedding(t, config.ch))  # [B] → [B, 4·ch]
        emb = self.time_embed["2"](nnx.silu(emb))
        if labels is not None:
            emb = emb + self.label_emb["embedding"][...][labels]

        h, skips = x.astype(config.dtype), []
        for i in range(len(self.input_blocks)):
            h = self._run(self.input_blocks[str(i)], h, emb, keys)  # a level's blocks: H/2^i, ch·ch_mult[i] channels
            skips.append(h)
        h = self._run(self.middle_block, h, emb, keys)
        # Each block on the way up reads the output of one on the way down, the last one first.
        for i in range(len(self.output_blocks)):
            h = self._run(self.output_blocks[str(i)], jnp.concatenate([h, skips.pop()], axis=-1), emb, keys)

        return self.out["2"](nnx.silu(self.out["0"](h)).astype(jnp.float32)), h

    def _run(self, layers: nnx.Dict, h: jax.Array, emb: jax.Array, keys: Iterator[jax.Array | None]) -> jax.Array:
        """The layers of one published block, one after another."""
        for i in range(len(layers)):
            layer = layers[str(i)]
            recomputed = self.config.remat and isinstance(layer, ResBlock | AttentionBlock)
            call = jax.checkpoint(layer) if recomputed else layer
            h = call(h, emb, next(keys)) if isinstance(layer, ResBlock) else call(h)
        return h


def init(shapes: dict, seed: int) -> dict:
    """Initial parameters as in the published code, each a function of (seed, its name).

    PyTorch's default but for the last convolution of each block and of the network, which is 0, and the embedding of
    classes, standard normal.
    """
    flat = traverse_util.flatten_dict(shapes, sep=".")
    embeddings = [name for name in flat if name.endswith(".embedding")]
    rest = traverse_util.unflatten_dict({k: v for k, v in flat.items() if k not in embeddings}, sep=".")
    params = traverse_util.flatten_dict(pytorch_default_init(rest, seed), sep=".")
    for name, value in params.items():
        if name.rpartition(".")[0].endswith(("out_layers.3", "proj_out")) or name.startswith("out.2."):
            params[name] = np.zeros_like(value)
    for name in embeddings:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        params[name] = rng.standard_normal(flat[name].shape).astype(np.float32)
    return traverse_util.unflatten_dict(params, sep=".")


@functools.lru_cache
def definition(config: Any) -> tuple[nnx.GraphDef, dict]:
    """The structure of the network, and the shapes of its parameters."""
    return split_module(lambda: ImprovedUNetModule(config))
