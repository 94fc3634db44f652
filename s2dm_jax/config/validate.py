"""The check of a config: every field's name, type and range, and the fields against each other.

jax is not imported: a mistake must be told before seconds of imports.
"""

import math
import os
import re
from typing import Any

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import network_of
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import FIELDS, OPTIONAL
from s2dm_jax.config.evaluation_plan import FEATURES, METRICS, REFERENCES, parse_metrics, plan_evaluation
from s2dm_jax.config.io import flatten
from s2dm_jax.config.presets import HEADS
from s2dm_jax.models.network import NETWORKS
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS
from s2dm_jax.samplers.timesteps import SPACINGS, plan_timesteps, split_timestep_spec

# field: (lowest, highest), both allowed; None: no bound.
_RANGES = {
    "data.resolution": (0, 1024),
    "data.max_invalid_fraction": (0.0, 1.0),
    "data.max_device_memory_fraction": (0.0, 1.0),
    "diffusion.T": (2, None),
    "model.ch": (32, None),
    "model.num_res_blocks": (1, None),
    "model.dropout": (0.0, 0.999),
    "loss.skip": (0, None),
    "loss.tau": (0.0, 1.0),
    "loss.K": (1, None),
    "loss.lam": (0.0, None),
    "loss.skip_factors": (0, None),
    "train.steps": (1, None),
    "train.batch_size": (1, None),
    "train.lr": (1e-12, None),
    "train.grad_clip": (0.0, None),
    "train.ema_decay": (0.0, 1.0),
    "train.seed": (0, 2**31 - 1),
    "train.log_every": (1, None),
    "train.sample_every": (1, None),
    "train.checkpoint_every": (1, None),
    "train.max_to_keep": (1, None),
    "train.keep_period": (0, None),
    "train.grad_accum_steps": (1, None),
    "train.profile_steps": (0, None),
    "sample.steps": (0, None),
    "sample.nfe": (0, None),
    "sample.eta": (0.0, 1.0),
    "sample.clip_pixel": (1e-6, None),
    "sample.noise_stat_images": (2, None),
    "sample.skip_scale": (0, None),
    "sample.skip_scale_tau": (0.0, 1.0),
    "sample.interpolate": (0, None),
    "sample.batch_size": (1, None),
    "sample.num_images": (1, None),
    "sample.seed": (0, 2**31 - 1),
    "sample.checkpoint_step": (0, None),
    "eval.checkpoint_step": (0, None),
    "eval.eta": (0.0, 1.0),
    "eval.clip_pixel": (1e-6, None),
    "eval.noise_stat_images": (2, None),
    "eval.num_images": (2, None),
    "eval.batch_size": (1, None),
    "eval.skip_scale": (0, None),
    "eval.seed": (0, 2**31 - 1),
}

_CHOICES = {
    "data.name": tuple(DATASETS),
    "data.channels": (0, 1, 3),
    "data.crop": ("auto", "none", "center", "ddim", "center_crop_140"),
    "data.resize": ("bilinear", "bicubic", "lanczos", "box"),
    "model.name": tuple(NETWORKS),
    "model.prediction": ("epsilon", "v", "x0"),
    "diffusion.schedule": ("linear", "cosine", "quadratic", "const", "sigmoid"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "loss.preset": ("paper", "released"),
    "loss.skip_noise": ("shared", "independent", "expected"),
    "loss.skip_boundary": ("truncate", "plain"),
    "loss.window": ("forward", "backward"),
    "loss.window_boundary": ("inner", "all"),
    "loss.sa_norm": ("K^2", "K"),
    "loss.reduction": ("sum", "mean"),
    "variance_head.kind": ("", *HEADS),
    "train.ema_start": ("initial", "first_step"),
    "train.on_nonfinite": ("stop", "skip"),
    "train.keep_best": ("", "loss", "simple", "skip", "sequence", "grad_norm"),
    "sample.sampler": tuple(SAMPLERS),
    "sample.timestep_spacing": SPACINGS,
    "sample.mean": ("ddpm", "ddim"),
    "sample.skip_scale_preset": ("paper", "released"),
    "sample.output": ("grid", "npz", "png"),
}


def check_config(config: ConfigDict) -> None:
    """Checks every field's name, type and range, and the fields against each other.

    Raises:
      UserError: one sentence that names the field, its value and what is allowed.
    """
    fields = flatten(config)
    for name in sorted(fields.keys() - FIELDS.keys()):
        raise UserError(f"config.{name} is not a field; the fields are those of s2dm_jax/config/defaults.py")
    for name in sorted(FIELDS.keys() - fields.keys()):
        raise UserError(
            f"config.{name} is missing; start the config from s2dm_jax.config.defaults.default_config()"
        )
    for name, value in fields.items():
        _check_type(name, value)
    for name, (low, high) in _RANGES.items():
        value = fields[name]
        if value is not None and not (low <= value and (high is None or value <= high)):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"config.{name}={value} is out of range: it must be {allowed}")
    for name, choices in _CHOICES.items():
        if fields[name] is not None and fields[name] not in choices:
            raise UserError(
                f"config.{name}={fields[name]!r} is not known; choose one of "
                + ", ".join(str(choice) or "nothing" for choice in choices)
            )
    _check_data(fields)
    _check_model(config)
    _check_training(fields)
    _check_timesteps(fields)
    _check_sampling(fields)
    _check_evaluation(fields)
    if fields["export.path"] and not fields["export.path"].endswith(".npz"):
        raise UserError(f"config.export.path={fields['export.path']!r} must end in .npz")


