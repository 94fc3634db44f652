"""The variance heads of SN-DPM and NPR-DPM (Bao et al. 2022b), on the last features of a frozen network.

A variance head has the layers that end the network, GroupNorm, swish and a 3×3 convolution ("simple" of the released
code, with its names).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from s2dm_jax.diffusion.parameterization import to_eps
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.models import layers
from s2dm_jax.models.network import NORM_EPS, Network, with_features


class Head(NamedTuple):
    """A trained variance head.

    Attributes:
      kind: "sn" for E[ε²|x_t], "npr" for E[(ε−ε̂)²|x_t].
      params: nested dict of float32 arrays.
    """

    kind: str
    params: dict


class VarianceHead(nnx.Module):
    """Features [B, H, W, channels] → [B, H, W, out_channels], of any sign."""

    def __init__(self, channels: int, out_channels: int, norm_eps: float):
        self.norm_out2 = layers.GroupNorm(channels, norm_eps)
        self.conv_out2 = layers.Conv3x3(channels, out_channels, jnp.float32)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.conv_out2(nnx.silu(self.norm_out2(features)).astype(jnp.float32))


@functools.lru_cache
def _definition(network: Network) -> tuple[nnx.GraphDef, dict]:
    network = with_features(network)
    shape = network.feature_channels, network.image_shape[-1], getattr(network, "norm_eps", NORM_EPS)
    return layers.split_module(lambda: VarianceHead(*shape))


def param_shapes(network: Network) -> dict:
    """The parameters of a variance head for this network: nested dict of `jax.ShapeDtypeStruct`."""
    return _definition(network)[1]


def init_params(network: Network, seed: int) -> dict:
    """Parameters before training as in the released code: those of the network's own last norm and convolution."""
    params = layers.pytorch_default_init(param_shapes(network), seed)
    if getattr(network, "zero_init", False):
        params["conv_out2"] = jax.tree.map(np.zeros_like, params["conv_out2"])
    return params


def apply(
    network: Network,
    params: dict,
    head_params: dict,
    schedule: NoiseSchedule,
    x: jax.Array,
    t: jax.Array,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """ε̂ and the variance head's output, float32 [B, H, W, C] each, from one pass of the frozen network.

    Args:
      network, params: the frozen network, through which no gradient flows.
      x: noisy images [B, H, W, C].
      t: [B], timesteps in 0 … T−1.
      dropout_key: for dropout in the frozen network (the released code has it on); None for none.
    """
    network = with_features(network)
    output, features = jax.lax.stop_gradient(network.apply_with_features(params, x, t, dropout_key))
    variance = nnx.merge(_definition(network)[0], head_params)(features)
    return to_eps(output, x, t, schedule, network.prediction), variance


def loss(kind: str, eps: jax.Array, eps_hat: jax.Array, head: jax.Array) -> jax.Array:
    """‖ε² − h‖² ("sn", eq. 9) or ‖(ε−ε̂)² − h‖² ("npr", eq. 13), summed over pixels as in the released code: [B].

    Args:
      kind: "sn" or "npr".
      eps: the noise in x_t, [B, H, W, C].
      eps_hat, head: from `apply`.
    """
    target = jnp.square(eps if kind == "sn" else eps - eps_hat)
    return jnp.square(target - head).sum((1, 2, 3))
