"""A sampler as one file that runs with jax alone: StableHLO programs through `jax.export`, with the weights.

The programs take any batch size, and run on CPU, CUDA and TPU. What is in the file: docs/weights.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export
from ml_collections import ConfigDict

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.files import atomic_outputs
from s2dm_jax.common.hashing import sha256_of_arrays, sha256_of_json
from s2dm_jax.config.build import build_network, build_schedule
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.io import from_json, to_json
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.inference.noise_statistics import load_cached, statistics_folder
from s2dm_jax.inference.sampler import resolve_program, run_sampler, sampler_options
from s2dm_jax.models.network import Network
from s2dm_jax.samplers.specs import SAMPLERS, nfe_of
from s2dm_jax.samplers.timesteps import split_timestep_spec
from s2dm_jax.weights import model_card
from s2dm_jax.workdir.exported import FORMAT, WEIGHTS
from s2dm_jax.workdir.folder import output_folder
from s2dm_jax.workdir.load import Run, load_run

PLATFORMS = ("cpu", "cuda", "tpu")


def export_programs(
    network: Network,
    schedule: NoiseSchedule,
    sampler: str = "ddim",
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    **options: Any,
) -> dict[str, jax_export.Exported]:
    """A sampler and its network as programs that need neither s2dm_jax nor flax.

    Args:
      network: its dtype is that of the programs' activations.
      schedule: the forward process.
      sampler: one of `specs.SAMPLERS`.
      platforms: that the programs can run on.
      **options: as for `sampler.configure_sampler`; all of them are baked in.

    Returns:
      "sampler": (weights, seed int32 [], indices int32 [b]) → images; "sampler_from_noise": (weights, x_T float32
      [b, H, W, C], seed int32 [], of the noise that the sampler draws) → images; "network": (weights, x_t float32
      [b, H, W, C], t float32 [b]) → ε. Images are float32 [b, H, W, C] around [−1, 1]; weights are a flat dict.

    Raises:
      ValueError: as `sampler.resolve_sampler`.
    """
    program, timesteps, baked_in = resolve_program(network, schedule, sampler, **options)

    def nested(weights):
        return traverse_util.unflatten_dict(weights, sep=".")

    def sample(weights, seed, indices):
        return run_sampler(program, nested(weights), timesteps, seed, indices, **baked_in)

    def sample_from_noise(weights, x_T, seed):
        indices = jnp.arange(x_T.shape[0])
        return run_sampler(program, nested(weights), timesteps, seed, indices, **baked_in, x_T=x_T)

    def eps(weights, x_t, t):
        return network.eps_fn(nested(weights), schedule)(x_t, t)

    (batch,) = jax_export.symbolic_shape("b")
    weights = traverse_util.flatten_dict(network.param_shapes(), sep=".")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), np.float32)
    seed = jax.ShapeDtypeStruct((), np.int32)
    programs = {
        "sampler": (sample, seed, jax.ShapeDtypeStruct((batch,), np.int32)),
        "sampler_from_noise": (sample_from_noise, images, seed),
        "network": (eps, images, jax.ShapeDtypeStruct((batch,), np.float32)),
    }
    return {
        name: jax_export.export(jax.jit(function), platforms=platforms)(weights, *arguments)
        for name, (function, *arguments) in programs.items()
    }


def export(config: ConfigDict, workdir: str, out: str = "", *, network: Network | None = None) -> Path:
    """Writes a run's sampler with its EMA as one file, with its model card next to it, for `--mode=export`.

    Args:
      config: the run's, checked, with the groups `sample` and `export` as requested.
      out: the folder to write to, by default `workdir`/exports (`folder.output_folder`); config.export.path is the
        file.
      network: what was trained, if that is not the network that the config names.
    """
    run = load_run(workdir, network=network, ema=config.sample.ema)
    schedule = build_schedule(config)
    # One file for all platforms: in float32, unless the run says otherwise.
    if config.model.dtype == "auto":
        config.model.dtype = "float32"
    network = network or build_network(config)
    options = sampler_options(config.sample)
    folder = output_folder(workdir, out, "exports")
    # Where the run cannot be written to, sampling has left the statistic in the folder of --out.
    found = [load_cached(schedule, run.ema_params, statistics_folder(place)) for place in (workdir, folder)]
    statistic = found[0] or found[1]
    inputs: dict[str, Any] = {"ms_eps": statistic and statistic.ms_eps, "head": run.variance_head}
    try:
        _, timesteps, _ = resolve_program(network, schedule, **options, **inputs)
        _, others = split_timestep_spec(options)
    except ValueError as error:
        raise UserError(f"config.sample.{error}") from error
    try:
        card = model_card.card_of_run(run, workdir)
    except ValueError as error:
        raise UserError(f"{workdir} cannot be used: {error}") from error
    sampler, nfe = options["sampler"], nfe_of(options["sampler"], len(timesteps))
    card["license"] = config.export.license or card["license"]
    card["config"] = json.loads(config.to_json())
    card["sampler"] = {
        "sampler": sampler,
        "steps": len(timesteps),
        "nfe": nfe,
        **others,
        "timesteps": timesteps.tolist(),
        "stochastic": bool(config.sample.eta or SAMPLERS[sampler].stochastic),
    }
    # As in the names of images: other settings or weights make another file.
    digest = sha256_of_json([card["sampler"], card["weights"]], digits=8)
    path = Path(config.export.path or folder / f"{sampler}_nfe{nfe}_{digest}.npz")
    with atomic_outputs(path, *model_card.card_paths(path)) as (file, *card_files):
        if run.ema_note:
            print(f"note: {run.ema_note}", file=sys.stderr)
        print(f"exporting {sampler} at {nfe:,} NFE for {', '.join(PLATFORMS)} …", flush=True)
        programs = export_programs(network, schedule, **options, **inputs)
        _write(file, programs, run, config, card)
        model_card.write_card(card, *card_files)
    print(f"wrote {path} ({path.stat().st_size / 1e6:,.1f} MB), with its model card next to it")
    return path


def _write(file: Path, programs: dict[str, jax_export.Exported], run: Run, config: ConfigDict, card: dict) -> None:
    """Writes the programs with the weights and what `exported.read_header` reads."""
    # A variance head is in the programs; what others read of the file is the network.
    config = from_json(to_json(config))
    if run.variance_head is not None:
        for group in ("variance_head", "sample", "eval"):
            config[group] = default_config()[group]
        config.eval.nfe = tuple(nfe for nfe in config.eval.nfe if nfe <= config.diffusion.T) or (1,)
    weights = {name: np.asarray(value) for name, value in traverse_util.flatten_dict(run.ema_params, sep=".").items()}
    about = {
        "format": FORMAT,
        "config": to_json(config),
        "step": run.step,
        "image_shape": run.network.image_shape,
        "platforms": PLATFORMS,
        "jax": jax.__version__,
        "weights_sha256": sha256_of_arrays((weights[name] for name in sorted(weights)), digits=64),
        "card": card,
        "saturation": run.saturation,
    }
    arrays: dict[str, Any] = {name: np.frombuffer(program.serialize(), np.uint8) for name, program in programs.items()}
    arrays |= {f"{WEIGHTS}{name}": value for name, value in weights.items()}
    with open(file, "wb") as out:
        np.savez(out, about=json.dumps(about), **arrays)
