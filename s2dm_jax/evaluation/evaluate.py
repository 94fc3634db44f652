"""Samples from trained weights and measures how far the samples are from real images.

Noise becomes images, bytes and features on the device, and no image is stored. The features (float32) come to the host
batch by batch, where their mean and covariance are summed in float64; the features themselves are stored, in memory,
only for metrics that require them.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.files import check_writable, user_path
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.common.images import to_uint8
from s2dm_jax.common.version import __version__
from s2dm_jax.config.build import schedule_fields
from s2dm_jax.config.defaults import SAMPLER_OPTIONS
from s2dm_jax.config.evaluation_plan import plan_evaluation
from s2dm_jax.config.metrics import METRICS, check_num_images, parse_metrics
from s2dm_jax.data.datasets import Dataset, load_dataset
from s2dm_jax.devices.distributed import is_main_process
from s2dm_jax.devices.hardware import numerics
from s2dm_jax.devices.sharding import shard_batch
from s2dm_jax.evaluation import metrics
from s2dm_jax.evaluation.bits_per_dim import BoundInputs, measure_bounds, save_plot
from s2dm_jax.evaluation.checks import check_evaluation
from s2dm_jax.evaluation.features import Features, build_features
from s2dm_jax.evaluation.point_cache import cached
from s2dm_jax.evaluation.reference import Reference, image_batches, load_reference, sha256_of_images
from s2dm_jax.inference.batches import device_batch_size
from s2dm_jax.inference.model import Model, load
from s2dm_jax.inference.sampler import map_batches, sample_batches
from s2dm_jax.inference.saturation import Ends, ends_of
from s2dm_jax.samplers.noise import initial_noise
from s2dm_jax.samplers.specs import SAMPLERS
from s2dm_jax.workdir.folder import check_same_images, evaluation_folder
from s2dm_jax.workdir.results import bound_text, results_files, results_table, write_results

# Vectors for a covariance.
_MIN_IMAGES = 2


def compute_metrics(batches: Iterable[np.ndarray], features: Features, reference: Reference, names: list[str]) -> dict:
    """The metrics `names` of images whose features come in batches, float32 [B, D + L] each, from `features.apply`.

    The keys are "num_images", the `Metric.results` of each metric, all finite, and "notes", a list of sentences.
    """
    requested = [METRICS[name] for name in names]
    store = any({"features", "logits"} & set(metric.requires) for metric in requested)
    sums, stored, not_finite = metrics.init_sums(features.dimensions), [], 0
    for batch in batches:
        bad = int((~np.isfinite(batch)).any(axis=1).sum())
        not_finite += bad
        if bad:
            continue
        sums = metrics.update_sums(sums, batch[:, : features.dimensions])
        if store:
            stored.append(batch)
    row: dict = {"num_images": sums.number, "notes": []}
    if not_finite:
        return row | {"notes": [f"the features of {not_finite} images are not finite: no metrics"]}
    if sums.number < _MIN_IMAGES:
        return row | {"notes": [f"{sums.number} image(s) are too few: no metrics"]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        mean, cov = metrics.mean_and_cov(sums)
    empty = np.zeros((0, features.dimensions), np.float32)
    vectors = np.concatenate(stored or [empty])  # [N, D + L]
    inputs = {
        "mean": mean,
        "cov": cov,
        "features": vectors[:, : features.dimensions],
        "logits": vectors[:, features.dimensions :],
        "reference_mean": reference.mean,
        "reference_cov": reference.cov,
        # Metrics that require them refuse an empty set.
        "reference_features": empty if reference.features is None else reference.features,
    }
    row["notes"] = [str(warning.message) for warning in caught]
    for name, metric in zip(names, requested, strict=True):
        if reference.problem and any(name.startswith("reference") for name in metric.requires):
            row["notes"].append(f"no {name}: {reference.problem}")
            continue
        arguments = [
            inputs[name][: metric.max_images] if name.endswith(("features", "logits")) else inputs[name]
            for name in metric.requires
        ]
        try:
            values = getattr(metrics, metric.function)(*arguments)
        except ValueError as error:
            # What only the features can tell leaves a gap in the table.
            row["notes"].append(f"no {name}: {error}")
            continue
        if not np.isfinite(values).all():
            row["notes"].append(f"no {name}: it is not finite, because the features are too large or too small")
            continue
        row |= zip(metric.results, values if isinstance(values, tuple) else (values,), strict=True)
    return row


def _measured_samples(measure: Callable[[], dict], counts: list[np.ndarray], shape: tuple[int, int, int]) -> dict:
    """What `measure` gives, whose batches fill `counts`, with the `Ends` of the images; no metrics of NaN."""
    values = measure()
    ends = ends_of(counts, shape)
    if ends.not_finite:
        # As bytes they are as good as any others.
        values = {"num_images": ends.images, "notes": []}
    return {**values, "saturated": ends.saturated, "not_finite": ends.not_finite}


def evaluate(model: Model, data: Dataset, workdir: str | os.PathLike, out: str | os.PathLike = "") -> dict:
    """Samples `model.config.eval.num_images` images at every point of the plan and compares them.

    Two anchors are measured in the same way: as many real images outside the reference (the floor), and the noise x_T
    that sampling starts from (the ceiling). `normalized` is 0 at the former and 1 at the latter. The numbers of each
    row are cached in `workdir`/evaluations/points, or in those of `out`. The model's config must be checked.

    Returns:
      {"step", "eval": the config's group, "rows": a dict per row of the table, with "name", "nfe",
      "frechet_distance", "normalized" and the results of the other metrics, "provenance": everything that the numbers
      depend on}, and with the metric bits_per_dim that key, from `measure_bounds`; plain data, the same on every run
      with the same versions on the same device.

    Raises:
      UserError: for features or a reference that are unavailable.
    """
    workdir, out = (place and user_path(place, name) for place, name in ((workdir, "workdir"), (out, "out")))
    options = model.config.eval
    model = model._replace(saturation=data.saturation)
    points, skipped = plan_evaluation(model.schedule.T, options.to_dict(), model.schedule.log_snr)
    names, batch_size = parse_metrics(options.metrics), device_batch_size(options.batch_size)
    features = build_features(model.config, data)
    if options.feature_extractor != "auto":
        # Of "auto" only the features can tell, perhaps at the end of a training: a gap.
        check_num_images(names, options.num_images, features.dimensions)
    reference, floor_images = load_reference(model.config, data, features, names, batch_size)
    weights = sha256_of_arrays(jax.tree.leaves(model.ema_params))
    for sampler in dict.fromkeys(point.sampler for point in points):
        statistics = sampler, options.noise_stat_images, options.batch_size, out
        model = model.with_noise_statistics(workdir, *statistics)
    settings = {
        "seed": options.seed,
        "num_images": options.num_images,
        "s2dm_jax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        **numerics(),
    }
    of_samples = [name for name in names if METRICS[name].function]
    common = {
        "features": features.provenance,
        "reference": reference.provenance,
        "metrics": of_samples,
        **settings,
    }
    folders = [Path(place) / "evaluations" / "points" for place in (out, workdir) if str(place)]

    def row(name, nfe, depends_on, batches, counts=None):
        stem = name if nfe is None else f"{name}_nfe{nfe}"
        compute = functools.partial(compute_metrics, batches, features, reference, of_samples)
        if counts is not None:
            compute = functools.partial(_measured_samples, compute, counts, model.image_shape)
        values = cached(folders, stem, {**common, **depends_on}, compute)
        if is_main_process():
            label = name if nfe is None else f"{name}, NFE {nfe}"
            distance = f"{values['frechet_distance']:.2f}" if "frechet_distance" in values else "none"
            print(f"{label}: {features.distance} {distance}", flush=True)
        return {"name": name, "nfe": nfe, **values}

    rows = [row("real (floor)", None, *_real(options, floor_images, features, batch_size))]
    for point in points:
        counts: list[np.ndarray] = []
        depends_on, batches = _sampled(model, weights, point, features, batch_size, counts)
        values = row(_row_name(model, point), point.nfe, depends_on, batches, counts)
        values["notes"] = values["notes"] + _notes_of_point(model, point, values)
        rows.append({**values, "steps": depends_on["point"]["steps"]})
    bound: dict = {}
    if "bits_per_dim" in names:
        depends_on = {"weights": weights, "schedule": schedule_fields(model.config), **settings}
        depends_on["images"] = sha256_of_images(data.held_out)
        measured = model.network, model.schedule, model.ema_params, model.ms_eps, model.variance_head
        shared = BoundInputs(*measured, data.held_out, depends_on, _skip_scale_options(options), batch_size)
        bound = measure_bounds(points, rows[1:], shared, folders)
    rows.append(row("noise (ceiling)", None, *_noise(options, floor_images.shape[1:], features, batch_size)))
    floor, ceiling = (rows[end].get("frechet_distance") for end in (0, -1))
    for values in rows:
        # Constant features put noise as near as real images.
        if floor is not None and ceiling is not None and floor != ceiling and "frechet_distance" in values:
            values["normalized"] = (values["frechet_distance"] - floor) / (ceiling - floor)
    notes = [note for note in (model.ema_note,) if note] + skipped + _notes(rows)
    if floor is not None and floor == ceiling:
        notes.append(
            "in these features, noise is as far from the reference as real images: distances are not normalized"
        )
    provenance = {
        "metric": features.metric,
        "distance": features.distance,
        "score": "Inception Score" if features.name == "inception" else "score of the classifier",
        **common,
        "metrics": names,
        **({"bits_per_dim": bound.pop("provenance")} if bound else {}),
        "data": data.provenance,
        "weights": f"{model.weights} at step {model.step}, sha256 {weights}",
        "sampler": _sampler_note(options),
        "activations": model.network.dtype,
        "notes": notes,
    }
    results = {"step": model.step, "eval": {**options.to_dict(), "ema": model.ema}, "rows": rows}
    return {**results, **({"bits_per_dim": bound} if bound else {}), "provenance": provenance}


def _notes(rows: list[dict]) -> list[str]:
    """The notes of the rows, which they lose, sorted; one that not all have, with the names of its rows before it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row.pop("notes"):
            found.setdefault(note, []).append(row["name"] if row["nfe"] is None else f"{row['name']}, NFE {row['nfe']}")
    return sorted(note if len(names) == len(rows) else f"{'; '.join(names)}: {note}" for note, names in found.items())


