"""What `--mode=sample` does: samples as a config says and leaves the pictures in the run's folder."""

import datetime
import json
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.files import atomic_path
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.common.images import image_grid, save_png
from s2dm_jax.common.version import __version__
from s2dm_jax.inference import visualize
from s2dm_jax.inference.model import Model, load
from s2dm_jax.inference.sampler import sample_batches, sampler_options
from s2dm_jax.samplers.specs import SAMPLERS, nfe_of
from s2dm_jax.workdir.load import check_compared_runs

_MOST_COLUMNS = 20


def sample(config: ConfigDict, workdir: str) -> Path:
    """Samples from the run in `workdir` and writes to `workdir`/samples, of an exported sampler beside it.

    A file's name tells sampler, network evaluations and seed, and ends in a hash of all that the pictures
    depend on: what is overwritten is the same pictures.

    Args:
      config: a checked config whose group `sample` says what to do.
      workdir: folder of the run, or the file of an exported sampler.

    Returns:
      The file, or for output "png" the folder.

    Raises:
      UserError: if a run is missing or damaged.
    """
    options = config.sample
    workdirs = [workdir, *check_compared_runs(config)]
    # The others' newest: their steps need not be those of this run.
    steps = [options.checkpoint_step or None, *[None] * (len(workdirs) - 1)]
    models = [
        load(folder, step).with_noise_statistics(folder, options.sampler, options.noise_stat_images, options.batch_size)
        for folder, step in zip(workdirs, steps, strict=True)
    ]
    settings = _settings(options, models)
    sampler, steps, evaluations = options.sampler, settings["steps"], settings["evaluations"]
    for folder, model in zip(workdirs, models, strict=True):
        print(f"run      {folder}, moving average at step {model.step:,}")
    print(
        f"sampler  {sampler}, {steps:,} steps, {evaluations:,} evaluations, seed {options.seed}, "
        f"{jax.devices()[0].device_kind}",
        flush=True,
    )

    began = time.monotonic()
    digest = sha256_of_json(settings, digits=8)
    kind = "".join(f"_{name}" for name in ("interpolate", "trajectory", "compare") if options[name])
    place = Path(workdir)
    place = place / "samples" if place.is_dir() else place.with_name(f"{place.stem}_samples")
    place.mkdir(exist_ok=True)
    path = place / f"{sampler}_nfe{evaluations}_seed{options.seed}{kind}_{digest}"
    if kind or options.output == "grid":
        path = path.with_name(f"{path.name}.png")
        images, columns = _rows(options, models)
        save_png(path, image_grid(images, columns))
    elif options.output == "npz":
        path = path.with_name(f"{path.name}.npz")
        shape = (options.num_images, *models[0].image_shape)
        _write_npz(path, _batches(options, models[0]), shape, _provenance(settings, workdir))
    else:
        path.mkdir(exist_ok=True)
        index = 0
        for batch in _batches(options, models[0]):
            for image in batch:
                save_png(path / f"{index:06d}.png", image)
                index += 1
    print(f"wrote    {path} in {time.monotonic() - began:.1f} s, compilation included")
    return path


def _settings(options: ConfigDict, models: list[Model]) -> dict:
    """All that the pictures depend on."""
    grids = [model.sampler(**sampler_options(options))[1] for model in models]
    said = {name: value for name, value in sampler_options(options).items() if value is not None}
    for name in ("steps", "nfe", "timesteps", "timestep_spacing"):
        del said[name]
    if not options.skip_scale:
        del said["skip_scale_tau"], said["skip_scale_preset"]
    runs = [
        {
            "step": model.step,
            "weights_sha256": sha256_of_arrays(jax.tree.leaves(model.ema_params)),
            "schedule": model.config.diffusion.to_dict(),
            "timesteps": grid.tolist(),
            "ms_eps_sha256": _hash_of_statistic(model, options.sampler),
        }
        for model, grid in zip(models, grids, strict=True)
    ]
    return {
        **said,
        "steps": len(grids[0]),
        "evaluations": nfe_of(options.sampler, len(grids[0])),
        "seed": options.seed,
        "num_images": options.num_images,
        "interpolate": options.interpolate,
        "trajectory": options.trajectory,
        "runs": runs,
    }


def _hash_of_statistic(model: Model, sampler: str) -> str | None:
    if SAMPLERS[sampler].requires != "ms_eps" or model.ms_eps is None:
        return None
    return sha256_of_arrays([model.ms_eps])


def _provenance(settings: dict, workdir: str) -> str:
    return json.dumps(
        {
            **settings,
            "workdir": str(Path(workdir).absolute()),
            "s2dm_jax": __version__,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "date": datetime.date.today().isoformat(),
        }
    )


def _batches(options: ConfigDict, model: Model) -> Iterator[np.ndarray]:
    sample_fn, timesteps = model.sampler(**sampler_options(options))
    return sample_batches(
        sample_fn,
        model.ema_params,
        timesteps,
        seed=options.seed,
        num_images=options.num_images,
        batch_size=options.batch_size,
    )


def _rows(options: ConfigDict, models: list[Model]) -> tuple[np.ndarray, int | None]:
    """Images [N, H, W, C] in the order of a grid, and its columns."""
    count, seed, said = options.num_images, options.seed, sampler_options(options)
    if options.interpolate:
        starts, ends = range(0, count, 2), range(1, count, 2)
        rows = visualize.interpolate(models[0], starts, ends, options.interpolate, seed=seed, **said)
    elif options.trajectory:
        rows = visualize.trajectory(models[0], range(count), seed=seed, **said)
        shown = np.linspace(0, rows.shape[1] - 1, min(rows.shape[1], _MOST_COLUMNS)).round().astype(int)
        rows = rows[:, shown]
    elif options.compare:
        rows = visualize.compare(models, count, seed=seed, batch_size=options.batch_size, **said)
    else:
        return np.concatenate(list(_batches(options, models[0]))), None
    return rows.reshape(-1, *rows.shape[2:]), rows.shape[1]


def _write_npz(path: Path, batches: Iterable[np.ndarray], shape: tuple[int, ...], provenance: str) -> None:
    """Writes `images`, uint8 of that shape, batch by batch, and `provenance`."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                file.write(batch.tobytes())
        with archive.open("provenance.npy", "w") as file:
            np.lib.format.write_array(file, np.array(provenance), allow_pickle=False)
