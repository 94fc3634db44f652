"""The UNet of improved-diffusion as a value: its checked configuration and its computation (`improved_unet_module.py`).

Parameter paths equal the published state_dict's names (`input_blocks.1.0.in_layers.2`), so that
`weights/improved_names.py` needs only a few rules.
"""

import dataclasses
from typing import TYPE_CHECKING

from s2dm_jax.common.errors import UserError
from s2dm_jax.models.levels import check_levels

if TYPE_CHECKING:
    import jax

    from s2dm_jax.diffusion.schedule import NoiseSchedule
    from s2dm_jax.diffusion.types import EpsFn, EpsVarianceFn


@dataclasses.dataclass(frozen=True)
class ImprovedUNet:
    """The network of improved-diffusion (Nichol & Dhariwal 2021), which Analytic-DPM trained on CIFAR-10.

    Attributes:
      resolution, in_channels, out_channels, ch, ch_mult, num_res_blocks, attn_resolutions, dropout, resamp_with_conv,
        dtype, remat, prediction: as in `unet.UNet`.
      num_heads: heads of each self-attention.
      scale_shift_norm: whether the embedding of t scales and shifts the second norm of a block, or is added before it.
      learned_variance: whether there are as many output channels again, for the variance of DDPM's steps (section 3.1).
      num_classes: number of classes of a class-conditional network; 0: unconditional.
      t_offset, t_scale: the network embeds (t + t_offset)·t_scale. Analytic-DPM's networks for CIFAR-10 count from 1;
        improved-diffusion's count from 0 and scale to 1000 timesteps, by 1000/T.

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
    num_heads: int = 4
    scale_shift_norm: bool = True
    learned_variance: bool = False
    num_classes: int = 0
    t_offset: int = 0
    t_scale: float = 1.0
    dtype: str = "float32"
    remat: bool = False
    prediction: str = "epsilon"

    def __post_init__(self):
        check_levels(self.resolution, self.ch, self.ch_mult, self.attn_resolutions)
        for factor in self.ch_mult:
            if self.ch * factor % self.num_heads:
                raise ValueError(
                    f"num_heads={self.num_heads} must divide the channels of every resolution level, but does not "
                    f"divide {self.ch * factor}"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.resolution, self.resolution, self.in_channels

    @property
    def feature_channels(self) -> int:
        """Channels of what the last norm and convolution read."""
        return self.ch * self.ch_mult[0]

    @property
    def norm_eps(self) -> float:
        """Epsilon of the norms."""
        return 1e-5

    @property
    def zero_init(self) -> bool:
        """Whether the last convolution starts from 0."""
        return True

    def param_shapes(self) -> dict:
        """Nested dict of `jax.ShapeDtypeStruct`, one for each parameter."""
        from s2dm_jax.models.improved_unet_module import definition

        return definition(self)[1]

    def init(self, seed: int) -> dict:
        """Initial parameters as in the published code: PyTorch's default, the last convolution of each block 0."""
        from s2dm_jax.models.improved_unet_module import init

        return init(self.param_shapes(), seed)

    def apply(
        self,
        params: dict,
        x: "jax.Array",
        t: "jax.Array",
        dropout_key: "jax.Array | None" = None,
        labels: "jax.Array | None" = None,
    ) -> "jax.Array":
        """`Network.apply`: by default the noise in x_t, ε_θ(x_t, t), float32 [B, H, W, out_channels].

        Args:
          labels: int [B], the classes of the images, for a class-conditional network.

        Raises:
          ValueError: if the images do not have the network's resolution and channels, or for labels that the network
            does not take.
          UserError: if labels are missing.
        """
        return self.outputs(params, x, t, dropout_key, labels)[0]

    def apply_with_features(
        self, params: dict, x: "jax.Array", t: "jax.Array", dropout_key: "jax.Array | None" = None
    ) -> "tuple[jax.Array, jax.Array]":
        """`apply`, and the features [B, H, W, feature_channels] that its last norm and convolution read."""
        output, _, features = self.outputs(params, x, t, dropout_key)
        return output, features

    def outputs(
        self,
        params: dict,
        x: "jax.Array",
        t: "jax.Array",
        dropout_key: "jax.Array | None" = None,
        labels: "jax.Array | None" = None,
    ) -> "tuple[jax.Array, jax.Array | None, jax.Array]":
        """`apply`, the learned variance v [B, H, W, out_channels] or None, and the features."""
        from flax import nnx

        from s2dm_jax.models.improved_unet_module import definition

        if x.shape[1:] != self.image_shape:
            raise ValueError(f"the network takes images of shape {self.image_shape}, not {x.shape[1:]}")
        if labels is None and self.num_classes:
            raise UserError(
                f"the network is class-conditional (model.num_classes={self.num_classes}), and samplers and losses "
                "pass no labels; it can be converted, and ImprovedUNet.apply takes labels"
            )
        if labels is not None and not self.num_classes:
            raise ValueError("a network with num_classes=0 takes no labels")
        key = dropout_key if self.dropout else None
        output, features = nnx.merge(definition(self)[0], params)(x, t, key, labels)
        variance = output[..., self.out_channels :] if self.learned_variance else None
        return output[..., : self.out_channels], variance, features

    def eps_fn(self, params: dict, schedule: "NoiseSchedule", dropout_key: "jax.Array | None" = None) -> "EpsFn":
        """The network as losses and samplers see it: (x_t [B, H, W, C], t [B]) → ε [B, H, W, C]."""
        from s2dm_jax.diffusion.parameterization import eps_fn

        return eps_fn(lambda x, t: self.apply(params, x, t, dropout_key), schedule, self.prediction)

    def eps_variance_fn(self, params: dict, schedule: "NoiseSchedule") -> "EpsVarianceFn":
        """(x_t [B, H, W, C], t [B]) → ε and the learned variance v of `samplers.ddim.ddpm`, [B, H, W, C] each."""
        from s2dm_jax.diffusion.parameterization import to_eps

        def eps_and_variance(x, t):
            output, variance, _ = self.outputs(params, x, t)
            return to_eps(output, x, t, schedule, self.prediction), variance

        return eps_and_variance
