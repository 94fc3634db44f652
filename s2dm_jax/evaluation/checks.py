"""Checks what an evaluation needs before the training that ends with it."""

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.evaluation_plan import REFERENCES
from s2dm_jax.config.metrics import METRICS, check_num_images, parse_metrics
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.evaluation.features import check_features
from s2dm_jax.evaluation.statistics_file import default_reference, read_statistics

# Vectors for a covariance.
_MIN_REFERENCE = 2


def check_evaluation(config: ConfigDict, data: Dataset) -> None:
    """Checks, before a training, what the evaluation at its end needs.

    Raises:
      UserError: for features or a reference that are unavailable, and for too few images for a metric.
    """
    found = check_features(config, data)
    names, reference = parse_metrics(config.eval.metrics), config.eval.reference
    counts = {"train": len(data.train), "held_out": len(data.held_out)}
    check_num_images(names, config.eval.num_images, min(dimensions for _, dimensions in found))
    if "bits_per_dim" in names and counts["held_out"] < METRICS["bits_per_dim"].min_images:
        raise UserError(
            f"config.eval.metrics={config.eval.metrics!r} names bits_per_dim, which needs "
            f"{METRICS['bits_per_dim'].min_images} held-out images; there are {counts['held_out']}: choose other "
            "metrics, or give more images"
        )
    if reference not in REFERENCES:
        read_statistics(reference, found, config.eval.inception_resize)
    if reference == "auto" and len(found) == 1:
        reference = default_reference(found[0][0])
    number = counts.get(reference)
    if number is None:
        return
    if number < _MIN_REFERENCE:
        raise UserError(
            f"config.eval.reference={config.eval.reference!r} is the split {reference}, which has {number} image; at "
            f"least {_MIN_REFERENCE} are needed: choose another reference, or give more images"
        )
    for name in names:
        metric = METRICS[name]
        if "reference_features" in metric.requires and number < metric.min_images:
            raise UserError(
                f"config.eval.metrics={config.eval.metrics!r} names {name}, which needs {metric.min_images} images of "
                f"the reference {reference}; there are {number}: choose other metrics, or another config.eval.reference"
            )
