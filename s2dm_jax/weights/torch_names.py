"""Converts weights from and to the published PyTorch names and layouts; infers the network from its tensors' shapes.

Paths are the same on both sides; only the last part's name and the layout differ (`_leaf_to_torch`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from s2dm_jax.models import variance_head
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.network import Network
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import improved_names

# Convolutions with a 1×1 kernel in the published code, matrix products here, and that kernel's further axes.
_POINTWISE = dict.fromkeys(("q", "k", "v", "proj_out", "nin_shortcut"), 2)
# In the order of the published state_dict.
_MODULES = ("temb", "conv_in", "down", "mid", "up", "norm_out", "conv_out")


class _Names(NamedTuple):
    """What differs between the state_dicts of two networks.

    Attributes:
      pointwise: name of a layer that is a matrix product here → axes of length 1 that its kernel ends with in PyTorch.
      place: function of a tensor's name that sorts the names in the order of the state_dict.
      head: module of `VarianceHead` → module of Extended-Analytic-DPM's state_dict, which stores it with the network's.
    """

    pointwise: Mapping[str, int]
    place: Callable[[str], Any]
    head: Mapping[str, str]


_DDIM = _Names(
    _POINTWISE,
    lambda name: _MODULES.index(name.split(".")[0]),
    {"norm_out2": "norm_out2", "conv_out2": "conv_out2"},
)
_IMPROVED = _Names(improved_names.POINTWISE, improved_names.place, improved_names.HEAD_MODULES)
_HEAD_PREFIXES = ("norm_out2.", "conv_out2.", "out2.")


def _names_of(params: Mapping) -> _Names:
    """The names of the network that has these parameters."""
    return _IMPROVED if "time_embed" in params else _DDIM


def as_published(network: Network) -> UNet | ImprovedUNet:
    """The network as one whose weights have published names; ValueError for any other."""
    if not isinstance(network, UNet | ImprovedUNet):
        raise ValueError(
            f"weights of a {type(network).__name__} have no published names; only UNet's and ImprovedUNet's have"
        )
    return network


def to_torch(params: dict) -> dict[str, np.ndarray]:
    """Parameters as the published state_dict, in its order: convolutions OIHW, matrices [out, in], all contiguous."""
    names, flat = _names_of(params), traverse_util.flatten_dict(params, sep=".")
    state = dict(_leaf_to_torch(name, np.asarray(value), names.pointwise) for name, value in flat.items())
    return {name: np.ascontiguousarray(state[name]) for name in sorted(state, key=names.place)}


def torch_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a network's published state_dict."""
    return dict(_torch_leaves(network).values())


def from_torch(state: Mapping[str, np.ndarray], network: Network) -> dict:
    """Parameters, nested and in float32, from a published state_dict: the inverse of `to_torch`.

    A ValueError names the first tensor that is missing, unknown, or of another shape.
    """
    return _from_torch(state, network.param_shapes(), _torch_leaves(network))