# The rows of the table: what the images depend on besides `common`, and their features [B, D + L] in batches, which are
# computed as they are requested.


def _real(options, images, features, batch_size):
    order = np.random.default_rng(options.seed).permutation(len(images))
    batches = image_batches(images, features, batch_size, order[: options.num_images])
    return {"images": sha256_of_images(images)}, batches


def _sampled(model, weights, point, features, batch_size, counts):
    depends_on = {
        "weights": weights,
        "schedule": schedule_fields(model.config),
        **_skip_scale_options(model.config.eval),
        "activations": model.network.dtype,
        "point": {**point._asdict(), "steps": len(point.timesteps(model.schedule.T, model.schedule.log_snr))},
    }
    if note := point.note(model.schedule.T, model.schedule.log_snr):
        depends_on["not_visited"] = note
    if point.timestep_spacing == "optimal":
        depends_on["timesteps"] = _sampler_of(model, point)[1].tolist()
    requires = SAMPLERS[point.sampler].requires
    if requires:
        # SN- and NPR-DPM require a variance head, Analytic-DPM the noise statistics.
        inputs = model.variance_head.params if model.variance_head and requires != "ms_eps" else model.ms_eps
        depends_on[requires] = sha256_of_arrays(jax.tree.leaves(inputs))
    return depends_on, _sampled_batches(model, point, features, batch_size, counts)


