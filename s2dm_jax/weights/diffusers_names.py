"""The names and configs of diffusers' `UNet2DModel` and `DDIMScheduler`, to and from the DDIM code's.

Only the names differ, and attention's 1×1 convolutions are matrices in diffusers. Written against diffusers 0.42; the
names before 0.14, which Google's checkpoints have, are read too.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from s2dm_jax.diffusion.betas import BETAS, ScheduleSpec, same_betas, schedule_betas
from s2dm_jax.models.network import NORM_EPS, NORM_GROUPS
from s2dm_jax.models.unet import UNet
from s2dm_jax.weights import torch_names

VERSION = "0.42.0"

_SIZES = ("sample_size", "in_channels", "out_channels", "layers_per_block")
# Field by field: DDIM's network, and diffusers' default.
_NEEDED = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (NORM_EPS, 1e-5),
    "norm_num_groups": (NORM_GROUPS, 32),
    "num_class_embeds": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}

_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_IN_BLOCK = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
# Before diffusers 0.14.
_OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
# A scheduler's options of sampling, with the value that stands for what our DDIM does.
_SAMPLING_OPTIONS: dict[str, Any] = {
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "skip_prk_steps": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "variance_type": "fixed_small",
    # Of multistep solvers: diffusers' defaults.
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": ("midpoint", "bh2", "logrho"),
    "lambda_min_clipped": -np.inf,
    "euler_at_final": False,
    "predict_x0": True,
    "disable_corrector": [],
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "flow_shift": 1.0,
    "time_shift_type": "exponential",
}
# What `read_scheduler_config` and `read_unet_config` read, and what says nothing about either.
_NOTHING_SAID = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values", "num_train_timesteps")
_SCHEDULE_FIELDS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_NETWORK_FIELDS = ("block_out_channels", "down_block_types", "up_block_types", "dropout", *_SIZES)
# Schedulers of other forward processes than one of betas.
_OTHER_PROCESSES = re.compile(
    "FlowMatch|EDM|ScoreSde|KarrasVe|Consistency|VQDiffusion|Amused|CogVideoX|CosineDPM|UnCLIP|LCM|TCD"
)
# 1/(1 + e⁶): how far the sigmoid schedule's first beta is above beta_start, in units of beta_end − beta_start.
_LOGISTIC_INSET = 1 / (1 + np.exp(6))
# The schedules that both sides compute alike; others go as a list of betas.
_BETA_SCHEDULES = {"linear": "linear", "quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def unet_config(network: UNet) -> dict:
    """The config.json of the `UNet2DModel` that equals this network."""
    attention = [network.resolution >> i in network.attn_resolutions for i in range(len(network.ch_mult))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": network.resolution,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": [network.ch * mult for mult in network.ch_mult],
        "layers_per_block": network.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "dropout": network.dropout,
        **{name: needed for name, (needed, _) in _NEEDED.items()},
    }


def scheduler_config(spec: ScheduleSpec, prediction: str = "epsilon") -> dict:
    """The scheduler_config.json of the `DDIMScheduler` with the same steps as `ddim`, if their number divides T."""
    beta, schedule = schedule_betas(spec), spec.schedule
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": spec.T,
        "beta_schedule": _BETA_SCHEDULES.get(schedule, "linear"),
        "beta_start": float(beta[0]),
        "beta_end": float(beta[-1]),
        "trained_betas": None if schedule in _BETA_SCHEDULES else beta.tolist(),
        "prediction_type": _PREDICTION_TYPES[prediction],
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


def needed(name: str) -> Any:
    """What the field of a `UNet2DModel`'s config.json is for DDIM's network."""
    return _NEEDED[name][0]


def read_unet_config(config: Mapping) -> UNet:
    """The network of a `UNet2DModel`'s config.json; ValueError naming the first field that is not DDIM's."""
    if config.get("_class_name") != "UNet2DModel":
        raise ValueError(f"it is a {config.get('_class_name')}, but a UNet2DModel is needed")
    widths, down = config.get("block_out_channels", ()), config.get("down_block_types") or ()
    for name, (needed, default) in _NEEDED.items():
        value = config.get(name, default)
        # One head as wide as its input also goes by its width.
        one_head = name == "attention_head_dim" and all(value == width for width in widths)
        if value != needed and not one_head:
            raise ValueError(f"its {name} is {value!r}, but DDIM's network has {needed!r}")
    attention = {"DownBlock2D": False, "AttnDownBlock2D": True}
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    if not down or not set(down) <= set(attention) or list(config.get("up_block_types", ())) != mirrored:
        raise ValueError(
            f"its blocks are {down} and {config.get('up_block_types')}, but DDIM's network has DownBlock2D "
            "and AttnDownBlock2D, and the same backwards on the way up"
        )
    sizes: dict[str, Any] = {name: config.get(name) for name in _SIZES}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"its {name} is {value!r}, but a number is needed")
    resolution, in_channels, out_channels, num_res_blocks = sizes.values()
    if not widths or len(widths) != len(down) or any(type(w) is not int or w % widths[0] for w in widths):
        raise ValueError(f"its block_out_channels are {widths}, but each must be a multiple of the first")
    if resolution % (1 << (len(down) - 1)):
        raise ValueError(f"its sample_size {resolution} cannot be halved {len(down) - 1} times")
    return UNet(
        resolution=resolution,
        in_channels=in_channels,
        out_channels=out_channels,
        ch=widths[0],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=num_res_blocks,
        attn_resolutions=tuple(resolution >> i for i, name in enumerate(down) if attention[name]),
        dropout=float(config.get("dropout", 0.0)),
    )


def read_scheduler_config(config: Mapping) -> tuple[ScheduleSpec, str]:
    """Schedule and prediction type from a scheduler_config.json, under s2dm_jax's names; ValueError if unsupported."""
    kind = str(config.get("_class_name", ""))
    if _OTHER_PROCESSES.search(kind):
        raise ValueError(f"it is a {kind}, whose forward process is not supported; DDPMScheduler and DDIMScheduler are")
    if config.get("use_flow_sigmas"):
        raise ValueError("its use_flow_sigmas is True, which is flow matching; a diffusion network is needed")
    prediction_type = config.get("prediction_type", "epsilon")
    predictions = {theirs: ours for ours, theirs in _PREDICTION_TYPES.items()}
    if prediction_type not in predictions:
        raise ValueError(f"its prediction_type is {prediction_type!r}, but one of {', '.join(predictions)} is needed")
    T = config.get("num_train_timesteps", 1000)
    if type(T) is not int or T < 2:
        raise ValueError(f"its num_train_timesteps is {T!r}, but a number of at least 2 is needed")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "its rescale_betas_zero_snr is True: betas rescaled to a terminal signal-to-noise ratio of zero are not "
            "supported"
        )
    if config.get("snr_shift_scale", 1.0) not in (1.0, None):
        raise ValueError(
            f"its snr_shift_scale is {config['snr_shift_scale']!r}, which changes the betas and is not supported"
        )
    return _read_schedule(config, T), predictions[prediction_type]


