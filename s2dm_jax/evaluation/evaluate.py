"""Samples from trained weights and measures how far they are from real images.

Images go from noise through the sampler to bytes and on to features on the device, and are kept nowhere. The
features (float32) come to the host batch by batch, where their mean and covariance are summed in float64; the
features themselves are kept, in memory, only for metrics that need them.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import write_atomic
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.common.images import to_uint8
from s2dm_jax.common.version import __version__
from s2dm_jax.config.defaults import SAMPLER_OPTIONS
from s2dm_jax.config.evaluation_plan import EvalPoint, parse_metrics, plan_evaluation
from s2dm_jax.data.datasets import Dataset, load_dataset
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.sharding import shard_batch
from s2dm_jax.evaluation import metrics
from s2dm_jax.evaluation.features import Features, build_features
from s2dm_jax.evaluation.reference import Reference, image_batches, load_reference, sha256_of_images
from s2dm_jax.inference.model import Model, load, with_noise_statistics
from s2dm_jax.inference.sampler import map_batches, sample_batches
from s2dm_jax.samplers.noise import initial_noise
from s2dm_jax.samplers.specs import SAMPLERS
from s2dm_jax.workdir.results import results_table, write_results

# As in ADM's evaluator: three sets of distances between 10,000 and 10,000 images.
_MOST_FOR_PRECISION = 10_000

_CPU_BATCH = 16


def device_batch_size(batch_size: int) -> int:
    """How many images to compute at once: on CPU a number that does not depend on `batch_size`.

    Rounding depends on the shapes of a computation, and a grey level of one pixel in 30,000 on the rounding.
    On a GPU that is the price of speed; on CPU larger batches are no faster.
    """
    if jax.default_backend() != "cpu":
        return batch_size
    return -(-_CPU_BATCH // jax.device_count()) * jax.device_count()


def compute_metrics(
    batches: Iterable[np.ndarray], features: Features, reference: Reference, names: list[str]
) -> dict:
    """The metrics of images whose features come in batches.

    Args:
      batches: float32 [B, D + L] each, as `features.apply` makes them.
      features: what they were made by.
      reference: what to compare with.
      names: of evaluation_plan.METRICS.

    Returns:
      "num_images", counted; "frechet_distance"; for each further metric its value, and "kid_se",
      "inception_score_std", "fid_infinity_se"; "notes", a list of sentences.
    """
    sums, kept = metrics.init_sums(features.dimensions), []
    keep = bool({"kid", "precision_recall", "fid_infinity", "inception_score"} & set(names))
    for batch in batches:
        sums = metrics.update_sums(sums, batch[:, : features.dimensions])
        if keep:
            kept.append(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        mean, cov = metrics.mean_and_cov(sums)
    row = {
        "num_images": sums.number,
        "frechet_distance": metrics.frechet_distance(mean, cov, reference.mean, reference.cov),
        "notes": [str(warning.message) for warning in caught],
    }
    whole = np.concatenate(kept or [np.zeros((0, features.dimensions), np.float32)])
    vectors = whole[:, : features.dimensions]
    # Metrics that need vectors refuse none.
    real = vectors[:0] if reference.features is None else reference.features
    if "kid" in names:
        row["kid"], row["kid_se"] = metrics.kid(real, vectors)
    if "inception_score" in names:
        row["inception_score"], row["inception_score_std"] = metrics.inception_score(
            whole[:, features.dimensions :]
        )
    if "precision_recall" in names:
        row["precision"], row["recall"] = metrics.precision_recall(
            real[:_MOST_FOR_PRECISION], vectors[:_MOST_FOR_PRECISION]
        )
    if "fid_infinity" in names:
        row["fid_infinity"], row["fid_infinity_se"] = metrics.fid_infinity(
            vectors, reference.mean, reference.cov
        )
    return row


def evaluate(model: Model, data: Dataset, workdir: str | os.PathLike) -> dict:
    """Draws `model.config.eval.num_images` by each sampler at each number of evaluations and compares them.

    Two anchors are measured alike: "real", as many real images that are not the reference's (the floor), and
    "noise", the x_T that sampling starts from (the ceiling). `above_floor` is 0 at the former and 1 at the
    latter. Each line's numbers are kept in `workdir`/evaluations/cells and not computed again.

    Args:
      model: what to sample from; its config, checked, says how in the group `eval`.
      data: the data set.
      workdir: folder of the run.

    Returns:
      {"step", "eval": the config's group, "rows": one dict per line of the table, "provenance": all that the
      numbers depend on}; plain data, the same on every run with the same versions on the same device.

    Raises:
      UserError: for features or a reference that cannot be had.
    """
    options, schedule = model.config.eval, model.schedule
    cells, gaps = plan_evaluation(schedule.T, options.to_dict())
    names, count = parse_metrics(options.metrics), options.num_images
    at_once = device_batch_size(options.batch_size)
    features = build_features(model.config, data)
    if "fid_infinity" in names and count < 4 * features.dimensions:
        raise UserError(
            f"config.eval.num_images={count} is too few for fid_infinity in {features.dimensions} features, "
            f"which needs {4 * features.dimensions}"
        )
    reference, others = load_reference(model.config, data, features, names, at_once)
    weights = sha256_of_arrays(jax.tree.leaves(model.params))
    for sampler in dict.fromkeys(cell.sampler for cell in cells):
        model = with_noise_statistics(model, workdir, sampler, options.noise_stat_images, options.batch_size)
    common = {
        "features": features.provenance,
        "reference": reference.provenance,
        "metrics": names,
        "seed": options.seed,
        "num_images": count,
        "s2dm_jax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    trained = {
        "weights": weights,
        "schedule": model.config.diffusion.to_dict(),
        **_skip_scale_options(options),
        "activations": model.network.dtype,
    }
    scaled = _skip_scale_name(options)

    def row(name, evaluations, depends_on, batches):
        measured = _cached(
            Path(workdir) / "evaluations" / "cells",
            name if evaluations is None else f"{name}_nfe{evaluations}",
            {**common, **depends_on},
            lambda: compute_metrics(batches(), features, reference, names),
        )
        label = name if evaluations is None else f"{name}, {evaluations} evaluations"
        if is_main_process():
            print(f"{label}: {features.distance} {measured['frechet_distance']:.2f}", flush=True)
        return {"name": name, "nfe": evaluations, **measured}

    def sampled(cell: EvalPoint) -> Iterator[np.ndarray]:
        sample_fn, timesteps = model.sampler(
            cell.sampler,
            nfe=cell.nfe,
            timestep_spacing=cell.timestep_spacing,
            **_skip_scale_options(options),
            **cell.options,
        )
        return sample_batches(
            sample_fn,
            model.params,
            timesteps,
            seed=options.seed,
            num_images=count,
            batch_size=at_once,
            postprocess=features.apply,
        )

    def real():
        rows = np.random.default_rng(options.seed).permutation(len(others))[:count]
        return image_batches(others, features, at_once, rows)

    def noise():
        def compute(indices):
            shape = data.train.shape[1:]
            return features.apply(to_uint8(initial_noise(options.seed, shard_batch(indices), shape)))

        return map_batches(compute, count, at_once)

    rows = [row("real (floor)", None, {"images": sha256_of_images(others)}, real)]
    for cell in cells:
        steps = len(cell.timesteps(schedule.T))
        depends_on = {
            **trained,
            "cell": {**cell._asdict(), "steps": steps},
            **_inputs_of(model, cell.sampler),
        }
        rows.append(
            {**row(cell.name + scaled, cell.nfe, depends_on, lambda cell=cell: sampled(cell)), "steps": steps}
        )
    rows.append(row("noise (ceiling)", None, {"images": "noise"}, noise))
    floor, ceiling = rows[0]["frechet_distance"], rows[-1]["frechet_distance"]
    for each in rows:
        each["normalized"] = (each["frechet_distance"] - floor) / (ceiling - floor)
    notes = gaps + sorted({note for each in rows for note in each.pop("notes")})
    skip, tau, preset = options.skip_scale, options.skip_scale_tau, options.skip_scale_preset
    return {
        "step": model.step,
        "eval": options.to_dict(),
        "rows": rows,
        "provenance": {
            "metric": features.metric,
            "distance": features.distance,
            "score": "Inception Score" if features.name == "inception" else "score of the classifier",
            **common,
            "data": data.provenance,
            "weights": f"moving average at step {model.step}, sha256 {weights}",
            "sampler": "last step to the clean image, no clipping but what a sampler's name says"
            + (
                f"; output scaled as training with skip {skip}, tau {tau:g}, preset {preset} would scale it"
                if skip
                else ""
            ),
            "activations": model.network.dtype,
            "notes": notes,
        },
    }


def evaluate_run(config: ConfigDict, workdir: str) -> dict:
    """What `--mode=evaluate` does: evaluates a run as the group `eval` says; leaves and prints the table.

    Args:
      config: the run's config, checked, with the group `eval` to use.
      workdir: folder of the run.

    Raises:
      UserError: as `evaluate`, and if the run cannot be read.
    """
    model = load(workdir, config.eval.checkpoint_step or None)._replace(config=config)
    print(f"run      {workdir}, moving average at step {model.step:,}", flush=True)
    results = evaluate(model, load_dataset(config), workdir)
    show_results(workdir, results)
    return results


def show_results(workdir: str | Path, results: dict) -> None:
    """Writes the results of a run to its folder and prints their table; of several processes one does."""
    if not is_main_process():
        return
    asked = {name: value for name, value in results["eval"].items() if name != "batch_size"}
    path = write_results(workdir, results, f"step{results['step']}_{sha256_of_json(asked)[:8]}")
    print(f"\n{results_table(results)}\n{results['provenance']['metric']}.")
    for note in results["provenance"]["notes"]:
        print(f"note: {note}")
    print(f"numbers: {path}")


def _skip_scale_options(options: ConfigDict) -> dict:
    """Skip, tau and preset of the scaling of the network's output; tau and preset act only with a skip."""
    names = ("skip_scale", "skip_scale_tau", "skip_scale_preset")
    return {name: options[name] for name in (names if options.skip_scale else names[:1])}