def _notes_of_point(model, point, values):
    """Notes on timesteps that are not visited, and on images that are nonsense."""
    notes = [point.note(model.schedule.T, model.schedule.log_snr)]
    if "saturated" in values:  # Points of before 0.3 do not say.
        ends = Ends(*(values[name] for name in ("num_images", "saturated", "not_finite")))
        how = {"nfe": point.nfe, "timestep_spacing": point.timestep_spacing, **point.options}
        notes += [fault.text] if (fault := model.fault_of(ends, point.sampler, **how)) else []
    return list(filter(None, notes))


def _sampler_of(model, point):
    sampling = {"timestep_spacing": point.timestep_spacing, **_skip_scale_options(model.config.eval), **point.options}
    return model.sampler(point.sampler, nfe=point.nfe, **sampling)


def _sampled_batches(model, point, features, batch_size, counts):
    options, (sample_fn, timesteps) = model.config.eval, _sampler_of(model, point)
    yield from sample_batches(
        sample_fn,
        model.ema_params,
        timesteps,
        seed=options.seed,
        num_images=options.num_images,
        batch_size=batch_size,
        postprocess=features.apply,
        counts=counts,
    )


def _noise(options, shape, features, batch_size):
    def compute(indices):
        return features.apply(to_uint8(initial_noise(options.seed, shard_batch(indices), shape)))

    return {"images": "noise"}, map_batches(compute, options.num_images, batch_size)


