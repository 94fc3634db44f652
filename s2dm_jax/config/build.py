"""From a config to the objects that it names; imports jax only when called."""

from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from s2dm_jax.config.defaults import image_shape

if TYPE_CHECKING:
    from s2dm_jax.diffusion.objectives import Objective
    from s2dm_jax.diffusion.schedule import NoiseSchedule
    from s2dm_jax.models.unet import UNet


def build_schedule(config: ConfigDict) -> "NoiseSchedule":
    """The `NoiseSchedule` that the config names."""
    from s2dm_jax.diffusion.schedule import SCHEDULES

    return SCHEDULES[config.diffusion.schedule](config.diffusion.T)


def build_objective(config: ConfigDict) -> "Objective":
    """The `objectives.Objective` that the config names: its preset with the options that are not None."""
    from s2dm_jax.diffusion.objectives import PRESETS

    values = {name: value for name, value in config.loss.items() if name != "preset" and value is not None}
    return PRESETS[config.loss.preset](**values)


def build_network(config: ConfigDict) -> "UNet":
    """The `unet.UNet` that the config names."""
    import jax

    from s2dm_jax.models.unet import UNet

    model = config.model.to_dict()
    if model["dtype"] == "auto":
        # Convolutions in bfloat16 are slower than in float32 on CPU.
        model["dtype"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    resolution, channels = image_shape(config)
    return UNet(resolution=resolution, in_channels=channels, out_channels=channels, **model)
