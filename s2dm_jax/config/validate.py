"""The check of a config. Imports no jax: user errors are reported before seconds of imports."""

import math
import os
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import log_snr_of, network_of, schedule_spec
from s2dm_jax.config.datasets import DATASETS
from s2dm_jax.config.defaults import FIELDS, LOSS_SCALES, decay_steps, fixed_loss_scale, image_shape
from s2dm_jax.config.ema import EMA_RAMPUP_RATIO, check_choice, parse_choice
from s2dm_jax.config.evaluation_plan import FEATURES, REFERENCES, plan_evaluation
from s2dm_jax.config.fields import Field, allowed_choices, allowed_range, allowed_type
from s2dm_jax.config.io import flatten
from s2dm_jax.config.metrics import METRICS, parse_metrics
from s2dm_jax.diffusion.betas import log_alpha_bar_with_x0, schedule_betas
from s2dm_jax.models.network import Network, with_learned_variance
from s2dm_jax.samplers.specs import OPTIONS, SAMPLERS
from s2dm_jax.samplers.timesteps import plan_timesteps, split_timestep_spec

# alpha_bar at the last timestep: DDPM's schedule ends at 4e-5, that of Stable Diffusion at 0.0047.
_MAX_LAST_ALPHA_BAR = 0.01


def check_config(config: ConfigDict, *, trained: bool = False) -> None:
    """Checks every field's name, type and range, and the fields against each other.

    Args:
      trained: the config belongs to an already trained network, whose schedule need not end in noise.

    Raises:
      UserError: one sentence that names the field, its value and what is allowed.
    """
    check_names(config)
    fields = flatten(config)
    for name, field in FIELDS.items():
        _check_field(name, field, fields[name])
    _check_data(config)
    try:
        network = network_of(config, "float32")
    except ValueError as error:
        raise UserError(f"config.model.{error}") from error
    _check_learned_variance(config, network, trained)
    _check_training(config)
    _check_optimizer(config)
    _check_ema(config)
    _check_schedule(config, trained)
    _check_timesteps(fields)
    _check_sampling(config)
    _check_evaluation(config)
    if config.export.path and not config.export.path.endswith(".npz"):
        raise UserError(f"config.export.path={config.export.path!r} must end in .npz")


def check_names(config: ConfigDict) -> None:
    """Raises a `UserError` unless a config has every field and no other."""
    fields = flatten(config)
    names, groups = fields.keys(), {name.split(".")[0] for name in FIELDS}
    for name in sorted(names & groups):
        raise UserError(f"config.{name}={fields[name]!r} has the wrong type: it must be a group of fields")
    for name in sorted(names - FIELDS.keys()):
        raise UserError(f"config.{name} is not a field; the fields are those of s2dm_jax/config/defaults.py")
    for name in sorted(FIELDS.keys() - names):
        raise UserError(f"config.{name} is missing; start the config from s2dm_jax.config.defaults.default_config()")


def _check_field(name: str, field: Field, value: Any) -> None:
    """Checks a field's type, range and choices; None is allowed where it is the default."""
    if value is None and field.default is None:
        return
    if not _has_type(field, value):
        if isinstance(value, tuple) and any(isinstance(entry, str) for entry in value):
            # What absl could not read as numbers.
            value = ",".join(map(str, value))
        raise UserError(f"config.{name}={value!r} has the wrong type: it must be {allowed_type(field)}")
    if field.choices is not None and value not in field.choices:
        raise UserError(f"config.{name}={value!r} is not valid; choose {allowed_choices(field)}")
    if field.type is not tuple and not _in_range(field, value):
        raise UserError(f"config.{name}={value} is out of range: it must be {allowed_range(field)}")


def _has_type(field: Field, value: Any) -> bool:
    if field.type is tuple:
        entries = isinstance(value, tuple) and len(value) >= field.min_length
        return entries and all(_is_number(field.entries, entry) and _in_range(field, entry) for entry in value)
    if field.type is float:
        return _is_number(float, value)
    return type(value) is field.type


