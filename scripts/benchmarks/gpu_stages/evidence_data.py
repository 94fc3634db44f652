"""The data of the stage `evidence`: images, the classifier whose features are compared, floor and ceiling."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gpu_stages.evidence_plan import Size
from gpu_stages.evidence_train import METRICS, SEED, Measure, config_of
from gpu_stages.parts import Skip
from s2dm_jax.common.hashing import sha256_of_json
from s2dm_jax.common.images import to_uint8
from s2dm_jax.config.build import build_objective
from s2dm_jax.config.defaults import FIELDS
from s2dm_jax.config.io import flatten
from s2dm_jax.data.batches import run_keys
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.data.device_feed import Feed, make_feed
from s2dm_jax.devices.sharding import replicate, shard_batch
from s2dm_jax.evaluation import classifier
from s2dm_jax.evaluation.evaluate import compute_metrics
from s2dm_jax.evaluation.features import Features
from s2dm_jax.evaluation.reference import image_batches, load_reference
from s2dm_jax.inference.sampler import map_batches
from s2dm_jax.samplers.noise import initial_noise

# More than any run makes: nothing beyond is read ahead.
_MAX_STEPS = 10**9


def digest_of(size: Size, images: Path, data: Dataset) -> str:
    """A hash of what trained weights depend on: the fields that no run may change, the objectives, the images."""
    fields = flatten(config_of(size, "ddpm", images))
    fixed = {name: value for name, value in fields.items() if not FIELDS[name].resumable}
    objectives = [str(build_objective(config_of(size, name, images))) for name in size.objectives]
    return sha256_of_json([fixed, objectives, data.digest])


def train_classifier(size: Size, data: Dataset) -> dict[str, np.ndarray]:
    """The weights of a classifier of the training images.

    Raises:
      Skip: for images without classes.
    """
    if data.num_classes < 2:
        raise Skip("--images has no folders by class, and the features are those of a classifier")
    labels, steps = data.train_labels, size.classifier_steps
    params = classifier.train_classifier(data.train, labels, data.num_classes, seed=SEED, steps=steps)
    return {name: np.asarray(value) for name, value in params.items()}


def make_measure(config: ConfigDict, size: Size, data: Dataset, weights: dict[str, np.ndarray]) -> Measure:
    """The classifier's features, and their statistics over the held-out images."""
    params = replicate(weights)
    name = "classifier"
    metric = f"Fréchet distance in the {classifier.NUM_FEATURES} features of a classifier of these images; not FID"

    def apply(images: jax.Array) -> jax.Array:
        return classifier.features_and_logits(params, images)[0]

    features = Features(name, "Fréchet distance", metric, apply, classifier.NUM_FEATURES, 0, {"features": name})
    reference, _ = load_reference(config, data, features, METRICS, size.eval_batch)
    return Measure(features, reference)


class Anchors(NamedTuple):
    """What distances are held against.

    Attributes:
      accuracy: of the classifier on the held-out images.
      floor: distance of training images from the held-out ones, as many as are sampled.
      ceiling: distance of the noise that sampling starts from.
    """

    accuracy: float
    floor: float
    ceiling: float


def measure_anchors(measure: Measure, size: Size, data: Dataset, weights: dict[str, np.ndarray]) -> Anchors:
    """The distances of real images and of noise, as `evaluate` measures them."""
    rows = np.random.default_rng(SEED).permutation(len(data.train))[: size.num_images]
    apply, shape = measure.features.apply, data.train.shape[1:]

    def noise(indices: np.ndarray) -> jax.Array:
        return apply(to_uint8(initial_noise(SEED, shard_batch(indices), shape)))

    def distance(batches: Any) -> float:
        return compute_metrics(batches, measure.features, measure.reference, METRICS)["frechet_distance"]

    return Anchors(
        classifier.accuracy(replicate(weights), data.held_out, data.held_out_labels),
        distance(image_batches(data.train, measure.features, size.eval_batch, rows)),
        distance(map_batches(noise, size.num_images, size.eval_batch, progress=False)),
    )


def feed_of(config: ConfigDict, data: Dataset) -> Feed:
    """The batches of a training, as the training loop has them."""
    order_key, _ = run_keys(config.train.seed)
    fraction = config.data.max_device_memory_fraction
    return make_feed(data.train, order_key, config.train.batch_size, _MAX_STEPS, fraction)