def _read_schedule(config: Mapping, T: int) -> ScheduleSpec:
    """The schedule in a scheduler_config.json; its ends are None if they are the defaults for T."""
    betas, beta_schedule = config.get("trained_betas"), config.get("beta_schedule", "linear")
    first, last = ends = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
    if betas is not None:
        found = _schedule_of(np.asarray(betas, np.float64), T)
        described = "trained_betas"
    else:
        named = {theirs: ours for ours, theirs in _BETA_SCHEDULES.items()}.get(beta_schedule)
        # The cosine's betas do not depend on the two ends that its config still states.
        found = ScheduleSpec(named, T, *(() if named == "cosine" else ends)) if named else None
        described = f"{beta_schedule} from {first} to {last}"
    if not found:
        raise ValueError(f"its betas ({described}) do not match any of the schedules {', '.join(BETAS)}")
    schedule_betas(found)
    default = ScheduleSpec(found.schedule, T)
    try:
        return default if same_betas(found, default) else found
    except ValueError:
        # With so few timesteps the schedule has no default.
        return found


def _schedule_of(betas: np.ndarray, T: int) -> ScheduleSpec | None:
    """The schedule whose betas these are, None if there is none."""
    if betas.shape != (T,) or not ((betas > 0) & (betas < 1)).all():
        return None
    first, last = float(betas[0]), float(betas[-1])
    # The logistic curve begins and ends a four-hundredth of its height inside its range.
    inset = (last - first) / (1 / _LOGISTIC_INSET - 2)
    candidates = [
        ScheduleSpec("const", T, None, last),
        ScheduleSpec("linear", T, first, last),
        ScheduleSpec("cosine", T),
        ScheduleSpec("quadratic", T, first, last),
        ScheduleSpec("sigmoid", T, first - inset, last + inset),
    ]
    for spec in candidates:
        try:
            if np.allclose(betas, schedule_betas(spec), rtol=1e-5, atol=0):
                return spec
        except ValueError:
            continue
    return None


def unused_scheduler_options(config: Mapping) -> list[str]:
    """The options in a scheduler_config.json that s2dm_jax's samplers ignore, as "name=value"."""
    allowed = {name: ours if isinstance(ours, tuple) else (ours,) for name, ours in _SAMPLING_OPTIONS.items()}
    used = {*_NOTHING_SAID, *_SCHEDULE_FIELDS, "rescale_betas_zero_snr"}
    return [
        f"{name}={value!r}"
        for name, value in config.items()
        if name not in used and value is not None and value not in allowed.get(name, (False,))
    ]