def _is_number(kind: type, value: Any) -> bool:
    return type(value) is int or (kind is float and type(value) is float and math.isfinite(value))


def _in_range(field: Field, value: float) -> bool:
    return (field.low is None or field.low <= value) and (field.high is None or value <= field.high)


def _check_data(config: ConfigDict) -> None:
    """The named datasets accept only the sizes, channels and crops that fit them."""
    data = config.data
    if data.source:
        return
    spec = DATASETS[data.name]
    if spec.bundled and image_shape(config) != spec.shape:
        raise UserError(
            f"config.data.resolution={data.resolution} and config.data.channels={data.channels} do not match "
            f"{data.name}, whose images have {spec.size}×{spec.size} pixels and {spec.channels} channel(s); leave both "
            "0"
        )
    if spec.max_size is not None and data.resolution > spec.max_size:
        raise UserError(
            f"config.data.resolution={data.resolution} is more than the {spec.max_size} pixels of {data.name}; give "
            "larger ones as config.data.source"
        )
    if spec.crop == "none" and data.crop not in ("auto", "none"):
        cropped = " and ".join(name for name, other in DATASETS.items() if other.crop != "none")
        raise UserError(
            f"config.data.crop={data.crop!r} is for {cropped} and for config.data.source, not for {data.name}: it must "
            "be auto"
        )


def _check_learned_variance(config: ConfigDict, network: Network, trained: bool) -> None:
    """Only a network that has a learned variance samples with it, and no loss here trains it."""
    if config.model.learned_variance and not trained:
        raise UserError(
            "config.model.learned_variance=True is for weights that were trained elsewhere: no loss here trains the "
            "variance; leave it None"
        )
    if config.model.num_classes and not trained:
        raise UserError(
            f"config.model.num_classes={config.model.num_classes} is for weights that were trained elsewhere: losses "
            "and samplers here pass no labels; leave it None"
        )
    for group in ("sample", "eval"):
        if config[group].variance == "learned":
            try:
                with_learned_variance(network)
            except ValueError as error:
                raise UserError(f"config.{group}.{error}") from error


def _check_training(config: ConfigDict) -> None:
    batch, parts, head = config.train.batch_size, config.train.grad_accum_steps, config.variance_head.kind
    if batch % parts:
        raise UserError(
            f"config.train.grad_accum_steps={parts} does not divide config.train.batch_size={batch} evenly; "
            "the parts of a batch must be equal"
        )
    if head and parts > 1:
        raise UserError(
            f"config.train.grad_accum_steps={parts} cannot be combined with config.variance_head.kind={head!r}, whose "
            "steps store no activations; it must be 1"
        )
    _check_loss_scale(config)


def _check_loss_scale(config: ConfigDict) -> None:
    train = config.train
    try:
        scale = fixed_loss_scale(config)
    except ValueError as error:
        raise UserError(
            f"config.train.loss_scale={train.loss_scale!r} is not valid; choose auto, dynamic, none or a number such "
            f"as 1024, from {LOSS_SCALES[0]} to {LOSS_SCALES[1]}"
        ) from error
    interval, default = train.loss_scale_growth_interval, FIELDS["train.loss_scale_growth_interval"].default
    if scale is not None and interval != default:
        raise UserError(
            f"config.train.loss_scale_growth_interval={interval} is for a dynamic loss scale, but "
            f"config.train.loss_scale={train.loss_scale!r} with config.model.dtype={config.model.dtype!r} is not "
            f"dynamic; choose dynamic, or leave it {default}"
        )


