"""Weights in and out: the published PyTorch names and layouts to ours and back, the network from the shapes.

Paths are the same in both; only the last part's name and the layout differ, as `_leaf_to_torch` says.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from s2dm_jax.models.network import Network
from s2dm_jax.models.unet import UNet

# Convolutions with a 1×1 kernel in the published code, matrix products here.
_POINTWISE = ("q", "k", "v", "proj_out", "nin_shortcut")


def as_unet(network: Network) -> UNet:
    """The network, once sure that its weights have published names.

    Raises:
      ValueError: for another network than DDIM's UNet.
    """
    if not isinstance(network, UNet):
        raise ValueError(f"weights of a {type(network).__name__} have no published names; only UNet's have")
    return network


def to_torch(params: dict) -> dict[str, np.ndarray]:
    """Parameters under the published DDIM/SA-DPM/PNDM state_dict's names and in its layouts.

    Args:
      params: nested dict as from `Network.init`.

    Returns:
      Flat dict of arrays: convolutions OIHW, matrices [out, in].
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    return dict(_leaf_to_torch(name, np.asarray(value)) for name, value in flat.items())


def torch_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published state_dict of a network, and its shape."""
    shapes = traverse_util.flatten_dict(network.param_shapes(), sep=".")
    # Broadcasting takes no memory.
    leaves = ((name, np.broadcast_to(np.float32(0), leaf.shape)) for name, leaf in shapes.items())
    return {name: value.shape for name, value in (_leaf_to_torch(*leaf) for leaf in leaves)}


def from_torch(state: Mapping[str, np.ndarray], network: Network) -> dict:
    """Parameters from a published state_dict (`reference.md` 1.3), the inverse of `to_torch`.

    Args:
      state: torch name → array; no `module.` prefix.
      network: what the parameters belong to.

    Returns:
      Nested dict of float32 numpy arrays.

    Raises:
      ValueError: naming the first tensor that is missing, not known, or of another shape.
    """
    shapes = traverse_util.flatten_dict(network.param_shapes(), sep=".")
    flat, known = {}, set()
    for name, leaf in shapes.items():
        torch_name, expected = _leaf_to_torch(name, np.broadcast_to(np.float32(0), leaf.shape))
        known.add(torch_name)
        if torch_name not in state:
            raise ValueError(f"the checkpoint lacks the tensor {torch_name} of shape {expected.shape}")
        value = np.asarray(state[torch_name], np.float32)
        if value.shape != expected.shape:
            raise ValueError(f"{torch_name} has shape {value.shape}, but the network needs {expected.shape}")
        flat[name] = _leaf_from_torch(name, value)
    unknown = sorted(set(state) - known)
    if unknown:
        raise ValueError(
            f"the network has no place for the checkpoint's tensor {unknown[0]} of shape {np.shape(state[unknown[0]])}"
        )
    return traverse_util.unflatten_dict(flat, sep=".")


def infer_network(shapes: Mapping[str, tuple[int, ...]], resolution: int | None = None) -> UNet:
    """The network that a published state_dict belongs to, from its names and shapes (`reference.md` 1.3).

    They tell everything but dropout, which stays 0, and the size of the images. In every published config 128
    channels of RGB images get attention at 16 pixels: of such a network the size is known.

    Args:
      shapes: torch name → shape.
      resolution: of the images, where it is known.

    Raises:
      ValueError: if this is another architecture, or the resolution cannot be told.
    """
    if "time_embed.0.weight" in shapes or "input_blocks.0.0.weight" in shapes:
        raise ValueError("these are weights of an improved-diffusion UNet, another network than DDIM's")
    if any(name.startswith("down_blocks.") for name in shapes):
        raise ValueError("these are diffusers' names; give the folder that has the network's config.json too")

    def channels(name, axis=0):
        if len(shapes.get(name, ())) != 4:
            found = f"is of shape {shapes[name]}" if name in shapes else "is missing"
            raise ValueError(f"these are no weights of DDIM's UNet: {name} {found}, where a kernel's 4 axes are needed")
        return shapes[name][axis]

    def numbers(pattern):
        return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})

    ch = channels("conv_in.weight")
    levels = numbers(r"down\.(\d+)\.")
    widths = [channels(f"down.{i}.block.0.conv1.weight") for i in range(len(levels))]
    blocks = numbers(r"down\.0\.block\.(\d+)\.")
    odd = [width for width in widths if width % ch]
    if not levels or odd or levels != list(range(len(levels))):
        raise ValueError(
            f"these are no weights of DDIM's UNet: levels {levels} of {widths} channels after {ch} at first"
        )
    attention = numbers(r"down\.(\d+)\.attn\.")
    if resolution is None:
        if len(attention) != 1 or ch != 128 or channels("conv_in.weight", 1) != 3:
            raise ValueError(
                "the shapes do not tell the images' resolution, since it is none of the published networks; "
                "give it as --resolution"
            )
        resolution = 16 << attention[0]
    if resolution % (1 << levels[-1]):
        raise ValueError(f"images of {resolution} pixels cannot be halved {levels[-1]} times, as this network does")
    return UNet(
        resolution=resolution,
        in_channels=channels("conv_in.weight", 1),
        out_channels=channels("conv_out.weight"),
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=len(blocks),
        attn_resolutions=tuple(resolution >> i for i in attention),
        resamp_with_conv=len(levels) == 1 or "down.0.downsample.conv.weight" in shapes,
    )


def _leaf_to_torch(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    module, leaf = name.rsplit(".", 1)
    if leaf == "bias":
        return name, value
    if leaf == "kernel":
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif module.rsplit(".", 1)[-1] in _POINTWISE:
            value = value.T[:, :, None, None]
        else:
            value = value.T
    return f"{module}.weight", value


def _leaf_from_torch(name: str, value: np.ndarray) -> np.ndarray:
    if not name.endswith(".kernel"):
        return value
    if value.ndim == 2:
        return value.T
    if name.split(".")[-2] in _POINTWISE:
        return value[:, :, 0, 0].T
    return value.transpose(2, 3, 1, 0)
