"""The features that images are compared in: Inception, a classifier of the labels, or a user's function."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import cache_dir
from s2dm_jax.common.hashing import digest_of_file, sha256_of_arrays
from s2dm_jax.config.defaults import dataset_name
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.devices.sharding import replicate
from s2dm_jax.evaluation import classifier, inception, inception_weights
from s2dm_jax.evaluation.statistics_file import resolve_resize

_CLASSIFIER_SEED = 0
# Images that a user's function is tried with.
_TRIED = 4
# Of a user's function: covariances in float64 of 2 GiB.
_MAX_FEATURES = 2**14
# One function for each pipeline, so that it is compiled once in a process.
_INCEPTIONS = {name: functools.partial(inception.features_and_logits, pipeline=name) for name in inception.PIPELINES}


class FeaturesUnavailable(UserError):
    """With feature_extractor="auto", neither Inception's weights nor labels are available."""


class Features(NamedTuple):
    """A feature function with its description.

    Attributes:
      name: "inception", "classifier", or the user's FILE.py:function.
      distance: the name of the Fréchet distance in these features.
      metric: its description in a sentence.
      apply: uint8 [B,H,W,C] → float32 [B, D + L], the features followed by the logits; compiled.
      dimensions: D.
      logits: L, 0 if there are none.
      provenance: what the function depends on, plain data.
    """

    name: str
    distance: str
    metric: str
    apply: Callable[[jax.Array], jax.Array]
    dimensions: int
    logits: int
    provenance: dict


def why_no_classifier(data: Dataset, dataset: str) -> str:
    """What the images lack for a classifier, such as "needs labels, …"; "" if it can be trained."""
    size, classes = data.train.shape[1:3], len(np.unique(data.train_labels))
    if data.num_classes < 2:
        return f"needs labels, which {dataset} does not have"
    if classes < 2:
        return f"needs training images of two classes, and those of {dataset} are of one"
    if not data.labelled:
        count = len(data.train)
        return f"needs two images of a class, and {dataset} has {count:,} images of {data.num_classes:,} classes"
    if min(size) < classifier.MIN_SIDE:
        side = classifier.MIN_SIDE
        return f"needs images of {side}×{side} pixels, and those of {dataset} have {size[0]}×{size[1]}"
    return ""


def resolve_features(config: ConfigDict, no_classifier: str) -> str:
    """What `config.eval.feature_extractor` stands for: "inception", "classifier" or FILE.py:function.

    "auto" is the classifier for the digits, whose 8×8 pixels are too few for Inception, and for other images Inception
    or, if its weights are unavailable and a classifier can be trained (`why_no_classifier`), the classifier.

    Raises:
      FeaturesUnavailable: if neither is available.
      UserError: for a classifier that cannot be trained, and for a weights file that cannot be used.
    """
    chosen, dataset, weights = config.eval.feature_extractor, dataset_name(config), config.eval.inception_weights
    if chosen == "classifier" and no_classifier:
        raise UserError(
            f"config.eval.feature_extractor='classifier' {no_classifier}: it must be inception or FILE.py:function"
        )
    if chosen != "auto":
        return chosen
    if dataset == "digits":
        return "classifier"
    try:
        inception_weights.inception_params(weights, config.eval.inception_sha256)
    except UserError as error:
        if _is_file(weights):
            raise
        if no_classifier:
            raise FeaturesUnavailable(f"a classifier {no_classifier}, and {error}") from error
        print(f"the distance is measured in a classifier's features and is not an FID: {error}", flush=True)
        return "classifier"
    return "inception"


def _is_file(weights: str) -> bool:
    return bool(weights) and "://" not in weights


def check_features(config: ConfigDict, data: Dataset) -> list[tuple[str, int]]:
    """Name and number of the features that its config names, checked before a long training.

    Returns:
      One pair; for "auto", whose choice depends on what is available when it is used, every pair that it may choose,
      perhaps none: it does not stop a training.

    Raises:
      UserError: as `build_features`, and for a user's function whose features of real images are not finite.
    """
    chosen, no_classifier = config.eval.feature_extractor, why_no_classifier(data, dataset_name(config))
    inceptions, classifiers = ("inception", inception.NUM_FEATURES), ("classifier", classifier.NUM_FEATURES)
    undecided = chosen == "auto" and dataset_name(config) != "digits"
    if undecided and not _is_file(config.eval.inception_weights):
        # Raises for a URL.
        cache_dir()
        return [inceptions] if no_classifier else [inceptions, classifiers]
    name = resolve_features(config, no_classifier)
    if name == "classifier":
        return [classifiers]
    if undecided:
        return [inceptions]
    features = build_features(config, data)
    if name != "inception" and not np.isfinite(features.apply(jnp.asarray(data.train[:_TRIED]))).all():
        raise UserError(f"config.eval.feature_extractor={name!r} returns features of real images that are not finite")
    return [(name, features.dimensions)]


