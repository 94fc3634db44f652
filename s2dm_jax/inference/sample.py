"""`--mode=sample`: samples as a config describes and writes the images to the run's folder."""

import datetime
import itertools
import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_path, check_writable
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.common.images import image_grid, save_png
from s2dm_jax.common.version import __version__
from s2dm_jax.config.build import schedule_fields
from s2dm_jax.devices.hardware import numerics
from s2dm_jax.inference import visualize
from s2dm_jax.inference.model import Model, load
from s2dm_jax.inference.sampler import sampler_options
from s2dm_jax.inference.saturation import Fault
from s2dm_jax.samplers.specs import SAMPLERS, nfe_of
from s2dm_jax.samplers.timesteps import TimestepSpec
from s2dm_jax.workdir.folder import output_folder
from s2dm_jax.workdir.load import check_compared_runs

_MAX_COLUMNS = 20


def sample(config: ConfigDict, workdir: str, out: str = "") -> Path:
    """Samples from the run in `workdir` and writes to `out`, by default `workdir`/samples (`folder.output_folder`).

    A file's name holds sampler, NFE and seed, and ends in a hash of all that the images depend on: a file is only
    overwritten by the same images. Returns the file, or for output "png" the folder.

    Raises:
      UserError: if a run is missing or damaged.
    """
    options, sampler = config.sample, config.sample.sampler
    workdirs = [workdir, *check_compared_runs(config)]
    # The newest of the others: their steps need not be those of this run.
    steps = [options.checkpoint_step or None, *[None] * (len(workdirs) - 1)]
    parent = output_folder(workdir, out, "samples")
    models: list[Model] = []
    for folder, step in zip(workdirs, steps, strict=True):
        model = load(folder, step, ema=options.ema)
        if not models:
            # Its images may have moved.
            model = model._replace(config=config)
        statistics = sampler, options.noise_stat_images, options.batch_size, parent
        models.append(model.with_noise_statistics(folder, *statistics))
    settings = _settings(options, models)
    nfe, device = settings["nfe"], jax.devices()[0].device_kind
    for folder, model in zip(workdirs, models, strict=True):
        print(f"run      {folder}, {model.weights} at step {model.step:,}")
        if model.ema_note:
            print(f"note: {model.ema_note}", file=sys.stderr)
    scaled = f", skip_scale {options.skip_scale}" if options.skip_scale else ""
    print(
        f"sampler  {sampler}, {settings['steps']:,} steps, NFE {nfe:,}{scaled}, seed {options.seed}, {device}",
        flush=True,
    )
    for note in dict.fromkeys(model.unvisited_note(**sampler_options(options)) for model in models):
        if note:
            print(f"note: {note}", file=sys.stderr)

    began = time.monotonic()
    digest = sha256_of_json(settings, digits=8)
    kind = "".join(f"_{name}" for name in ("interpolate", "trajectory", "compare") if options[name])
    run = Path(workdir)
    parent.mkdir(parents=True, exist_ok=True)
    output = "grid" if kind else options.output
    named = f"{kind}_{models[0].ema.replace('=', '')}" if models[0].ema else kind
    stem, suffix = f"{sampler}_nfe{nfe}_seed{options.seed}{named}_{digest}", {"grid": ".png", "npz": ".npz", "png": ""}
    path = parent / f"{stem}{suffix[output]}"
    # The same images may be there; a folder of them is emptied.
    emptied = [path] if output == "png" else []
    check_writable(emptied, "give --out=DIR to write elsewhere", replaced=[path])
    if output == "grid":
        save_png(path, image_grid(*_rows(options, models)))
    elif output == "npz":
        shape = (options.num_images, *models[0].image_shape)
        provenance = {
            **settings,
            "workdir": str(run.absolute()),
            "s2dm_jax": __version__,
            "jax": jax.__version__,
            "device": device,
            "date": datetime.date.today().isoformat(),
        }
        _write_npz(path, models[0].batches(options, True, _report), shape, json.dumps(provenance))
    else:
        with atomic_path(path, fsync=False) as temporary:
            temporary.mkdir()
            for index, image in enumerate(itertools.chain.from_iterable(models[0].batches(options, True, _report))):
                save_png(temporary / f"{index:06d}.png", image)
            if path.is_dir():
                # The same images: a folder is only replaced by a rename where it is empty.
                shutil.rmtree(path)
    print(f"wrote    {path} in {time.monotonic() - began:.1f} s, compilation included")
    return path


def _settings(options: ConfigDict, models: list[Model]) -> dict:
    """All that the images depend on."""
    timesteps = [model.sampler(**sampler_options(options))[1] for model in models]
    settings = {name: value for name, value in sampler_options(options).items() if value is not None}
    for name in TimestepSpec._fields:
        del settings[name]
    if not options.skip_scale:
        del settings["skip_scale_tau"], settings["skip_scale_preset"]
    reads_ms_eps = SAMPLERS[options.sampler].requires == "ms_eps"
    runs = [
        {
            "step": model.step,
            **({"ema": model.ema} if model.ema else {}),
            "weights_sha256": sha256_of_arrays(jax.tree.leaves(model.ema_params)),
            "schedule": schedule_fields(model.config),
            "timesteps": visited.tolist(),
            "ms_eps_sha256": None if model.ms_eps is None or not reads_ms_eps else sha256_of_arrays([model.ms_eps]),
        }
        for model, visited in zip(models, timesteps, strict=True)
    ]
    return {
        **settings,
        "steps": len(timesteps[0]),
        "nfe": nfe_of(options.sampler, len(timesteps[0])),
        **{name: options[name] for name in ("seed", "num_images", "interpolate", "trajectory")},
        "runs": runs,
        **numerics(),
    }


def _rows(options: ConfigDict, models: list[Model]) -> tuple[np.ndarray, int | None]:
    """Images [N, H, W, C] in the order of a grid, and its columns."""
    count, arguments = options.num_images, {"seed": options.seed, "report": _report, **sampler_options(options)}
    if options.interpolate:
        starts, ends = range(0, count, 2), range(1, count, 2)
        rows = visualize.interpolate(models[0], starts, ends, options.interpolate, **arguments)
    elif options.trajectory:
        rows = visualize.trajectory(models[0], range(count), **arguments)
        shown = np.linspace(0, rows.shape[1] - 1, min(rows.shape[1], _MAX_COLUMNS)).round().astype(int)
        rows = rows[:, shown]
    elif options.compare:
        rows = visualize.compare(models, count, batch_size=options.batch_size, **arguments)
    else:
        return np.concatenate(list(models[0].batches(options, True, _report))), None
    return rows.reshape(-1, *rows.shape[2:]), rows.shape[1]  # [rows, columns, H, W, C] → [rows·columns, H, W, C]


def _report(fault: Fault) -> None:
    """Reports what is wrong with the images; refuses to write them if none is finite."""
    if fault.hopeless:
        raise UserError(fault.text)
    print(f"warning: {fault.text}", file=sys.stderr, flush=True)


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