def _check_optimizer(config: ConfigDict) -> None:
    """Checks that the learning rate's schedule is possible and that weight decay shrinks weights."""
    train, decays = config.train, config.train.lr_schedule != "constant"
    for name in ("lr_end", "decay_steps"):
        if train[name] and not decays:
            raise UserError(
                f"config.train.{name}={train[name]} is for a learning rate decay, but "
                "config.train.lr_schedule='constant'; choose cosine or linear, or leave it 0"
            )
    if train.warmup_steps > train.steps:
        raise UserError(
            f"config.train.warmup_steps={train.warmup_steps} must be at most config.train.steps={train.steps}: the "
            "learning rate would never be reached"
        )
    if decays and decay_steps(config) <= train.warmup_steps:
        end = f"config.train.decay_steps={train.decay_steps}" + (
            "" if train.decay_steps else f", which stands for config.train.steps={train.steps},"
        )
        raise UserError(
            f"{end} must be more than config.train.warmup_steps={train.warmup_steps}, after which the decay starts"
        )
    if train.lr_end > train.lr:
        raise UserError(
            f"config.train.lr_end={train.lr_end} must be at most config.train.lr={train.lr}, from which it decays"
        )
    if train.lr * train.weight_decay >= 1:
        raise UserError(
            f"config.train.weight_decay={train.weight_decay} must be less than 1/config.train.lr={1 / train.lr:g}: a "
            "step would subtract more than the weights"
        )


def _check_ema(config: ConfigDict) -> None:
    """The EMAs differ from one another, and those that are sampled from and evaluated are among them."""
    train = config.train
    if not train.ema_halflife_images and train.ema_rampup_ratio not in (0, EMA_RAMPUP_RATIO):
        raise UserError(
            f"config.train.ema_rampup_ratio={train.ema_rampup_ratio} is for an EMA with a half-life, but "
            "config.train.ema_halflife_images=0; set it to a number of images"
        )
    if train.ema_snapshot_every and not train.ema_sigma_rel:
        raise UserError(
            f"config.train.ema_snapshot_every={train.ema_snapshot_every} is for power-function EMAs, but "
            "config.train.ema_sigma_rel=(); set two widths, such as 0.05,0.1"
        )
    for name in ("ema_decays", "ema_sigma_rel"):
        if len(set(train[name])) < len(train[name]):
            raise UserError(
                f"config.train.{name}={','.join(map(str, train[name]))} repeats a number; give each only once"
            )
    for group in ("sample", "eval"):
        try:
            check_choice(parse_choice(config[group].ema), train)
        except ValueError as error:
            raise UserError(f"config.{group}.{error}") from error


def _check_schedule(config: ConfigDict, trained: bool) -> None:
    """The betas are possible, and x_T, which sampling replaces by noise, is noise."""
    spec = schedule_spec(config)
    try:
        alpha_bar = np.exp(log_alpha_bar_with_x0(schedule_betas(spec))[-1])
    except ValueError as error:
        raise UserError(f"config.diffusion.{error}") from error
    if alpha_bar > _MAX_LAST_ALPHA_BAR and not trained:
        ends = {name: getattr(spec, name) for name in ("beta_start", "beta_end")}
        stated = " and ".join(f"config.diffusion.{name}={value}" for name, value in ends.items() if value is not None)
        raise UserError(
            f"{stated} with config.diffusion.T={spec.T} leave alpha_bar_T={alpha_bar:.2g} at the last timestep of the "
            f"{spec.schedule} schedule, which must end in noise, at {_MAX_LAST_ALPHA_BAR} or less; leave them None, "
            "which scales them by 1000/T, or raise beta_end"
        )


def _check_timesteps(fields: dict) -> None:
    T = fields["diffusion.T"]
    skips = ("loss.skip", T - 1), ("sample.skip_scale", T - 1), ("eval.skip_scale", T - 1)
    for name, most in (*skips, ("loss.skip_factors", T), ("loss.K", T)):
        if fields[name] is not None and fields[name] > most:
            raise UserError(f"config.{name}={fields[name]} must be at most {most}, with config.diffusion.T={T}")