def unused_network_options(config: Mapping) -> list[str]:
    """The fields of a `UNet2DModel`'s config.json that `read_unet_config` does not read, as "name=value"."""
    used = {*_NOTHING_SAID, *_NEEDED, *_NETWORK_FIELDS}
    return [f"{name}={value!r}" for name, value in config.items() if name not in used and value not in (None, False)]


def to_diffusers(state: Mapping[str, np.ndarray], network: UNet) -> dict[str, np.ndarray]:
    """A published state_dict of the network under the names and in the layouts of `UNet2DModel`."""
    if not network.resamp_with_conv:
        state = {**state, **_stand_ins(network)}
    return {
        _their_name(name, network): value[:, :, 0, 0] if _is_attention_matrix(name) else value
        for name, value in state.items()
    }


def from_diffusers(state: Mapping[str, np.ndarray], network: UNet) -> tuple[dict[str, np.ndarray], UNet]:
    """The published state_dict of a `UNet2DModel`'s tensors, and its network: the inverse of `to_diffusers`.

    The network, from `read_unet_config`, loses the convolutions in its resampling where `to_diffusers` put them. A
    ValueError names the first tensor that is missing, unknown, or of another shape.
    """
    state, published = dict(state), {}
    for name, shape in torch_names.torch_shapes(network).items():
        theirs = old = _their_name(name, network)
        for new_part, old_part in _OLD_NAMES.items():
            old = old.replace(new_part, old_part)
        expected = shape[:2] if _is_attention_matrix(name) else shape
        value = state.pop(theirs if theirs in state else old, None)
        if value is None:
            raise ValueError(f"it lacks the tensor {theirs} of shape {expected}")
        if value.shape not in (expected, shape):
            raise ValueError(f"{theirs} has shape {value.shape}, but the network needs {expected}")
        published[name] = value.reshape(shape)
    if state:
        name = min(state)
        raise ValueError(f"the network has no place for the tensor {name} of shape {state[name].shape}")
    stand_ins = _stand_ins(network)
    if stand_ins and all(np.array_equal(published[name], value) for name, value in stand_ins.items()):
        published = {name: value for name, value in published.items() if name not in stand_ins}
        network = dataclasses.replace(network, resamp_with_conv=False)
    return published, network


def _their_name(name: str, network: UNet) -> str:
    match name.split("."):
        case ["temb", "dense", number, leaf]:
            return f"time_embedding.linear_{int(number) + 1}.{leaf}"
        case ["norm_out", leaf]:
            return f"conv_norm_out.{leaf}"
        case ["mid", "attn_1", part, leaf]:
            return f"mid_block.attentions.0.{_IN_ATTENTION[part]}.{leaf}"
        case ["mid", block, part, leaf]:
            return f"mid_block.resnets.{int(block[-1]) - 1}.{_IN_BLOCK.get(part, part)}.{leaf}"
        case ["down" | "up" as way, level, kind, *rest]:
            # On the way up diffusers counts from the lowest resolution.
            index = int(level) if way == "down" else len(network.ch_mult) - 1 - int(level)
            path = f"{way}_blocks.{index}"
            if kind.endswith("sample"):
                return f"{path}.{kind}rs.0.{'.'.join(rest)}"
            block, part, leaf = rest
            if kind == "attn":
                return f"{path}.attentions.{block}.{_IN_ATTENTION[part]}.{leaf}"
            return f"{path}.resnets.{block}.{_IN_BLOCK.get(part, part)}.{leaf}"
    return name


def _is_attention_matrix(name: str) -> bool:
    return "attn" in name and name.endswith(".weight") and not name.endswith("norm.weight")


def _stand_ins(network: UNet) -> dict[str, np.ndarray]:
    """Convolutions for diffusers' blocks, which need them, that resample like none: up the identity, down the mean."""
    convolutions: dict[str, np.ndarray] = {}

    def add(path, width, taps, value):
        channel = np.arange(width)
        weight = np.zeros((width, width, 3, 3), np.float32)  # OIHW
        weight[channel, channel, taps, taps] = value
        convolutions.update({f"{path}.weight": weight, f"{path}.bias": np.zeros(width, np.float32)})

    for level, mult in enumerate(network.ch_mult):
        if level < len(network.ch_mult) - 1:
            add(f"down.{level}.downsample.conv", network.ch * mult, slice(0, 2), 0.25)
        if level > 0:
            add(f"up.{level}.upsample.conv", network.ch * mult, slice(1, 2), 1.0)
    return convolutions
