"""Sampling from trained weights: compiled samplers from the user's options, any number of images in batches.

Image i of a seed depends on (seed, i) alone, not on the batch or the order that it is sampled in.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.common.images import is_saturated, to_uint8
from s2dm_jax.config.defaults import SAMPLER_OPTIONS
from s2dm_jax.devices.hardware import jit_network
from s2dm_jax.devices.sharding import shard_batch
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.diffusion.types import SamplerOutput
from s2dm_jax.inference.batches import map_batches
from s2dm_jax.models import variance_head
from s2dm_jax.models.network import Network, with_learned_variance
from s2dm_jax.models.variance_head import Head
from s2dm_jax.samplers.analytic import cov_x0, optimal_timesteps
from s2dm_jax.samplers.common import scale_eps
from s2dm_jax.samplers.guards import num_visitable
from s2dm_jax.samplers.noise import image_keys, initial_noise, per_image_noise
from s2dm_jax.samplers.specs import SAMPLERS, get_sampler, sampler_name
from s2dm_jax.samplers.timesteps import TimestepSpec, plan_timesteps, split_timestep_spec


class SamplerConfig(NamedTuple):
    """What a compiled sampler is specialised to; options are sorted pairs of name and value."""

    network: Network
    schedule: NoiseSchedule
    sampler: str
    options: tuple


@dataclasses.dataclass(frozen=True)
class CompiledSampler:
    """A function (params, timesteps [S], seed, indices [B]) → uint8 images; `configure_sampler` describes it."""

    program: SamplerConfig
    arguments: dict

    def __call__(self, *inputs: Any, **options: Any) -> jax.Array:
        """The images of `with_counts`."""
        return self.with_counts(*inputs, **options)[0]

    def with_counts(
        self,
        params: dict,
        timesteps: np.ndarray,
        seed: int,
        indices: np.ndarray | jax.Array,
        *,
        x_T: jax.Array | None = None,
        trajectory: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """The images, and int32 [B, 2]: how many values of each are 0 or 255, and how many are not finite."""
        return _run_compiled(self.program, trajectory, params, timesteps, seed, indices, x_T, self.arguments)


def configure_sampler(
    network: Network, schedule: NoiseSchedule, sampler: str = "ddim", **options: Any
) -> tuple[CompiledSampler, np.ndarray]:
    """A compiled sampler and the timesteps that it visits, from the user's sampling options.

    The sampler is a function of (params, timesteps [S], seed, indices [B]) → uint8 images [B, H, W, C]. There is one
    program per sampler, S and B; other weights, timesteps, seeds, eta above 0 or scales compile nothing. Two keyword
    arguments make another program: `x_T` [B, H, W, C] to start from instead of the indices' own noise, and
    `trajectory=True` for uint8 [B, S, H, W, C], the prediction of x_0 at each timestep, the noisiest first, with the
    image itself in place of the last.

    Args:
      network: the network that the weights belong to.
      schedule: the forward process; sampling again with the same object compiles nothing.
      sampler: one of `specs.SAMPLERS`.
      **options: the fields of `TimestepSpec` (steps, nfe, timestep_spacing, timesteps,
        min_log_snr) and those of `resolve_sampler`.

    Returns:
      The function, and the timesteps int32 [S], ascending.

    Raises:
      ValueError: for an unknown sampler, for values that are not allowed or contradict one another, and if what the
        sampler requires is missing.
    """
    program, timesteps, arguments = resolve_program(network, schedule, sampler, **options)

    return CompiledSampler(program, arguments), timesteps


def resolve_program(
    network: Network, schedule: NoiseSchedule, sampler: str, **options: Any
) -> tuple[SamplerConfig, np.ndarray, dict]:
    """What `run_sampler` compiles, its timesteps and its arguments eta, scale, inputs, from `configure_sampler`'s."""
    sampler = sampler_name(sampler)
    spec, options = split_timestep_spec(options)
    timesteps, scale, own = resolve_sampler(schedule, sampler, spec, **options)
    inputs = sampler_inputs(schedule, sampler, scale, options.get("ms_eps"), options.get("head"))
    if own.get("variance") == "learned":
        with_learned_variance(network)
        if scale is not None:
            raise ValueError(
                "skip_scale cannot be combined with variance='learned', which belongs to the unscaled network"
            )
    # Without noise nothing is drawn: eta 0 is a program of its own.
    eta = own.pop("eta", None) or None
    program = SamplerConfig(network, schedule, sampler, tuple(sorted(own.items())))
    return program, timesteps, {"eta": eta, "scale": scale, "inputs": inputs}


