"""Pictures from trained weights: compiled samplers, batches of any number of images, a run as a `Model`.

Image i of a seed depends on (seed, i) alone, not on the batch or the order that it is drawn in.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from s2dm_jax import heads, moments, unet
from s2dm_jax.config import build_schedule
from s2dm_jax.covariance import cov_x0
from s2dm_jax.heads import Head
from s2dm_jax.methods import FACTS, check_options
from s2dm_jax.parallel import fetch, is_lead, split_batch
from s2dm_jax.progress import counting
from s2dm_jax.report import to_uint8
from s2dm_jax.resolve import resolve
from s2dm_jax.runs import load_run
from s2dm_jax.samplers import METHODS, image_keys, initial_noise, per_image_noise, scale_eps
from s2dm_jax.schedule import NoiseSchedule
from s2dm_jax.steps import Sampled
from s2dm_jax.unet import UNetConfig


def make_sampler(
    network: UNetConfig,
    schedule: NoiseSchedule,
    method: str = "ddim",
    *,
    eta: float = 0.0,
    scale: np.ndarray | None = None,
    ms_eps: np.ndarray | None = None,
    head: Head | None = None,
    **options: Any,
) -> Callable[..., jax.Array]:
    """A compiled function of (params, timesteps [S], seed, indices [B]) → uint8 images [B, H, W, C].

    There is one program per method, S and B; other weights, levels, seeds, eta above 0 or scales compile
    nothing. Two keyword arguments make another program: `x_T` [B, H, W, C] to start from instead of the
    indices' own noise, and `trajectory=True` for uint8 [B, S, H, W, C], each level's prediction of x_0, the
    noisiest level's first, with the image itself in the place of the last.

    Args:
      network: the network that the weights belong to.
      schedule: the forward process; sampling again with the same object compiles nothing.
      method: one of `samplers.METHODS`.
      eta: of DDIM and the form "ddim" of others, from 0 (deterministic) to 1 (DDPM's posterior variance).
      scale: float [T], a factor on the network's output at each level (`losses.skip_scale`).
      ms_eps: float [T], the network's statistic (`moments.estimate`), which "analytic" needs.
      head: the network's second head, which "sn" and "npr" need.
      **options: keyword arguments of the method's own: those of `methods.OPTIONS` that it has.

    Raises:
      ValueError: for an unknown method, an option or value that it does not have, or what it needs missing.
    """
    check_options(method, eta=eta, **options)
    known = known_for(schedule, method, scale, ms_eps, head)
    program = Program(network, schedule, method, tuple(sorted(options.items())))

    def sample(params, timesteps, seed, indices, *, x_T=None, trajectory=False):
        # Without noise nothing is drawn: eta 0 is a program of its own.
        return _run(program, trajectory, params, timesteps, seed, indices, eta or None, scale, known, x_T)

    return sample


def known_for(
    schedule: NoiseSchedule,
    method: str,
    scale: np.ndarray | None,
    ms_eps: np.ndarray | None,
    head: Head | None,
) -> np.ndarray | dict | None:
    """What a method is given besides the network: cov(x_0 | x_t) at each level, or a head's parameters.

    Raises:
      ValueError: if what the method needs is missing.
    """
    needs = FACTS[method].needs
    if needs == "ms_eps":
        if ms_eps is None:
            raise ValueError(
                f"method={method!r} needs ms_eps, the network's statistic; moments.estimate makes it, and so "
                f"does --mode=sample --config.sample.method={method}"
            )
        # Scaled noise has a scaled mean square.
        return cov_x0(schedule, ms_eps if scale is None else ms_eps * np.square(scale))
    if not needs:
        return None
    if head is None or head.kind != needs:
        raise ValueError(
            f"method={method!r} needs a second head of the network; train one with the config's method "
            f":{needs} and give its workdir"
        )
    if scale is not None:
        raise ValueError(
            f"skip_scale does not go with method={method!r}: its head knows the unscaled network"
        )
    return head.params


class Program(NamedTuple):
    """What a compiled sampler is made for; options are pairs of name and value."""

    network: UNetConfig
    schedule: NoiseSchedule
    method: str
    options: tuple


def draw(
    program: Program,
    params: dict,
    timesteps: jax.Array | np.ndarray,
    seed: int | jax.Array,
    indices: jax.Array,
    *,
    eta: float | jax.Array | None = None,
    scale: np.ndarray | jax.Array | None = None,
    known: Any = None,
    x_T: jax.Array | None = None,
    return_x0: bool = False,
) -> Sampled:
    """The images that a sampler makes, to be compiled by the caller.

    Args:
      program: network, schedule, method and options.
      params: the weights.
      timesteps: int [S], ascending levels.
      seed, indices: of the noise; the images with these indices, int [B].
      eta: of DDIM; None for no noise in its steps.
      scale: float [T], a factor on the network's output; None for none.
      known: from `known_for`.
      x_T: float [B, H, W, C] to start from; None for the indices' own noise.
      return_x0: also return each step's prediction of x_0.

    Returns:
      float32 [B, H, W, C] around [−1, 1]; with `return_x0` also [S, B, H, W, C].
    """
    network, schedule, method, given = program
    shape = (network.resolution, network.resolution, network.in_channels)
    options: dict[str, Any] = dict(given)
    eps_fn: Callable[..., Any] = unet.eps_fn(network, params)
    if scale is not None:
        eps_fn = scale_eps(eps_fn, scale)
    needs = FACTS[method].needs
    if needs == "ms_eps":
        options["cov_x0"] = known
    elif needs:
        eps_fn = heads.heads_fn(network, params, known)
    if eta is not None:
        options["eta"] = eta
    if eta is not None or FACTS[method].draws_noise:
        options["noise_fn"] = per_image_noise(image_keys(seed, indices), shape)
    if x_T is None:
        x_T = initial_noise(seed, indices, shape)
    return METHODS[method](eps_fn, x_T, schedule, timesteps, return_x0=return_x0, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(program, trajectory, params, timesteps, seed, indices, eta, scale, known, x_T):
    inputs = {"eta": eta, "scale": scale, "known": known, "x_T": x_T}
    result = draw(program, params, timesteps, seed, indices, **inputs, return_x0=trajectory)
    if not trajectory:
        return to_uint8(result)
    x_0, predictions = result
    return to_uint8(jnp.moveaxis(predictions.at[-1].set(x_0), 0, 1))


def sample_batches(
    sampler: Callable[..., jax.Array],
    params: dict,
    timesteps: np.ndarray,
    *,
    seed: int,
    num_images: int,
    batch_size: int,
    progress: bool = True,
    then: Callable[[jax.Array], jax.Array] | None = None,
) -> Iterator[np.ndarray]:
    """Images 0 … num_images−1 of a seed, a batch at a time; how many are done is told as in `progress`.

    Args:
      sampler: from `make_sampler`.
      params: the weights.
      timesteps: int [S], ascending levels.
      seed: of the noise.
      num_images: how many in all.
      batch_size: how many at once; the memory needed is that of two batches.
      progress: whether to tell how many are done.
      then: a function of the images, on the device; its result takes their place.

    Yields:
      uint8 [B, H, W, C] with B = batch_size, in the last batch what is left.

    Raises:
      ValueError: for num_images or batch_size below 1.
    """

    def compute(indices):
        images = sampler(params, timesteps, seed, split_batch(indices))
        return then(images) if then else images

    return in_batches(compute, num_images, batch_size, progress)


def in_batches(
    compute: Callable[[np.ndarray], jax.Array], num_images: int, batch_size: int, progress: bool = True
) -> Iterator[np.ndarray]:
    """What `compute` makes of the indices 0 … num_images−1, a batch at a time.

    Args:
      compute: indices int [B] → array [B, …] on the device; B is the same in every call, so that one program
        serves, and indices from num_images on are made and dropped.
      num_images, batch_size, progress: as for `sample_batches`.

    Yields:
      Arrays [B, …] on the host, in the last batch what is left.

    Raises:
      ValueError: for num_images or batch_size below 1.
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} is out of range: it must be at least 1")
    batch_size = min(batch_size, num_images)
    with counting(num_images, "images", shown=progress and is_lead()) as advance:
        firsts = range(0, num_images, batch_size)
        waiting = compute(np.arange(batch_size))
        for first in firsts[1:]:
            made = compute(first + np.arange(batch_size))
            # The batch before is fetched while this one is computed.
            yield fetch(waiting)
            advance(batch_size)
            waiting = made
        yield fetch(waiting)[: num_images - firsts[-1]]