def split_head(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a network, and those of a variance head in the same state_dict."""
    head = {name: value for name, value in state.items() if name.startswith(_HEAD_PREFIXES)}
    return {name: value for name, value in state.items() if name not in head}, head


def head_to_torch(head_params: dict, network: Network) -> dict[str, np.ndarray]:
    """A variance head's tensors as Extended-Analytic-DPM has them beside those of the network ("simple" there)."""
    state = traverse_util.flatten_dict(head_params, sep=".")
    leaves = _head_leaves(network)
    ordered = sorted(state, key=lambda name: (not name.startswith("norm"), name.endswith("bias")))
    values = {leaves[name][0]: _leaf_to_torch(name, np.asarray(state[name]), {})[1] for name in ordered}
    return {name: np.ascontiguousarray(value) for name, value in values.items()}


def head_from_torch(state: Mapping[str, np.ndarray], network: Network) -> dict:
    """The parameters of a variance head for the network: the inverse of `head_to_torch`; ValueError as `from_torch`."""
    return _from_torch(state, variance_head.param_shapes(network), _head_leaves(network))


def _head_leaves(network: Network) -> dict[str, tuple[str, tuple[int, ...]]]:
    modules = _names_of(network.param_shapes()).head
    leaves = _leaves(variance_head.param_shapes(network), {})
    renamed = {name: torch_name.partition(".") for name, (torch_name, _) in leaves.items()}
    return {name: (f"{modules[renamed[name][0]]}.{renamed[name][2]}", shape) for name, (_, shape) in leaves.items()}


def _from_torch(state: Mapping[str, np.ndarray], nested: dict, leaves: Mapping[str, tuple[str, tuple]]) -> dict:
    flat, rest = {}, dict(state)
    shapes = traverse_util.flatten_dict(nested, sep=".")
    for name, (torch_name, shape) in leaves.items():
        if torch_name not in rest:
            raise ValueError(f"the checkpoint lacks the tensor {torch_name} of shape {shape}")
        value = np.asarray(rest.pop(torch_name), np.float32)
        if value.shape != shape:
            raise ValueError(f"{torch_name} has shape {value.shape}, but the network needs {shape}")
        flat[name] = _leaf_from_torch(name, value, shapes[name].shape)
    if rest:
        name = min(rest)
        raise ValueError(f"the network has no place for the checkpoint's tensor {name} of shape {np.shape(rest[name])}")
    return traverse_util.unflatten_dict(flat, sep=".")


def infer_network(shapes: Mapping[str, tuple[int, ...]], resolution: int | None = None) -> UNet:
    """DDIM's network of a published state_dict, from its names and shapes; dropout, which they leave open, is 0.

    The resolution of the images is inferred if 128 channels of RGB images get attention at one resolution: in every
    published config that is 16 pixels. Other networks need `resolution`, or raise a ValueError as other architectures.
    """
    if any(name.startswith("down_blocks.") for name in shapes):
        raise ValueError("these are diffusers' names; give the folder that has the network's config.json too")

    def channels(name, axis=0):
        if len(shapes.get(name, ())) != 4:
            found = f"is of shape {shapes[name]}" if name in shapes else "is missing"
            raise ValueError(
                f"these are not the weights of DDIM's UNet: {name} {found}, but a kernel's 4 axes are needed"
            )
        return shapes[name][axis]

    def numbers(pattern):
        return sorted({int(match[1]) for name in shapes if (match := re.match(pattern, name))})

    ch, in_channels = channels("conv_in.weight"), channels("conv_in.weight", 1)
    levels = numbers(r"down\.(\d+)\.")
    widths = [channels(f"down.{i}.block.0.conv1.weight") for i in range(len(levels))]
    if not levels or levels != list(range(len(levels))) or any(width % ch for width in widths):
        raise ValueError(
            f"these are not the weights of DDIM's UNet: resolution levels {levels} of {widths} channels after {ch} at "
            "first"
        )
    attention = numbers(r"down\.(\d+)\.attn\.")
    if resolution is None:
        if len(attention) != 1 or ch != 128 or in_channels != 3:
            raise ValueError(
                "the images' resolution cannot be inferred from the shapes, since this is not a published network; "
                "give it as --resolution"
            )
        resolution = 16 << attention[0]
    if resolution % (1 << levels[-1]):
        raise ValueError(f"images of {resolution} pixels cannot be halved {levels[-1]} times, as this network does")
    return UNet(
        resolution=resolution,
        in_channels=in_channels,
        out_channels=channels("conv_out.weight"),
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=len(numbers(r"down\.0\.block\.(\d+)\.")),
        attn_resolutions=tuple(resolution >> i for i in attention),
        resamp_with_conv=len(levels) == 1 or "down.0.downsample.conv.weight" in shapes,
    )


def _torch_leaves(network: Network) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The published name and shape of each of the network's parameters."""
    nested = network.param_shapes()
    return _leaves(nested, _names_of(nested).pointwise)


def _leaves(nested: dict, pointwise: Mapping[str, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes = traverse_util.flatten_dict(nested, sep=".")
    # Broadcasting takes no memory.
    empty = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in shapes.items()}
    leaves = {name: _leaf_to_torch(name, value, pointwise) for name, value in empty.items()}
    return {name: (torch_name, value.shape) for name, (torch_name, value) in leaves.items()}


def _leaf_to_torch(name: str, value: np.ndarray, pointwise: Mapping[str, int]) -> tuple[str, np.ndarray]:
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return name, value
    if leaf == "kernel" and value.ndim == 4:
        value = value.transpose(3, 2, 0, 1)  # HWIO → OIHW
    elif leaf == "kernel":
        value = value.T  # [in, out] → [out, in]
        value = value.reshape(value.shape + (1,) * pointwise.get(module.split(".")[-1], 0))
    return f"{module}.weight", value


def _leaf_from_torch(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not name.endswith(".kernel"):
        return value
    if len(shape) == 2:
        return value.reshape(shape[::-1]).T
    return value.transpose(2, 3, 1, 0)  # OIHW → HWIO