def evaluate_run(config: ConfigDict, workdir: str, out: str = "") -> dict:
    """`--mode=evaluate`: evaluates a run by the group `eval` of its checked config, and prints and writes the table, to
    the folder `out` or else `workdir`.
    """
    model = load(workdir, config.eval.checkpoint_step or None, ema=config.eval.ema)._replace(config=config)
    print(f"run      {workdir}, {model.weights} at step {model.step:,}", flush=True)
    data = load_dataset(config)
    check_same_images(workdir, data.digest, data.labels_digest, record=False)
    check_evaluation(config, data)
    folder = evaluation_folder(workdir, out)
    name = _results_name(model.step, config.eval.to_dict())
    files = results_files(folder, name)
    plot = files[1].with_suffix(".png")
    check_writable([], "give --out=DIR to write elsewhere", replaced=[*files, plot])
    results = evaluate(model, data, workdir, folder)
    show_results(folder, results)
    return results


def show_results(workdir: str | Path, results: dict) -> None:
    """Writes the results of a run to its folder and prints their table, on the main process alone."""
    if not is_main_process():
        return
    path = write_results(workdir, results, _results_name(results["step"], results["eval"]))
    print(f"\n{results_table(results)}\n{results['provenance']['metric']}.{bound_text(results)}")
    for note in results["provenance"]["notes"]:
        print(f"note: {note}")
    print(f"numbers: {path}")
    if "bits_per_dim" in results:
        save_plot(path.with_suffix(".png"), results)


def _results_name(step: int, options: dict) -> str:
    # Fields of later versions, at their defaults, do not rename earlier results.
    added = ("ema", ""), ("inception_resize", "auto")
    options = {name: value for name, value in options.items() if name != "batch_size" and (name, value) not in added}
    return f"step{step}_{sha256_of_json(options, digits=8)}"


def _skip_scale_options(options: ConfigDict) -> dict:
    """Skip, tau and preset of the scaling of the network's output; tau and preset act only with a skip."""
    names = ("skip_scale", "skip_scale_tau", "skip_scale_preset")
    return {name: options[name] for name in (names if options.skip_scale else names[:1])}


def _row_name(model, point):
    """The row's name with non-default options, such as "ddim, uniform, skip_scale 10, EMA 0.999"."""
    values = _skip_scale_options(model.config.eval).items()
    changed = [f"{name} {value}" for name, value in values if value != SAMPLER_OPTIONS[name].default]
    return ", ".join([point.name, *changed, *([model.weights] if model.ema else [])])


def _sampler_note(options: ConfigDict) -> str:
    skip, tau, preset = options.skip_scale, options.skip_scale_tau, options.skip_scale_preset
    scaled = f"; output scaled as training with skip {skip}, tau {tau:g}, preset {preset} would scale it"
    return "last step to the clean image, no clipping except where a sampler's name says so" + (scaled if skip else "")