def build_features(config: ConfigDict, data: Dataset) -> Features:
    """The feature function that `config.eval.feature_extractor` names, its weights read, fetched or trained on `data`.

    Raises:
      UserError: for unavailable weights, missing labels, or a user's function that fails.
    """
    name = resolve_features(config, why_no_classifier(data, dataset_name(config)))
    if name == "inception":
        return _inception(config.eval)
    if name == "classifier":
        return _classifier(dataset_name(config), data)
    return _user_function(name, data.train.shape[1:])


def _inception(options: ConfigDict) -> Features:
    params = inception_weights.inception_params(options.inception_weights, options.inception_sha256)
    sha256 = (options.inception_sha256 or inception_weights.SHA256).lower()
    standard = sha256 == inception_weights.SHA256
    distance = "FID" if standard else "Fréchet distance (own Inception)"
    weights = "weights of 2015-12-05" if standard else f"your own weights, sha256 {sha256[:16]}; not FID"
    resize = resolve_resize(options.inception_resize)
    return Features(
        "inception",
        distance,
        f"{distance} in the 2,048 features of Inception, inception_resize {resize}, {weights}",
        functools.partial(_joined, _INCEPTIONS[resize], replicate(params)),
        inception.NUM_FEATURES,
        inception.NUM_LOGITS,
        {
            "features": "inception",
            "weights_sha256": sha256,
            "resize": inception.PIPELINES[resize].provenance,
        },
    )


def _classifier(data_name: str, data: Dataset) -> Features:
    params = classifier.train_classifier(data.train, data.train_labels, data.num_classes, seed=_CLASSIFIER_SEED)
    digest = sha256_of_arrays((params[name] for name in sorted(params)), digits=64)
    params = replicate(params)
    accuracy = classifier.accuracy(params, data.held_out, data.held_out_labels)
    return Features(
        "classifier",
        "Fréchet distance",
        f"Fréchet distance in the {classifier.NUM_FEATURES} features of a classifier trained on this dataset; not FID",
        functools.partial(_joined, classifier.features_and_logits, params),
        classifier.NUM_FEATURES,
        data.num_classes,
        {
            "features": f"classifier of {data_name}",
            "weights_sha256": digest,
            "seed": _CLASSIFIER_SEED,
            "held_out_accuracy": accuracy,
        },
    )


@functools.partial(jax.jit, static_argnums=0)
def _joined(function, params, images):
    return jnp.concatenate(function(params, images), axis=1)


def _user_function(name: str, shape: tuple[int, ...]) -> Features:
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("user_features", path)
    field = f"config.eval.feature_extractor={name!r}"
    if spec is None or spec.loader is None:
        raise UserError(f"{field} must name a Python file, FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = getattr(module, attribute)
        result = jax.eval_shape(function, jax.ShapeDtypeStruct((2, *shape), np.uint8))
    # The user's code may raise anything.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{field} failed with {type(error).__name__}: {reason}") from error
    batched = hasattr(result, "shape") and len(result.shape) == 2 and result.shape[0] == 2 and result.shape[1] > 0
    if not batched or not jnp.issubdtype(result.dtype, jnp.floating):
        got = f"{result.dtype} {list(result.shape)}" if hasattr(result, "shape") else type(result).__name__
        raise UserError(f"{field} must return floats [B, D] for uint8 {['B', *shape]}, got {got} for B = 2")
    if result.shape[1] > _MAX_FEATURES:
        raise UserError(
            f"{field} gives {result.shape[1]:,} features, whose covariance does not fit into memory; at most "
            f"{_MAX_FEATURES:,} are allowed"
        )
    return Features(
        name,
        "Fréchet distance",
        f"Fréchet distance in the {result.shape[1]} features of {Path(path).name}:{attribute}; not FID",
        jax.jit(lambda images: function(images).astype(jnp.float32)),
        result.shape[1],
        0,
        {"features": name, "file_sha256": digest_of_file(Path(path))},
    )