def allowed_type(expected: type) -> str:
    """What a field of that type may be, in words."""
    words = {int: "an integer", float: "a finite number", bool: "True or False", str: "a name"}
    return words.get(expected, "a tuple of positive integers such as 1,2,2")


def _check_type(name: str, value: Any) -> None:
    expected = FIELDS[name]
    if value is None and name in OPTIONAL:
        return
    if expected is tuple:
        right = isinstance(value, tuple) and all(type(v) is int for v in value)
        if name != "sample.timesteps":
            right = right and all(v > 0 for v in value)
            right = right and (len(value) > 0 or name == "model.attn_resolutions")
    elif expected is float:
        right = type(value) in (int, float) and math.isfinite(value)
    else:
        right = type(value) is expected
    if not right:
        raise UserError(f"config.{name}={value!r} has the wrong type: it must be {allowed_type(expected)}")


def _check_data(fields: dict) -> None:
    """The data sets that come as they are take no other size, channels or crop than fit them."""
    if fields["data.source"]:
        return
    name, crop = fields["data.name"], fields["data.crop"]
    size, channels = DATASETS[name]
    given = fields["data.resolution"] or size, fields["data.channels"] or channels
    if name == "digits" and given != (size, channels):
        raise UserError(
            f"config.data.resolution={fields['data.resolution']} and "
            f"config.data.channels={fields['data.channels']} do not go with the digits, which are {size} "
            "pixels of one channel; leave both 0"
        )
    if name == "celebahq" and fields["data.resolution"] > size:
        raise UserError(
            f"config.data.resolution={fields['data.resolution']} is more than the {size} pixels of celebahq; "
            "larger ones can be had as config.data.source"
        )
    if name != "celeba" and crop not in ("auto", "none"):
        raise UserError(
            f"config.data.crop={crop!r} is for celeba and for config.data.source, not for {name}: it must be "
            "auto"
        )


def _check_model(config: ConfigDict) -> None:
    try:
        network_of(config, "float32")
    except ValueError as error:
        raise UserError(f"config.model.{error}") from error


def _check_training(fields: dict) -> None:
    batch, parts = fields["train.batch_size"], fields["train.grad_accum_steps"]
    if batch % parts:
        raise UserError(
            f"config.train.grad_accum_steps={parts} does not divide config.train.batch_size={batch} evenly; "
            "the parts of a batch must be equal"
        )
    if fields["variance_head.kind"] and parts > 1:
        raise UserError(
            f"config.train.grad_accum_steps={parts} does not go with "
            f"config.variance_head.kind={fields['variance_head.kind']!r}, whose steps keep no activations; "
            "it must be 1"
        )
    best = fields["train.keep_best"]
    missing = (best == "skip" and not fields["loss.skip"]) or (best == "sequence" and fields["loss.K"] == 1)
    if missing:
        raise UserError(
            f"config.train.keep_best={best!r} names a term of the loss that is off; choose loss or simple"
        )


def _check_timesteps(fields: dict) -> None:
    T = fields["diffusion.T"]
    skips = ("loss.skip", T - 1), ("sample.skip_scale", T - 1), ("eval.skip_scale", T - 1)
    for name, most in (*skips, ("loss.skip_factors", T), ("loss.K", T)):
        if fields[name] is not None and fields[name] > most:
            raise UserError(
                f"config.{name}={fields[name]} must be at most {most}, with config.diffusion.T={T}"
            )


