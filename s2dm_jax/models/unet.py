"""The UNet of the DDIM code as a value: its checked configuration and its computation (layers: `unet_module.py`).

Parameter paths equal the published state_dict's names (`down.0.block.1.conv1`), so that `weights/torch_names.py` needs
only a few rules.
"""

import dataclasses
from typing import TYPE_CHECKING

from s2dm_jax.models.levels import check_levels

if TYPE_CHECKING:
    import jax

    from s2dm_jax.diffusion.schedule import NoiseSchedule
    from s2dm_jax.diffusion.types import EpsFn


@dataclasses.dataclass(frozen=True)
class UNet:
    """The network of DDIM (Song et al. 2021), S²-DM and SA-DPM, with the names of the published configs.

    Attributes:
      resolution: height and width of the images in pixels.
      in_channels, out_channels: image channels in, predicted channels out.
      ch: channels of the first resolution level, a multiple of 32.
      ch_mult: channels of each resolution level as multiples of `ch`; the resolution halves between levels.
      num_res_blocks: residual blocks per resolution level on the way down (one more on the way up).
      attn_resolutions: resolutions whose blocks are followed by self-attention.
      dropout: rate inside each residual block.
      resamp_with_conv: whether a convolution follows (up) or does (down) the resampling.
      dtype: of activations; parameters, norms, softmax, time embedding and output stay in float32.
      remat: whether each block's activations are recomputed in the backward pass instead of stored.
      prediction: what the output is, "epsilon", "v" or "x0" (`diffusion/parameterization.py`).

    Raises:
      ValueError: for values that do not fit together; the message begins with the field's name.
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
    prediction: str = "epsilon"

    def __post_init__(self):
        check_levels(self.resolution, self.ch, self.ch_mult, self.attn_resolutions)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.resolution, self.resolution, self.in_channels

    @property
    def feature_channels(self) -> int:
        """Channels of what the last norm and convolution read."""
        return self.ch * self.ch_mult[0]

    def param_shapes(self) -> dict:
        """Nested dict of `jax.ShapeDtypeStruct`, one for each parameter."""
        from s2dm_jax.models.unet_module import definition

        return definition(self)[1]

    def init(self, seed: int) -> dict:
        """Initial parameters as in the published code (`layers.pytorch_default_init`)."""
        from s2dm_jax.models.layers import pytorch_default_init

        return pytorch_default_init(self.param_shapes(), seed)

    def apply(
        self, params: dict, x: "jax.Array", t: "jax.Array", dropout_key: "jax.Array | None" = None
    ) -> "jax.Array":
        """`Network.apply`: by default the noise in x_t, ε_θ(x_t, t), float32 [B, H, W, out_channels].

        Raises:
          ValueError: if the images do not have the network's resolution and channels.
        """
        return self.apply_with_features(params, x, t, dropout_key)[0]

    def apply_with_features(
        self, params: dict, x: "jax.Array", t: "jax.Array", dropout_key: "jax.Array | None" = None
    ) -> "tuple[jax.Array, jax.Array]":
        """`apply`, and the features [B, H, W, feature_channels] that its last norm and convolution read."""
        from flax import nnx

        from s2dm_jax.models.unet_module import definition

        if x.shape[1:] != self.image_shape:
            raise ValueError(f"the network takes images of shape {self.image_shape}, not {x.shape[1:]}")
        key = dropout_key if self.dropout else None
        return nnx.merge(definition(self)[0], params)(x, t, key)

    def eps_fn(self, params: dict, schedule: "NoiseSchedule", dropout_key: "jax.Array | None" = None) -> "EpsFn":
        """The network as losses and samplers see it: (x_t [B, H, W, C], t [B]) → ε [B, H, W, C]."""
        from s2dm_jax.diffusion.parameterization import eps_fn

        return eps_fn(lambda x, t: self.apply(params, x, t, dropout_key), schedule, self.prediction)