def _skip_scale_name(options: ConfigDict) -> str:
    """What of the scaling is not the default, as a row's name has it: ", skip_scale 10"."""
    changed = {
        name: value
        for name, value in _skip_scale_options(options).items()
        if value != SAMPLER_OPTIONS[name].default
    }
    return "".join(f", {name} {value}" for name, value in changed.items())


def _inputs_of(model: Model, sampler: str) -> dict:
    """What a sampler's images depend on besides the network's weights."""
    needs = SAMPLERS[sampler].requires
    known = model.head.params if model.head and needs != "ms_eps" else model.ms_eps
    return {needs: sha256_of_arrays(jax.tree.leaves(known))} if needs else {}


def _cached(folder: Path, name: str, depends_on: dict, compute: Callable[[], dict]) -> dict:
    """What `compute` gives, or gave before with the same `depends_on`."""
    label = "".join(c if c.isalnum() else "_" for c in name)
    path = folder / f"{label}_{sha256_of_json(depends_on)}.json"
    # Several processes need not see the same files, and each must take part in computing.
    if jax.process_count() == 1 and path.exists():
        return json.loads(path.read_text())["measured"]
    began = time.monotonic()
    measured = compute()
    kept = {"measured": measured, "seconds": time.monotonic() - began, "depends_on": depends_on}
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(kept, indent=1) + "\n")
    return measured