class Model(NamedTuple):
    """A trained run to sample from: `model = s2dm_jax.load("runs/digits"); images = model.sample(64)`.

    Attributes:
      config: the run's config.
      network: the network's shape.
      schedule: the forward process.
      params: the moving average of the weights.
      step: training steps behind them.
      ms_eps: float [T], Analytic-DPM's statistic, or None where it has not been estimated.
      head: the second head of SN- or NPR-DPM, or None.
    """

    config: ConfigDict
    network: UNetConfig
    schedule: NoiseSchedule
    params: dict
    step: int
    ms_eps: np.ndarray | None = None
    head: Head | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.network.resolution, self.network.resolution, self.network.in_channels

    def sampler(self, method: str = "ddim", **how: Any) -> tuple[Callable[..., jax.Array], np.ndarray]:
        """`configure` for this model."""
        return configure(self.network, self.schedule, method, ms_eps=self.ms_eps, head=self.head, **how)

    def sample(
        self, n: int, method: str = "ddim", *, nfe: int = 0, seed: int = 0, batch_size: int = 500, **how: Any
    ) -> np.ndarray:
        """Images 0 … n−1 of a seed.

        Args:
          n: number of images.
          method: one of `samplers.METHODS`.
          nfe: network evaluations; by default 10, unless `how` gives steps or timesteps.
          seed: of the noise.
          batch_size: how many images are computed at once.
          **how: as for `configure`: steps, grid, timesteps, eta, skip_scale, and the method's own options.

        Returns:
          uint8 [n, H, W, C].

        Raises:
          ValueError: for an unknown method, and for values that are not allowed or contradict one another.
        """
        sampler, timesteps = self.sampler(method, nfe=nfe, **how)
        batches = sample_batches(
            sampler, self.params, timesteps, seed=seed, num_images=n, batch_size=batch_size
        )
        return np.concatenate(list(batches))