def _check_sampling(config: ConfigDict) -> None:
    sample = config.sample
    options = {name: sample[name] for name in ("eta", *OPTIONS) if sample[name] is not None}
    spec, _ = split_timestep_spec(sample)
    try:
        plan_timesteps(config.diffusion.T, sample.sampler, spec, log_snr=log_snr_of(config), **options)
    except ValueError as error:
        raise UserError(f"config.sample.{error}") from error
    sampler = SAMPLERS[sample.sampler]
    _check_head(config, f"config.sample.sampler={sample.sampler!r}", sampler.requires)
    if sample.timestep_spacing == "optimal" and sampler.requires != "ms_eps":
        raise UserError(
            f"config.sample.timestep_spacing='optimal' is only for the sampler analytic, not {sample.sampler}, whose "
            "covariance it is optimal for; choose auto, or another spacing"
        )
    special = [name for name in ("interpolate", "trajectory", "compare") if sample[name]]
    if len(special) > 1:
        raise UserError(f"config.sample.{special[0]} and config.sample.{special[1]} are mutually exclusive; give one")
    if special and sample.output != "grid":
        raise UserError(
            f"config.sample.output={sample.output!r} cannot be combined with config.sample.{special[0]}, which makes "
            "one image: it must be grid"
        )
    if sample.interpolate == 1 or (sample.interpolate and sample.num_images % 2):
        raise UserError(
            f"config.sample.interpolate={sample.interpolate} cannot be combined with "
            f"config.sample.num_images={sample.num_images}: it must be at least 2, and num_images even"
        )
    if sample.interpolate and (sample.eta or sampler.stochastic):
        raise UserError(
            f"config.sample.interpolate={sample.interpolate} needs a deterministic sampler and config.sample.eta=0"
        )


def _check_head(config: ConfigDict, field: str, requires: str) -> None:
    if requires in ("sn", "npr") and config.variance_head.kind != requires:
        raise UserError(
            f"{field} needs a variance head, which this run does not have; train one with --config=…:{requires} "
            "--config.variance_head.base_workdir=WORKDIR and sample from that run"
        )


def _check_evaluation(config: ConfigDict) -> None:
    group = config.eval
    try:
        points, _ = plan_evaluation(config.diffusion.T, group.to_dict(), log_snr_of(config))
        metrics = parse_metrics(group.metrics)
    except ValueError as error:
        raise UserError(f"config.eval.{error}") from error
    for point in points:
        _check_head(config, f"config.eval.samplers={group.samplers!r}", SAMPLERS[point.sampler].requires)
    features, reference, sha256 = group.feature_extractor, group.reference, group.inception_sha256
    if features not in FEATURES and not all(features.rpartition(":")):
        raise UserError(
            f"config.eval.feature_extractor={features!r} is not valid; choose one of {', '.join(FEATURES)}, "
            "or FILE.py:function"
        )
    for name in metrics:
        metric = METRICS[name]
        if features not in FEATURES and "logits" in metric.requires:
            raise UserError(
                f"config.eval.metrics={group.metrics!r} names {name}, which needs class probabilities: "
                f"config.eval.feature_extractor={features!r} must be inception or classifier for that"
            )
        if group.num_images < metric.min_images:
            raise UserError(
                f"config.eval.num_images={group.num_images} is too few for {name}, which needs {metric.min_images}"
            )
        if reference not in REFERENCES and "reference_features" in metric.requires:
            raise UserError(
                f"config.eval.metrics={group.metrics!r} names {name}, which needs the reference's images: "
                f"config.eval.reference={reference!r} must be train or held_out for that"
            )
    if sha256 and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError(f"config.eval.inception_sha256={sha256!r} is not a SHA-256: it must be 64 hexadecimal digits")


def check_evaluation_files(config: ConfigDict) -> None:
    """Raises a `UserError` unless the files that the group `eval` names exist; only an evaluation needs them."""
    features, reference = config.eval.feature_extractor, config.eval.reference
    path = features.rpartition(":")[0]
    if features not in FEATURES and not os.path.isfile(path):
        raise UserError(f"config.eval.feature_extractor={features!r} names the file {path}, which does not exist")
    if reference not in REFERENCES and not os.path.isfile(reference):
        raise UserError(f"config.eval.reference={reference!r} must be {', '.join(REFERENCES)}, or an existing file")
