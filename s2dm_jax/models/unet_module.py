"""The layers of the UNet of the DDIM code, layer for layer, in NHWC; `unet.py` is its public face."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from s2dm_jax.models.cpu_ops import enlarge
from s2dm_jax.models.layers import (
    AttnBlock,
    Conv3x3,
    GroupNorm,
    Linear,
    ResnetBlock,
    average_pool,
    split_module,
    timestep_embedding,
)


class UNetModule(nnx.Module):
    """The network of DDIM (Song et al. 2021), also that of S²-DM and SA-DPM."""

    # `config` is a `unet.UNet`; that file imports this one.
    def __init__(self, config: Any):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        ch, temb_dim = config.ch, 4 * config.ch
        levels = range(len(config.ch_mult))

        def block(c_in, c_out):
            return ResnetBlock(c_in, c_out, temb_dim, config.dropout, dtype)

        def attentions(i, count):
            if config.resolution >> i not in config.attn_resolutions:
                return nnx.Dict()
            return nnx.Dict({str(j): AttnBlock(ch * config.ch_mult[i], dtype) for j in range(count)})

        self.temb = nnx.Dict(dense=nnx.Dict({"0": Linear(ch, temb_dim), "1": Linear(temb_dim, temb_dim)}))
        self.conv_in = Conv3x3(config.in_channels, ch, dtype)

        c = ch
        skips = [c]
        self.down: nnx.Dict = nnx.Dict()
        for i in levels:
            level = nnx.Dict(block=nnx.Dict(), attn=attentions(i, config.num_res_blocks))
            for j in range(config.num_res_blocks):
                level.block[str(j)] = block(c, ch * config.ch_mult[i])
                c = ch * config.ch_mult[i]
                skips.append(c)
            if i != levels[-1]:
                if config.resamp_with_conv:
                    # The published code pads one row at the bottom and one column on the right only.
                    level["downsample"] = nnx.Dict(conv=Conv3x3(c, c, dtype, stride=2, pad=(0, 1)))
                skips.append(c)
            self.down[str(i)] = level

        self.mid = nnx.Dict(block_1=block(c, c), attn_1=AttnBlock(c, dtype), block_2=block(c, c))

        self.up: nnx.Dict = nnx.Dict()
        for i in reversed(levels):
            level = nnx.Dict(block=nnx.Dict(), attn=attentions(i, config.num_res_blocks + 1))
            for j in range(config.num_res_blocks + 1):
                level.block[str(j)] = block(c + skips.pop(), ch * config.ch_mult[i])
                c = ch * config.ch_mult[i]
            if i != 0 and config.resamp_with_conv:
                level["upsample"] = nnx.Dict(conv=Conv3x3(c, c, dtype, upsample=True))
            self.up[str(i)] = level

        self.norm_out = GroupNorm(c)
        self.conv_out = Conv3x3(c, config.out_channels, jnp.float32)

    def __call__(self, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The network's output (ε, v or x_0) and the features that it is read from, [B, H, W, ch·ch_mult[0]]."""
        config = self.config
        levels = range(len(config.ch_mult))
        num_blocks = len(levels) * (2 * config.num_res_blocks + 1) + 2
        keys = itertools.repeat(None) if dropout_key is None else iter(jax.random.split(dropout_key, num_blocks))

        def run(block, *inputs):
            return jax.checkpoint(block)(*inputs) if config.remat else block(*inputs)

        temb = self.temb.dense["0"](timestep_embedding(t, config.ch))  # [B] → [B, 4·ch]
        temb = self.temb.dense["1"](nnx.silu(temb))

        # Down: level i has resolution H/2^i and ch·ch_mult[i] channels.
        h = self.conv_in(x.astype(config.dtype))  # [B, H, W, C] → [B, H, W, ch]
        skips = [h]
        for i in levels:
            level = self.down[str(i)]
            for j in range(config.num_res_blocks):
                h = run(level.block[str(j)], h, temb, next(keys))  # channels → ch·ch_mult[i]
                if str(j) in level.attn:
                    h = run(level.attn[str(j)], h)
                skips.append(h)
            if i != levels[-1]:
                h = level.downsample.conv(h) if config.resamp_with_conv else average_pool(h)  # H, W → H/2, W/2
                skips.append(h)

        h = run(self.mid.block_1, h, temb, next(keys))
        h = run(self.mid.attn_1, h)
        h = run(self.mid.block_2, h, temb, next(keys))

        # Up: each block reads the skip of the way down, the last one first.
        for i in reversed(levels):
            level = self.up[str(i)]
            for j in range(config.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)  # channels of both
                h = run(level.block[str(j)], h, temb, next(keys))  # → ch·ch_mult[i]
                if str(j) in level.attn:
                    h = run(level.attn[str(j)], h)
            if i != 0:
                h = level.upsample.conv(h) if config.resamp_with_conv else enlarge(h)  # H, W → 2H, 2W

        return self.conv_out(nnx.silu(self.norm_out(h)).astype(jnp.float32)), h


@functools.lru_cache
def definition(config: Any) -> tuple[nnx.GraphDef, dict]:
    """The structure of the network, and the shapes of its parameters."""
    return split_module(lambda: UNetModule(config))