def sampler_options(sample: ConfigDict) -> dict:
    """The keyword arguments of `configure_sampler` that a config's group `sample` stands for."""
    return {name: sample[name] for name in ("sampler", "steps", "nfe", "timesteps", *SAMPLER_OPTIONS)}


def resolve_sampler(
    schedule: NoiseSchedule,
    sampler: str,
    spec: TimestepSpec,
    *,
    skip_scale: int | np.ndarray | None = None,
    skip_scale_tau: float = 0.99,
    skip_scale_preset: str = "paper",
    ms_eps: np.ndarray | None = None,
    head: Head | None = None,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray | None, dict]:
    """Turns the user's sampling options into timesteps, scale factors and the sampler's own arguments.

    Args:
      spec: the request for timesteps; the spacing "optimal" is `optimal_timesteps`.
      skip_scale: the factor on the network's output that L_skip would train into it (`objectives.skip_scale`): a skip,
        or your own float [T]; None or 0 for no factor.
      skip_scale_tau, skip_scale_preset: tau and preset of that skip.
      ms_eps: float [T], the network's statistic (`noise_statistics.estimate_noise_statistics`), which "analytic" and
        "optimal" need.
      head: the network's variance head, which "sn" and "npr" need.
      **options: the sampler's own, those of `specs.OPTIONS` that it has, and eta, from 0 (deterministic) to 1 (DDPM's
        posterior variance); None stands for the sampler's default.

    Returns:
      The timesteps int32 [S], ascending; the factors float [T], or None; the options that are not None.

    Raises:
      ValueError: for an unknown sampler, and for values that are not allowed or contradict one another.
    """
    options = {name: value for name, value in options.items() if value is not None}
    timesteps = plan_timesteps(schedule.T, sampler, spec, log_snr=schedule.log_snr, **options)
    if spec.timestep_spacing == "optimal" and not len(spec.timesteps):
        if ms_eps is None:
            raise ValueError(
                "timestep_spacing='optimal' needs ms_eps, the network's statistic, from "
                "noise_statistics.estimate_noise_statistics"
            )
        visitable = num_visitable(schedule.T, sampler, spec.min_log_snr, schedule.log_snr, **options)
        visited = NoiseSchedule(schedule.beta[:visitable])
        timesteps = optimal_timesteps(visited, ms_eps[:visitable], len(timesteps))
    if skip_scale is None or np.ndim(skip_scale) == 0:
        skip = operator.index(skip_scale or 0)
        if not 0 <= skip < schedule.T:
            raise ValueError(f"skip_scale={skip} is out of range: a skip is from 0 to T−1={schedule.T - 1}")
        scale = objectives.skip_scale(schedule, skip, skip_scale_tau, skip_scale_preset) if skip else None
    elif np.shape(skip_scale) != (schedule.T,):
        raise ValueError(
            f"skip_scale has shape {np.shape(skip_scale)}; it must be a skip, or one number per timestep, shape "
            f"({schedule.T},)"
        )
    else:
        scale = np.asarray(skip_scale)
    return timesteps, scale, options


def sampler_inputs(
    schedule: NoiseSchedule, sampler: str, scale: np.ndarray | None, ms_eps: np.ndarray | None, head: Head | None
) -> np.ndarray | dict | None:
    """What a sampler requires besides the network: cov(x_0 | x_t), float [T], or a variance head's parameters.

    Raises ValueError if it is missing.
    """
    requires = SAMPLERS[sampler].requires
    if requires == "ms_eps":
        if ms_eps is None:
            raise ValueError(
                f"sampler={sampler!r} needs ms_eps, the network's statistic, from "
                f"noise_statistics.estimate_noise_statistics or --mode=sample --config.sample.sampler={sampler}"
            )
        # Scaled noise has a scaled mean square.
        return cov_x0(schedule, ms_eps if scale is None else ms_eps * np.square(scale))
    if not requires:
        return None
    if head is None or head.kind != requires:
        raise ValueError(
            f"sampler={sampler!r} needs a variance head of the network; train one with the objective :{requires} after "
            "the config's name and give its workdir"
        )
    if scale is not None:
        raise ValueError(
            f"skip_scale cannot be combined with sampler={sampler!r}: its variance head was trained on the unscaled "
            "network"
        )
    return head.params


