"""The UNet of the DDIM code, layer for layer, in NHWC; parameters are a plain nested dict.

Attribute paths equal the published state_dict's names (`down.0.block.1.conv1`), so that
`weights/torch_names.py` needs only a few rules. NNX describes the network; everything else sees
`apply(config, params, x, t)`.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from s2dm_jax.diffusion.types import EpsFn
from s2dm_jax.models.layers import (
    AttnBlock,
    Conv3x3,
    GroupNorm,
    Linear,
    ResnetBlock,
    average_pool,
    timestep_embedding,
)


@dataclasses.dataclass(frozen=True)
class UNet:
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


class UNetModule(nnx.Module):
    """ε-prediction network of DDIM (Song et al. 2021), also that of S²-DM and SA-DPM."""

    def __init__(self, config: UNet):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        ch, temb_dim = config.ch, 4 * config.ch
        levels = range(len(config.ch_mult))
        blocks = range(config.num_res_blocks)

        def block(c_in, c_out):
            return ResnetBlock(c_in, c_out, temb_dim, config.dropout, dtype)

        def attentions(level, count):
            if config.resolution >> level not in config.attn_resolutions:
                return nnx.Dict()
            return nnx.Dict({str(j): AttnBlock(ch * config.ch_mult[level], dtype) for j in range(count)})

        self.temb = nnx.Dict(dense=nnx.Dict({"0": Linear(ch, temb_dim), "1": Linear(temb_dim, temb_dim)}))
        self.conv_in = Conv3x3(config.in_channels, ch, dtype)

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
                    level["downsample"] = nnx.Dict(conv=Conv3x3(c, c, dtype, stride=2))
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
                h = level.downsample.conv(h) if config.resamp_with_conv else average_pool(h)
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


@functools.lru_cache
def _definition(config: UNet) -> tuple[nnx.GraphDef, dict]:
    model = nnx.eval_shape(lambda: UNetModule(config))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def param_shapes(config: UNet) -> dict:
    """Nested dict of `jax.ShapeDtypeStruct`, one for each parameter."""
    return _definition(config)[1]


def num_params(config: UNet) -> int:
    """Number of scalar parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))


def init_params(config: UNet, seed: int) -> dict:
    """`pytorch_default_init` of `param_shapes`."""
    return pytorch_default_init(param_shapes(config), seed)


def pytorch_default_init(shapes: dict, seed: int) -> dict:
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
    config: UNet, params: dict, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None
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
    config: UNet, params: dict, x: jax.Array, t: jax.Array, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`apply`, and the features [B, H, W, ch·ch_mult[0]] that the last norm and convolution read ε from."""
    expected = (config.resolution, config.resolution, config.in_channels)
    if x.shape[1:] != expected:
        raise ValueError(f"the network takes images of shape {expected}, not {x.shape[1:]}")
    return nnx.merge(_definition(config)[0], params)(x, t, dropout_key)


def eps_fn(config: UNet, params: dict) -> EpsFn:
    """The network as samplers and losses see it: (x_t [B,H,W,C], t [B]) → ε [B,H,W,C], dropout off."""
    return functools.partial(apply, config, params)
