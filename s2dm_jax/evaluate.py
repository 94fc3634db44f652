"""Samples from trained weights and measures how far they are from held-out images.

The distance is Fréchet's in the features of a small classifier that is trained on the data set's own labels
in seconds. It is not FID, whose features come from Inception: compare it only with itself, on one data set.
"""

import datetime

import jax
import numpy as np
from ml_collections import ConfigDict

import s2dm_jax
from s2dm_jax import classifier
from s2dm_jax.config import build_schedule
from s2dm_jax.data import Dataset
from s2dm_jax.grids import uniform_grid
from s2dm_jax.losses import skip_scale
from s2dm_jax.metrics import feature_statistics, frechet_distance
from s2dm_jax.report import markdown_table, to_uint8
from s2dm_jax.runs import hash_of
from s2dm_jax.sample import make_sampler, sample_batches
from s2dm_jax.samplers import initial_noise
from s2dm_jax.unet import UNetConfig

_CLASSIFIER_SEED = 0


def evaluate(config: ConfigDict, network: UNetConfig, params: dict, data: Dataset, step: int) -> dict:
    """Draws `config.eval.num_images` by DDIM at each number of evaluations and compares them with real ones.

    Two anchors are measured alike: "real", as many training images (the floor), and "noise", the x_T that
    sampling starts from (the ceiling). `above_floor` is 0 at the former and 1 at the latter.

    Args:
      config: the run's config.
      network: the network that `params` belong to.
      params: weights to sample from, as a rule the moving average.
      data: the data set.
      step: training steps that made `params`; recorded.

    Returns:
      {"step", "eval": the config's group, "rows": one dict per line of the table, "provenance": all that the
      numbers depend on}.
    """
    schedule = build_schedule(config)
    skip = config.eval.skip_scale
    sampler = make_sampler(network, schedule, scale=skip_scale(schedule, skip) if skip else None)
    judge = classifier.train_classifier(
        data.train, data.train_labels, data.num_classes, seed=_CLASSIFIER_SEED
    )
    reference = feature_statistics(classifier.features(judge, data.held_out))

    def distance(images):
        return frechet_distance(*feature_statistics(classifier.features(judge, images)), *reference)

    def sample(nfe):
        batches = sample_batches(
            sampler,
            params,
            uniform_grid(schedule.T, nfe),
            seed=config.eval.seed,
            num_images=count,
            batch_size=config.eval.batch_size,
        )
        return np.concatenate(list(batches))

    count = config.eval.num_images
    noise = initial_noise(config.eval.seed, np.arange(count), data.train.shape[1:])
    real = data.train[np.random.default_rng(config.eval.seed).permutation(len(data.train))[:count]]
    floor, ceiling = distance(real), distance(np.asarray(to_uint8(noise)))
    rows = [_row("real (floor)", None, floor, floor, ceiling, len(real))]
    for nfe in config.eval.nfe:
        rows.append(_row("ddim", nfe, distance(sample(nfe)), floor, ceiling, count))
    rows.append(_row("noise (ceiling)", None, ceiling, floor, ceiling, count))

    return {
        "step": step,
        "eval": config.eval.to_dict(),
        "rows": rows,
        "provenance": {
            "metric": "Fréchet distance in the 64 features of a classifier trained on this data set; not FID",
            "classifier": {
                "seed": _CLASSIFIER_SEED,
                "held_out_accuracy": classifier.accuracy(judge, data.held_out, data.held_out_labels),
            },
            "reference": f"{len(data.held_out)} held-out images, sha256 {hash_of([data.held_out])}",
            "data": data.provenance,
            "weights": f"moving average at step {step}, sha256 {hash_of(jax.tree.leaves(params))}",
            "sampler": "ddim, eta 0, uniform grid, last step to the clean image; one evaluation a step"
            + (f"; output scaled as training with skip {skip} would scale it" if skip else ""),
            "seed": config.eval.seed,
            "num_images": count,
            "s2dm_jax": s2dm_jax.__version__,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "date": datetime.date.today().isoformat(),
        },
    }


def results_table(results: dict) -> str:
    """The rows of `evaluate` as a Markdown table."""
    header = ["images", "evaluations", "Fréchet distance", "above the floor, noise = 100"]
    rows = [
        [
            row["images"],
            row["evaluations"] or "–",
            f"{row['distance']:.2f}",
            f"{100 * row['above_floor']:.1f}",
        ]
        for row in results["rows"]
    ]
    return markdown_table(header, rows)


def _row(name, nfe, distance, floor, ceiling, count):
    return {
        "images": name,
        "evaluations": nfe,
        "num_images": count,
        "distance": distance,
        "above_floor": (distance - floor) / (ceiling - floor),
    }
