"""Infers the network of an improved-diffusion state_dict from its names and shapes, and what they leave open."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from s2dm_jax.models.improved_unet import ImprovedUNet

# What the shapes do not tell, by the names of `read_weights`' `stated`.
OPEN_FIELDS = ("num_heads", "t_offset", "t_scale", "schedule", "T")

Shapes = Mapping[str, tuple[int, ...]]


class Assumed(NamedTuple):
    """What the shapes of a state_dict leave open.

    Attributes:
      whose: the published networks whose values are used if the user states none.
      num_heads, t_offset, t_scale: as in `ImprovedUNet`.
      schedule, T: the noise schedule's name and number of timesteps.
    """

    whose: str
    num_heads: int
    t_offset: int
    t_scale: float
    schedule: str
    T: int


def is_improved(names: Shapes) -> bool:
    """Whether tensors of these names are an improved-diffusion UNet's."""
    return "time_embed.0.weight" in names or "input_blocks.0.0.weight" in names


def infer_improved(
    shapes: Shapes, resolution: int | None = None, stated: Mapping[str, Any] | None = None
) -> tuple[ImprovedUNet, Assumed]:
    """The network of a published state_dict, and what was assumed of it.

    Dropout is not recorded either, and is that of the published networks. The resolution of the images is inferred if
    networks of 128 or 192 channels for RGB images have attention as the published ones: at 16 pixels, or 16 and 8.

    Args:
      stated: values of OPEN_FIELDS that the user states.

    Raises:
      ValueError: for other networks, naming a tensor and its shape, or the field that is missing.
    """
    first = _kernel(shapes, "input_blocks.0.0.weight")
    ch, in_channels = first[:2]
    if in_channels == 6:
        raise ValueError(
            "its first convolution reads 6 channels, as improved-diffusion's super-resolution networks do, which also "
            "need the small image; networks for images of 1 or 3 channels can be used"
        )
    levels, resamp_with_conv = _levels(shapes)
    widths = [level[0][0] for level in levels]
    attention = [i for i, level in enumerate(levels) if level[0][1]]
    blocks = len(levels[0])
    if any(level != [level[0]] * blocks for level in levels) or any(width % ch for width in widths):
        raise ValueError(
            f"its resolution levels have blocks of (channels, attention) {levels} after {ch} channels at first, but "
            "improved-diffusion has the same number of equal blocks at each level; guided-diffusion's networks that "
            "resample in residual blocks are not supported"
        )
    if resolution is None:
        resolution = _published_resolution(ch, in_channels, attention)
    if resolution % (1 << len(levels) - 1):
        raise ValueError(
            f"images of {resolution} pixels cannot be halved {len(levels) - 1} times, as this network does"
        )
    outputs = _kernel(shapes, "out.2.weight")[0]
    classes = _kernel(shapes, "label_emb.weight", axes=2)[0] if "label_emb.weight" in shapes else 0
    if outputs not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"out.2.weight has {outputs} channels, but {in_channels}, the noise, or {2 * in_channels}, noise and "
            "variance, are needed"
        )
    width_of_emb = _kernel(shapes, "input_blocks.1.0.emb_layers.1.weight", axes=2)[0]
    scale_shift_norm, learned_variance = width_of_emb == 2 * widths[0], outputs != in_channels
    assumed = _assume(scale_shift_norm, learned_variance, classes, stated or {})
    network = ImprovedUNet(
        resolution=resolution,
        in_channels=in_channels,
        out_channels=in_channels,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=blocks,
        attn_resolutions=tuple(resolution >> i for i in attention),
        # OpenAI's and Analytic-DPM's networks for CIFAR-10; the others have none.
        dropout=0.3 if resolution == 32 else 0.0,
        resamp_with_conv=resamp_with_conv,
        num_heads=assumed.num_heads,
        scale_shift_norm=scale_shift_norm,
        learned_variance=learned_variance,
        num_classes=classes,
        t_offset=assumed.t_offset,
        t_scale=assumed.t_scale,
    )
    return network, assumed


def _kernel(shapes: Shapes, name: str, axes: int = 4) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != axes or 0 in shape:
        found = f"is of shape {shape}" if name in shapes else "is missing"
        raise ValueError(
            f"these are not the weights of improved-diffusion's UNet: {name} {found}, but a kernel's {axes} axes are "
            "needed"
        )
    return shape


def _levels(shapes: Shapes) -> tuple[list[list[tuple[int, bool]]], bool]:
    """(channels, attention) of each block of each resolution level, and whether convolutions are between the levels."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d{1,4})\.", name))}
    levels: list[list[tuple[int, bool]]] = [[]]
    convolutions = set()
    for i in range(1, max(numbers) + 1):
        block = f"input_blocks.{i}.0"
        if f"{block}.in_layers.2.weight" in shapes:
            width = _kernel(shapes, f"{block}.out_layers.3.weight")[0]
            levels[-1].append((width, f"input_blocks.{i}.1.qkv.weight" in shapes))
        else:
            # Without a convolution, the mean of pixels: no tensor at all.
            convolutions.add(f"{block}.op.weight" in shapes)
            levels.append([])
    if not all(levels) or len(convolutions) > 1:
        raise ValueError(
            "these are not the weights of improved-diffusion's UNet: the blocks of input_blocks are "
            f"{sorted(numbers)}, which lack some"
        )
    return levels, convolutions != {False}


def _published_resolution(ch: int, in_channels: int, attention: list[int]) -> int:
    """The resolution at which these levels with attention have 16 pixels, or 16 and 8."""
    if ch not in (128, 192) or in_channels != 3 or not attention or attention[1:] not in ([], [attention[0] + 1]):
        raise ValueError(
            "the images' resolution cannot be inferred from the shapes, since this is not a published network; give "
            "it as --resolution"
        )
    return 16 << attention[0]


def _assume(scale_shift_norm: bool, learned_variance: bool, classes: int, stated: Mapping[str, Any]) -> Assumed:
    """What the shapes leave open: as stated, else as in the published networks of this kind."""
    rescales = False
    if not learned_variance and scale_shift_norm and not classes:
        values = Assumed("Analytic-DPM's for CIFAR-10", 4, 1, 1.0, "linear", 1000)
    elif not learned_variance:
        values, rescales = Assumed("improved-diffusion's defaults", 4, 0, 1.0, "linear", 1000), True
    elif not scale_shift_norm:
        values = Assumed("improved-diffusion's for LSUN", 1, 0, 1.0, "linear", 1000)
    elif classes:
        values = Assumed("improved-diffusion's for classes of ImageNet", 4, 0, 1.0, "cosine", 4000)
    else:
        values, rescales = Assumed("improved-diffusion's for CIFAR-10 and ImageNet", 4, 0, 1.0, "cosine", 4000), True
    values = values._replace(**{name: value for name, value in stated.items() if name in OPEN_FIELDS})
    # Its `rescale_timesteps`.
    return values._replace(t_scale=1000 / values.T) if rescales and "t_scale" not in stated else values