def load(workdir: str | os.PathLike, step: int | None = None) -> Model:
    """The newest checkpoint of the run in `workdir` that verifies, or that of one step, to sample from.

    Args:
      workdir: folder of a run, or the file of an exported sampler, whose weights any method can use.

    Raises:
      config.UserError: if the folder holds no run, or no such checkpoint that is whole.
    """
    run = load_run(workdir, step)
    schedule = build_schedule(run.config)
    statistic = moments.kept(schedule, run.ema, moments_folder(workdir))
    ms_eps = statistic and statistic.ms_eps
    head = None if run.head is None else Head(run.config.head.kind, run.head)
    return Model(run.config, run.network, schedule, run.ema, run.step, ms_eps, head)


def moments_folder(workdir: str | os.PathLike) -> Path:
    """Where the statistics of a run are kept."""
    return Path(workdir) / "ms_eps"


def configure(
    network: UNetConfig, schedule: NoiseSchedule, method: str = "ddim", **how: Any
) -> tuple[Callable[..., jax.Array], np.ndarray]:
    """A compiled sampler and the levels that it is to visit, from what a user says.

    Args:
      network: the network's shape.
      schedule: the forward process.
      method: one of `samplers.METHODS`.
      **how: as for `resolve`.

    Returns:
      The function as from `make_sampler`, and the levels int32 [S], ascending.

    Raises:
      ValueError: for an unknown method, and for values that are not allowed or contradict one another.
    """
    levels, scale, options = resolve(schedule, method, **how)
    ms_eps, head = how.get("ms_eps"), how.get("head")
    return make_sampler(network, schedule, method, scale=scale, ms_eps=ms_eps, head=head, **options), levels
