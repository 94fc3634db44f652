"""The interface of a network: all that training, sampling, statistics, export and conversion use.

A network is a frozen, hashable value; its parameters are a nested dict apart from it, so that EMA, optimizer,
checkpoints and sharding act on plain arrays. Equal networks share compiled programs. No jax is imported here, nor by
the files in NETWORKS: a wrong shape is reported before seconds of imports.
"""

import importlib
import math
from typing import TYPE_CHECKING, Protocol, cast

from s2dm_jax.common.errors import UserError

if TYPE_CHECKING:
    import jax

    from s2dm_jax.diffusion.schedule import NoiseSchedule
    from s2dm_jax.diffusion.types import EpsFn, EpsVarianceFn

# config.model.name: the file of this folder and the class in it. Fields of the class that the group `model` of a
# config has are set from there; the constructor raises ValueError for values that do not fit together.
NETWORKS = {
    "unet": "unet:UNet",
    "improved_unet": "improved_unet:ImprovedUNet",
}

# Groups of every group normalisation in this folder: channels must be a multiple.
NORM_GROUPS = 32
# Epsilon of the norms of DDIM's code.
NORM_EPS = 1e-6


class Network(Protocol):
    """What predicts the noise in an image.

    Attributes:
      image_shape: (H, W, C) of the images.
      dtype: of activations, "float32", "bfloat16" or "float16".
    """

    def __hash__(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> str: ...

    def param_shapes(self) -> dict:
        """Nested dict of `jax.ShapeDtypeStruct`, one for each parameter."""

    def init(self, seed: int) -> dict:
        """Parameters before training, a function of `seed`: nested dict of float32 arrays."""

    def apply(
        self, params: dict, x: "jax.Array", t: "jax.Array", dropout_key: "jax.Array | None" = None
    ) -> "jax.Array":
        """The network's output for x_t, float32 [B, H, W, C], with dropout if a `dropout_key` is passed.

        x is [B, H, W, C]; t is [B], timesteps in 0 … T−1, which may be fractional.
        """

    def eps_fn(self, params: dict, schedule: "NoiseSchedule", dropout_key: "jax.Array | None" = None) -> "EpsFn":
        """The network as losses and samplers see it: (x_t [B, H, W, C], t [B]) → ε [B, H, W, C]."""


class FeatureNetwork(Network, Protocol):
    """A network that a variance head can read.

    Attributes:
      feature_channels: channels of the features.
      prediction: what `apply` returns (`parameterization.PREDICTIONS`).

    A variance head's norm has the epsilon `norm_eps` if the network has that attribute, and its convolution starts
    from 0 if the network's `zero_init` is true.
    """

    @property
    def feature_channels(self) -> int: ...

    @property
    def prediction(self) -> str: ...

    def apply_with_features(
        self, params: dict, x: "jax.Array", t: "jax.Array", dropout_key: "jax.Array | None" = None
    ) -> "tuple[jax.Array, jax.Array]":
        """`apply`, and the features [B, H, W, feature_channels] that its last norm and convolution read."""


def with_features(network: Network) -> FeatureNetwork:
    """The network itself if a variance head can read it, else a `UserError`."""
    if not hasattr(network, "apply_with_features"):
        raise UserError(
            f"{type(network).__name__} has no features for a variance head to read; choose another "
            "config.model.name, or train without config.variance_head"
        )
    return cast(FeatureNetwork, network)


class LearnedVarianceNetwork(Network, Protocol):
    """A network that also predicts the variance of DDPM's steps (Nichol & Dhariwal 2021).

    Attributes:
      learned_variance: whether it does.
    """

    @property
    def learned_variance(self) -> bool: ...

    def eps_variance_fn(self, params: dict, schedule: "NoiseSchedule") -> "EpsVarianceFn":
        """(x_t [B, H, W, C], t [B]) → ε and v: −1 for the posterior's variance, 1 for β, between them in logarithms."""


def with_learned_variance(network: Network) -> LearnedVarianceNetwork:
    """The network itself if it predicts the variance of DDPM's steps, else a ValueError."""
    if not getattr(network, "learned_variance", False):
        raise ValueError(
            "variance='learned' needs a network that predicts it, such as improved_unet with "
            "config.model.learned_variance=True; choose large or small"
        )
    return cast(LearnedVarianceNetwork, network)


def network_class(name: str) -> type:
    """The class that NETWORKS has under this name."""
    module, attribute = NETWORKS[name].split(":")
    return getattr(importlib.import_module(f"s2dm_jax.models.{module}"), attribute)


def network_name(network: Network) -> str:
    """The name that NETWORKS has for the network's class."""
    return next(name for name in NETWORKS if network_class(name) is type(network))


def num_params(network: Network) -> int:
    """Number of scalar parameters."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.param_shapes()))
