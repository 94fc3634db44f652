"""improved-diffusion's UNet as diffusers' `UNet2DModel`, if that can express it: names, layouts and config both ways.

Written against diffusers 0.42, like `diffusers_names.py`, whose tables are for DDIM's UNet.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.improved_unet_module import embedding_frequencies
from s2dm_jax.models.network import NORM_GROUPS
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import diffusers_names, torch_names

# Fields of a config.json that are others than in DDIM's network; all are diffusers' defaults.
_OTHERS: dict[str, Any] = {"downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}
# Fields that `read_unet_config` reads.
_READ = ("attention_head_dim", "attn_norm_num_groups", "resnet_time_scale_shift")
_IN_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_IN_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_ALONE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def check_expressible(network: ImprovedUNet) -> None:
    """Raises a ValueError, as the end of a sentence, for a network that a DDIMPipeline cannot express."""
    widths = _attention_widths(network)
    reasons = {
        f"t_scale={network.t_scale:g}": network.t_scale != 1,
        "learned_variance=True": network.learned_variance,
        f"num_classes={network.num_classes}": network.num_classes > 0,
        "resamp_with_conv=False": not network.resamp_with_conv,
        f"num_heads={network.num_heads} for attention of {' and '.join(map(str, widths))} channels": network.num_heads
        > 1
        and len(widths) > 1,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"diffusers cannot express this network: {reason}")


def _attention_widths(network: ImprovedUNet) -> list[int]:
    """The different numbers of channels that attention has, in the middle too."""
    here = [m for i, m in enumerate(network.ch_mult) if network.resolution >> i in network.attn_resolutions]
    return sorted({network.ch * m for m in (*here, network.ch_mult[-1])})


def from_zero(network: ImprovedUNet, params: dict) -> tuple[ImprovedUNet, dict]:
    """The same function with t_offset 0, as diffusers counts: embeddings of t + 1 are those of t, rotated."""
    if not network.t_offset:
        return network, params
    half = network.ch // 2
    angle = network.t_offset * embedding_frequencies(network.ch)[:, None]
    kernel = np.asarray(params["time_embed"]["0"]["kernel"], np.float64)  # [ch, 4·ch], of the cosines first
    cosines, sines = kernel[:half], kernel[half:]
    rotated = [np.cos(angle) * cosines + np.sin(angle) * sines, np.cos(angle) * sines - np.sin(angle) * cosines]
    first = {**params["time_embed"]["0"], "kernel": np.concatenate(rotated).astype(np.float32)}
    embedding = {**params["time_embed"], "0": first}
    return dataclasses.replace(network, t_offset=0), {**params, "time_embed": embedding}


def unet_config(network: ImprovedUNet) -> dict:
    """The config.json of the `UNet2DModel` that equals this network."""
    shape = {field.name: getattr(network, field.name) for field in dataclasses.fields(UNet)}
    return {
        **diffusers_names.unet_config(UNet(**shape)),
        **_OTHERS,
        "attention_head_dim": None if network.num_heads == 1 else _attention_widths(network)[0] // network.num_heads,
        "attn_norm_num_groups": NORM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift_norm else "default",
    }


def read_unet_config(config: Mapping) -> UNet | ImprovedUNet:
    """The network of a `UNet2DModel`'s config.json, of either kind; ValueError naming the first field that fits
    neither.
    """
    if any(config.get(name, value) != value for name, value in _OTHERS.items()):
        return diffusers_names.read_unet_config(config)
    shift, groups = config.get("resnet_time_scale_shift", "default"), config.get("attn_norm_num_groups")
    if shift not in ("default", "scale_shift") or groups not in ((None, 32) if shift == "default" else (32,)):
        raise ValueError(f"its resnet_time_scale_shift is {shift!r} with attn_norm_num_groups {groups!r}")
    as_ddim = {**config, **{name: diffusers_names.needed(name) for name in (*_OTHERS, *_READ)}}
    unet = diffusers_names.read_unet_config(as_ddim)
    if unet.in_channels != unet.out_channels:
        raise ValueError(f"its out_channels are {unet.out_channels}, but its in_channels are {unet.in_channels}")
    network = ImprovedUNet(**vars(unet), num_heads=1, scale_shift_norm=shift == "scale_shift")
    width, widths = config.get("attention_head_dim", 8), _attention_widths(network)
    if width is None:
        return network
    if type(width) is not int or width < 1 or len(widths) > 1 or widths[0] % width:
        raise ValueError(
            f"its attention_head_dim is {width!r} for attention of {' and '.join(map(str, widths))} channels, but one "
            "number of heads is needed"
        )
    return dataclasses.replace(network, num_heads=widths[0] // width)


def to_diffusers(state: Mapping[str, np.ndarray], network: ImprovedUNet) -> dict[str, np.ndarray]:
    """A published state_dict of the network under the names and in the layouts of `UNet2DModel`."""
    theirs: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if ".qkv." in name:
            heads = value.reshape(network.num_heads, 3, -1, *value.shape[1:2])  # of each: query, key, value
            parts = [heads[:, i].reshape(-1, *value.shape[1:2]) for i in range(3)]
            theirs |= dict(zip(_qkv_names(name, network), map(np.ascontiguousarray, parts), strict=True))
        else:
            theirs[_their_name(name, network)] = value[:, :, 0] if value.ndim == 3 else value
    return theirs


def from_diffusers(state: Mapping[str, np.ndarray], network: ImprovedUNet) -> dict[str, np.ndarray]:
    """The published state_dict of a `UNet2DModel`'s tensors, the inverse of `to_diffusers`; ValueError as there."""
    rest, published = dict(state), {}
    for name, shape in torch_names.torch_shapes(network).items():
        is_qkv = ".qkv." in name
        names = _qkv_names(name, network) if is_qkv else [_their_name(name, network)]
        expected = ((shape[0] // 3, *shape[1:2]) if is_qkv else shape[:2]) if len(shape) == 3 or is_qkv else shape
        parts = []
        for theirs in names:
            if theirs not in rest:
                raise ValueError(f"it lacks the tensor {theirs} of shape {expected}")
            value = rest.pop(theirs)
            if value.shape != expected:
                raise ValueError(f"{theirs} has shape {value.shape}, but the network needs {expected}")
            parts.append(value.reshape(network.num_heads, -1, *expected[1:]) if is_qkv else value)
        published[name] = (np.stack(parts, axis=1) if is_qkv else parts[0]).reshape(shape)
    if rest:
        name = min(rest)
        raise ValueError(f"the network has no place for the tensor {name} of shape {rest[name].shape}")
    return published


def _qkv_names(name: str, network: ImprovedUNet) -> list[str]:
    place, leaf = name.split(".qkv.")
    return [f"{_their_layer(place, 'attentions', network)}.{part}.{leaf}" for part in ("to_q", "to_k", "to_v")]


def _their_name(name: str, network: ImprovedUNet) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _ALONE:
        return f"{_ALONE[module]}.{leaf}"
    place, _, part = module.partition(".")
    # The number of the block, where there are several, and that of the layer in it.
    count = 1 if place == "middle_block" else 2
    numbers, rest = part.split(".")[:count], ".".join(part.split(".")[count:])
    layer = ".".join([place, *numbers])
    if rest in _IN_BLOCK:
        return f"{_their_layer(layer, 'resnets', network)}.{_IN_BLOCK[rest]}.{leaf}"
    if rest in _IN_ATTENTION:
        return f"{_their_layer(layer, 'attentions', network)}.{_IN_ATTENTION[rest]}.{leaf}"
    kind = "downsamplers" if rest == "op" else "upsamplers"
    return f"{_their_layer(layer, kind, network)}.conv.{leaf}"


def _their_layer(place: str, kind: str, network: ImprovedUNet) -> str:
    """diffusers' name of a layer of this kind, as "down_blocks.0.attentions.1" of "input_blocks.2.1"."""
    module, block, *_ = place.split(".")
    if module == "middle_block":
        return f"mid_block.{kind}.{int(block) // 2 if kind == 'resnets' else 0}"
    # The first of input_blocks is a convolution; each level ends with its downsampling.
    way, first = ("down", 1) if module == "input_blocks" else ("up", 0)
    level, number = divmod(int(block) - first, network.num_res_blocks + 1)
    return f"{way}_blocks.{level}.{kind}.{0 if kind.endswith('samplers') else number}"