def _check_sampling(fields: dict) -> None:
    sample = {name.removeprefix("sample."): fields[name] for name in fields if name.startswith("sample.")}
    options = {name: sample[name] for name in ("eta", *OPTIONS) if sample[name] is not None}
    spec, _ = split_timestep_spec(sample)
    try:
        plan_timesteps(fields["diffusion.T"], sample["sampler"], spec, **options)
    except ValueError as error:
        raise UserError(f"config.sample.{error}") from error
    needs = SAMPLERS[sample["sampler"]].requires
    _check_head(fields, f"config.sample.sampler={sample['sampler']!r}", needs)
    if sample["timestep_spacing"] == "optimal" and needs != "ms_eps":
        raise UserError(
            "config.sample.timestep_spacing='optimal' is only for the sampler analytic, not "
            f"{sample['sampler']}, whose covariance it is optimal for; choose uniform, quadratic or linspace"
        )
    special = [name for name in ("interpolate", "trajectory", "compare") if sample[name]]
    if len(special) > 1:
        raise UserError(
            f"config.sample.{special[0]} and config.sample.{special[1]} do not go together; give one"
        )
    if special and sample["output"] != "grid":
        raise UserError(
            f"config.sample.output={sample['output']!r} does not go with config.sample.{special[0]}, "
            "which makes one picture: it must be grid"
        )
    if sample["interpolate"]:
        if sample["interpolate"] == 1 or sample["num_images"] % 2:
            raise UserError(
                f"config.sample.interpolate={sample['interpolate']} cannot be had with "
                f"config.sample.num_images={sample['num_images']}: it must be at least 2, and num_images even"
            )
        if sample["eta"] or SAMPLERS[sample["sampler"]].stochastic:
            raise UserError(
                f"config.sample.interpolate={sample['interpolate']} needs a method that draws no noise, and "
                "config.sample.eta=0"
            )


def _check_head(fields: dict, told: str, needs: str) -> None:
    if needs in ("sn", "npr") and fields["variance_head.kind"] != needs:
        raise UserError(
            f"{told} needs a second head, which this run has not; train one with --config=…:{needs} "
            "--config.variance_head.base_workdir=WORKDIR and sample from that run"
        )


def _check_evaluation(fields: dict) -> None:
    group = {name.removeprefix("eval."): fields[name] for name in fields if name.startswith("eval.")}
    try:
        points, _ = plan_evaluation(fields["diffusion.T"], group)
        metrics = parse_metrics(group["metrics"])
    except ValueError as error:
        raise UserError(f"config.eval.{error}") from error
    for point in points:
        _check_head(fields, f"config.eval.samplers={group['samplers']!r}", SAMPLERS[point.sampler].requires)
    features, reference, sha256 = group["feature_extractor"], group["reference"], group["inception_sha256"]
    if features not in FEATURES and not all(features.rpartition(":")):
        raise UserError(
            f"config.eval.feature_extractor={features!r} is not known; choose one of {', '.join(FEATURES)}, "
            "or FILE.py:function"
        )
    for name in metrics:
        metric = METRICS[name]
        if features not in FEATURES and "logits" in metric.requires:
            raise UserError(
                f"config.eval.metrics={group['metrics']!r} names {name}, which needs class probabilities: "
                f"config.eval.feature_extractor={features!r} must be inception or classifier for that"
            )
        if group["num_images"] < metric.min_images:
            raise UserError(
                f"config.eval.num_images={group['num_images']} is too few for {name}, which needs "
                f"{metric.min_images}"
            )
        if reference not in REFERENCES and "reference_features" in metric.requires:
            raise UserError(
                f"config.eval.metrics={group['metrics']!r} names {name}, which needs the reference's images: "
                f"config.eval.reference={reference!r} must be train or held_out for that"
            )
    if sha256 and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(
            f"config.eval.inception_sha256={sha256!r} is no SHA-256: it must be 64 hexadecimal digits"
        )


def check_evaluation_files(config: ConfigDict) -> None:
    """Checks that the files which the group `eval` names are there; only an evaluation needs them.

    Raises:
      UserError: one sentence that names the field and the file.
    """
    features, reference = config.eval.feature_extractor, config.eval.reference
    if features not in FEATURES and not os.path.isfile(features.rpartition(":")[0]):
        path = features.rpartition(":")[0]
        raise UserError(
            f"config.eval.feature_extractor={features!r} names the file {path}, which is not there"
        )
    if reference not in REFERENCES and not os.path.isfile(reference):
        raise UserError(
            f"config.eval.reference={reference!r} must be {', '.join(REFERENCES)}, or a file that is there"
        )
