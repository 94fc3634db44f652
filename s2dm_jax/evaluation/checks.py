"""What an evaluation needs, checked before a training at whose end it is."""

from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.evaluation_plan import REFERENCES
from s2dm_jax.config.metrics import METRICS, check_num_images, parse_metrics
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.evaluation.features import check_features
from s2dm_jax.evaluation.statistics_file import default_reference, read_statistics


def check_evaluation(config: ConfigDict, data: Dataset) -> None:
    """Checks what the evaluation at the end of a training needs, before it.

    Raises:
      UserError: for features or a reference that are unavailable, and for too few images for a metric.
    """
    found = check_features(config, data)
    names, reference = parse_metrics(config.eval.metrics), config.eval.reference
    counts = {"train": len(data.train), "held_out": len(data.held_out)}
    if found is not None:
        check_num_images(names, config.eval.num_images, found[1])
        if reference not in REFERENCES:
            read_statistics(reference, *found)
        if reference == "auto":
            reference = default_reference(found[0])
    for name in names:
        metric = METRICS[name]
        if "reference_features" in metric.requires and counts.get(reference, metric.min_images) < metric.min_images:
            raise UserError(
                f"config.eval.metrics={config.eval.metrics!r} names {name}, which needs {metric.min_images} images of "
                f"the reference {reference}; there are {counts[reference]}: choose others, or config.eval.reference"
            )