def run_sampler(
    program: SamplerConfig,
    params: dict,
    timesteps: jax.Array | np.ndarray,
    seed: int | jax.Array,
    indices: jax.Array,
    *,
    eta: float | jax.Array | None = None,
    scale: np.ndarray | jax.Array | None = None,
    inputs: Any = None,
    x_T: jax.Array | None = None,
    return_x0: bool = False,
) -> SamplerOutput:
    """Runs a sampler, to be compiled by the caller: float32 images [B, H, W, C] around [−1, 1].

    Args:
      timesteps: int [S], ascending.
      indices: int [B]; image i depends on (seed, i) alone.
      eta: of DDIM; None for no noise in its steps.
      scale: float [T], a factor on the network's output; None for none.
      inputs: from `sampler_inputs`.
      x_T: float [B, H, W, C] to start from; None for the indices' own noise.
      return_x0: also return each step's prediction of x_0, [S, B, H, W, C].
    """
    network, schedule, sampler, own = program
    options: dict[str, Any] = dict(own)
    eps_fn: Callable[..., Any] = network.eps_fn(params, schedule)
    if options.get("variance") == "learned":
        eps_fn = with_learned_variance(network).eps_variance_fn(params, schedule)
    if scale is not None:
        eps_fn = scale_eps(eps_fn, scale)
    spec = SAMPLERS[sampler]
    if spec.requires == "ms_eps":
        options["cov_x0"] = inputs
    elif spec.requires:
        eps_fn = functools.partial(variance_head.apply, network, params, inputs, schedule)
    if eta is not None:
        options["eta"] = eta
    if eta is not None or spec.stochastic:
        options["noise_fn"] = per_image_noise(image_keys(seed, indices), network.image_shape)
    if x_T is None:
        x_T = initial_noise(seed, indices, network.image_shape)
    return get_sampler(sampler)(eps_fn, x_T, schedule, timesteps, return_x0=return_x0, **options)


@jit_network(static_argnums=(0, 1))
def _run_compiled(program, trajectory, params, timesteps, seed, indices, x_T, arguments):
    result = run_sampler(program, params, timesteps, seed, indices, **arguments, x_T=x_T, return_x0=trajectory)
    x_0 = result[0] if trajectory else result
    images = to_uint8(x_0)
    counts = _counts(images, ~jnp.isfinite(x_0))
    if trajectory:
        predictions = result[1]
        images = to_uint8(jnp.moveaxis(predictions.at[-1].set(x_0), 0, 1))  # [S, B, H, W, C] → [B, S, H, W, C]
    return images, counts


def _counts(images, not_finite):
    return jnp.stack([part.sum((1, 2, 3)) for part in (is_saturated(images), not_finite)], 1)


def sample_batches(
    sample_fn: Callable[..., jax.Array],
    params: dict,
    timesteps: np.ndarray,
    *,
    seed: int,
    num_images: int,
    batch_size: int,
    progress: bool = True,
    postprocess: Callable[[jax.Array], jax.Array] | None = None,
    counts: list[np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Images 0 … num_images−1 of a seed, batch by batch.

    Args:
      sample_fn, params, timesteps: the function from `configure_sampler`, or one like it, and its arguments.
      seed: of the noise.
      num_images: in total.
      batch_size: images per batch; the memory needed is that of two batches.
      progress: whether to show progress.
      postprocess: a function of the images, on the device; its result takes their place.
      counts: a list that int32 [B, 2] of each batch is appended to, once it is yielded: the values of each image that
        are 0 or 255, and those that are not finite.

    Yields:
      uint8 [B, H, W, C] with B = batch_size, in the last batch the remainder.

    Raises:
      ValueError: for num_images or batch_size below 1.
    """

    def compute(indices):
        inputs = params, timesteps, seed, shard_batch(indices)
        if isinstance(sample_fn, CompiledSampler):
            images, counted = sample_fn.with_counts(*inputs)
        else:
            images = sample_fn(*inputs)
            counted = _counts(images, jnp.zeros_like(images, bool))
        return (postprocess(images) if postprocess else images), counted

    for batch, counted in map_batches(compute, num_images, batch_size, progress):
        if counts is not None:
            counts.append(counted)
        yield batch
