"""A sampler as one file that runs with jax alone: StableHLO programs through `jax.export`, with the weights.

The programs take any batch size, and run on CPU, CUDA and TPU. What is in the file: docs/weights.md.
"""

import json
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
from s2dm_jax.inference import noise_statistics
from s2dm_jax.inference.noise_statistics import statistics_folder
from s2dm_jax.inference.sampler import (
    SamplerConfig,
    resolve_sampler,
    run_sampler,
    sampler_inputs,
    sampler_options,
)
from s2dm_jax.models.network import Network
from s2dm_jax.samplers.specs import SAMPLERS, nfe_of
from s2dm_jax.samplers.timesteps import split_timestep_spec
from s2dm_jax.weights import model_card
from s2dm_jax.workdir.exported import FORMAT, WEIGHTS
from s2dm_jax.workdir.load import load_run

PLATFORMS = ("cpu", "cuda", "tpu")


def export_programs(
    network: Network,
    schedule: NoiseSchedule,
    sampler: str = "ddim",
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    **said: Any,
) -> dict[str, jax_export.Exported]:
    """A sampler and its network as programs that need neither s2dm_jax nor flax.

    Args:
      network: the network's shape; its dtype is that of the programs' activations.
      schedule: the forward process.
      sampler: one of `specs.SAMPLERS`.
      platforms: that the programs can run on.
      **said: as for `sampler.configure_sampler`; all of it is baked in.

    Returns:
      "sampler": (weights, seed int32 [], indices int32 [b]) → images; "sampler_from_noise": (weights,
      x_T float32 [b, H, W, C], seed int32 [], which is read where the sampler draws noise) → images;
      "network": (weights, x_t float32 [b, H, W, C], t float32 [b]) → ε. Images are float32 [b, H, W, C]
      around [−1, 1]; weights are a flat dict.

    Raises:
      ValueError: as `sampler.resolve_sampler`.
    """
    spec, said = split_timestep_spec(said)
    levels, scale, options = resolve_sampler(schedule, sampler, spec, **said)
    known = sampler_inputs(schedule, sampler, scale, said.get("ms_eps"), said.get("head"))
    baked_in: dict[str, Any] = {"eta": options.pop("eta", None) or None, "scale": scale, "known": known}
    program = SamplerConfig(network, schedule, sampler, tuple(sorted(options.items())))

    def nested(weights):
        return traverse_util.unflatten_dict(weights, sep=".")

    def sample(weights, seed, indices):
        return run_sampler(program, nested(weights), levels, seed, indices, **baked_in)

    def sample_from_noise(weights, x_T, seed):
        indices = jnp.arange(x_T.shape[0])
        return run_sampler(program, nested(weights), levels, seed, indices, **baked_in, x_T=x_T)

    def eps(weights, x_t, t):
        return network.eps_fn(nested(weights), schedule)(x_t, t)

    (batch,) = jax_export.symbolic_shape("b")
    shapes = traverse_util.flatten_dict(network.param_shapes(), sep=".")
    images = jax.ShapeDtypeStruct((batch, *network.image_shape), np.float32)
    number = jax.ShapeDtypeStruct((), np.int32)
    arguments = {
        "sampler": (sample, number, jax.ShapeDtypeStruct((batch,), np.int32)),
        "sampler_from_noise": (sample_from_noise, images, number),
        "network": (eps, images, jax.ShapeDtypeStruct((batch,), np.float32)),
    }
    return {
        name: jax_export.export(jax.jit(function), platforms=platforms)(shapes, *others)
        for name, (function, *others) in arguments.items()
    }


def export(config: ConfigDict, workdir: str, *, network: Network | None = None) -> Path:
    """What `--mode=export` does: the sampler of the group `sample`, with the EMA weights, as one file.

    Args:
      config: the run's, checked, with the groups `sample` and `export` as requested.
      workdir: folder of the run.
      network: what was trained, where that is not the network that the config names.

    Returns:
      The file; its model card lies beside it, as .md and .json.

    Raises:
      UserError: if the run is missing or damaged, or the file already exists.
    """
    run = load_run(workdir, network=network)
    schedule, options = build_schedule(config), config.sample
    # One file for all platforms: in float32, unless the run says otherwise.
    if config.model.dtype == "auto":
        config.model.dtype = "float32"
    network = network or build_network(config)
    said = sampler_options(options)
    statistic = noise_statistics.load_cached(schedule, run.ema_params, statistics_folder(workdir))
    needed: dict[str, Any] = {"ms_eps": statistic and statistic.ms_eps, "head": run.variance_head}
    try:
        spec, others = split_timestep_spec(said)
        levels, scale, _ = resolve_sampler(schedule, spec=spec, **others, **needed)
        sampler_inputs(schedule, options.sampler, scale, **needed)
    except ValueError as error:
        raise UserError(f"config.sample.{error}") from error
    evaluations = nfe_of(options.sampler, len(levels))
    try:
        card = model_card.card_of_run(run, workdir)
    except ValueError as error:
        raise UserError(f"{workdir} cannot be used: {error}") from error
    card["license"] = config.export.license or card["license"]
    card["config"] = json.loads(config.to_json())
    card["sampler"] = {
        "sampler": options.sampler,
        "steps": len(levels),
        "evaluations": evaluations,
        **{name: value for name, value in said.items() if name not in ("sampler", "steps", "nfe", "timestep_spacing")},
        "timesteps": levels.tolist(),
        "stochastic": bool(options.eta or SAMPLERS[options.sampler].stochastic),
    }
    # As the pictures' names: other settings or weights make another file.
    digest = sha256_of_json([card["sampler"], card["weights"]], digits=8)
    name = f"{options.sampler}_nfe{evaluations}_{digest}.npz"
    path = Path(config.export.path or Path(workdir) / "exports" / name)
    with atomic_outputs(path, *model_card.card_paths(path)) as (file, *card_files):
        print(
            f"exporting {options.sampler} in {evaluations:,} evaluations for {', '.join(PLATFORMS)} …",
            flush=True,
        )
        programs = export_programs(network, schedule, **said, **needed)
        # A head is in the programs; what others read of the file is the network.
        own = from_json(to_json(config))
        if run.variance_head is not None:
            for group in ("head", "sample", "eval"):
                own[group] = default_config()[group]
        flat = traverse_util.flatten_dict(run.ema_params, sep=".")
        flat = {name: np.asarray(value) for name, value in flat.items()}
        about = {
            "format": FORMAT,
            "config": to_json(own),
            "step": run.step,
            "image_shape": network.image_shape,
            "platforms": PLATFORMS,
            "jax": jax.__version__,
            "weights_sha256": sha256_of_arrays((flat[name] for name in sorted(flat)), digits=64),
            "card": card,
        }
        arrays: dict[str, Any] = {
            name: np.frombuffer(program.serialize(), np.uint8) for name, program in programs.items()
        }
        arrays |= {f"{WEIGHTS}{name}": value for name, value in flat.items()}
        with open(file, "wb") as out:
            np.savez(out, about=json.dumps(about), **arrays)
        model_card.write_card(card, *card_files)
    print(f"wrote {path} ({path.stat().st_size / 1e6:,.1f} MB), its model card beside it")
    return path
