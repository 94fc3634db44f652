"""Bits per dimension of a trained network on real images: the variational bound of `diffusion.bound`, compiled.

The noise of image i at timestep t depends on (seed, i, t) alone: chains over different timesteps, other variances and
other networks are compared on the same noise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.images import to_unit
from s2dm_jax.devices.hardware import jit_network
from s2dm_jax.devices.sharding import replicate, shard_batch
from s2dm_jax.diffusion.bound import VARIANCES, bound_term, chain_steps, prior_coefficients, prior_term
from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma
from s2dm_jax.inference.sampler import map_batches
from s2dm_jax.models import variance_head
from s2dm_jax.models.network import Network, with_learned_variance
from s2dm_jax.samplers.analytic import HEAD_COV_X0
from s2dm_jax.samplers.common import call_network, scale_eps
from s2dm_jax.samplers.noise import image_keys, per_image_noise
from s2dm_jax.samplers.thresholding import threshold_x0
from s2dm_jax.samplers.timesteps import check_timesteps


class Chain(NamedTuple):
    """What the compiled bound is made for; hashable.

    Attributes:
      network: what predicts the noise.
      schedule: the forward process.
      variances: of the model's steps, names in `diffusion.bound.VARIANCES`, each with a bound of its own from the same
        call of the network.
      clip_x0, dynamic_threshold: bounds on x̂_0, as for `threshold_x0`. DDPM's and improved-diffusion's code clip it.
    """

    network: Network
    schedule: NoiseSchedule
    variances: tuple[str, ...] = ("small", "large")
    clip_x0: bool = True
    dynamic_threshold: float | None = None


class Bound(NamedTuple):
    """The bound and its terms, in bits per dimension; means over images.

    Attributes:
      bits_per_dim: the bound, the sum of the others.
      standard_error: of bits_per_dim, over the images and their noise.
      prior: L_T.
      terms: float64 [S], L_0 and the KL terms: of the step from each timestep to the one below it, ascending.
    """

    bits_per_dim: float
    standard_error: float
    prior: float
    terms: np.ndarray


def variational_bound(
    chain: Chain,
    params: dict,
    images: np.ndarray,
    timesteps: np.ndarray,
    *,
    indices: np.ndarray | None = None,
    inputs: dict[str, Any] | None = None,
    scale: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 500,
) -> dict[str, Bound]:
    """The bound (DDPM, eq. 5; S²-DMs, eq. 3) of the chain that visits `timesteps`, for each of `chain.variances`.

    The network is called S times for each batch, with one noise for each image and timestep.

    Args:
      params: the network's weights to sample with, usually the EMA.
      images: uint8 [N, H, W, C], real images that were not trained on.
      timesteps: int [S], ascending; np.arange(T) for the whole chain.
      indices: int [N'], which of the images, at least 2; None for all.
      inputs: of the variance "analytic" cov(x_0|x_t), float [T] (`analytic.cov_x0`), of "sn" and "npr" the parameters
        of the variance head, by name.
      scale: float [T], a factor on the network's output (`objectives.skip_scale`); None for none.
      seed: of the noise.
      batch_size: images per batch.

    Raises:
      ValueError: for bad timesteps, fewer than 2 images, or a variance that the network or `inputs` does not have.
    """
    timesteps = check_timesteps(chain.schedule.T, timesteps)
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    _check(chain, len(indices), inputs or {}, scale)
    steps = chain_steps(chain.schedule, timesteps), prior_coefficients(chain.schedule, timesteps[-1])
    arguments = replicate(jax.tree.map(_single, (params, *steps, inputs or {}, scale)))

    def compute(positions):
        # Beyond the last image it is repeated; `map_batches` drops the repetitions.
        rows = indices[np.minimum(positions, len(indices) - 1)]
        return _terms(chain, *arguments, shard_batch(images[rows]), shard_batch(rows), seed)

    totals: dict[str, list] = {name: [] for name in chain.variances}
    sums = dict.fromkeys(chain.variances, 0.0)
    for batch in map_batches(compute, len(indices), batch_size):
        for name, terms in batch.items():
            terms = terms.astype(np.float64)  # [B, 1 + S]
            totals[name].append(terms.sum(1))
            sums[name] = sums[name] + terms.sum(0)
    return {name: _bound(np.concatenate(totals[name]), sums[name] / len(indices)) for name in chain.variances}


def _bound(totals, means):
    error = totals.std(ddof=1) / np.sqrt(len(totals))
    return Bound(float(totals.mean()), float(error), float(means[0]), means[1:])


def _single(array):
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _check(chain, count, inputs, scale):
    if count < 2:
        raise ValueError(f"images must be at least 2 for a standard error, got {count}")
    for name in chain.variances:
        if name not in VARIANCES:
            raise ValueError(f"variances={chain.variances} names {name!r}; there are {', '.join(VARIANCES)}")
        if name in ("analytic", *HEAD_COV_X0) and name not in inputs:
            raise ValueError(f"inputs must have {name!r} for the variance of that name")
    if len({"learned", *HEAD_COV_X0} & set(chain.variances)) > 1:
        raise ValueError(f"variances={chain.variances} need several outputs of the network; ask for one at a time")
    if "learned" in chain.variances:
        with_learned_variance(chain.network)
    if scale is not None and {"learned", *HEAD_COV_X0} & set(chain.variances):
        raise ValueError(
            f"scale cannot be combined with variances={chain.variances}, one of which is the unscaled network's"
        )


@jit_network(static_argnums=0)
def _terms(chain, params, steps, last, inputs, scale, images, indices, seed):
    """L_T and the terms of the steps for each image, [B, 1 + S], by the name of the variance."""
    x0 = to_unit(images)
    noise_fn = per_image_noise(image_keys(seed, indices), x0.shape[1:])
    predict = _predict(chain, params, inputs, scale)

    def at_step(step):
        alpha, sigma = alpha_sigma(step.log_alpha_bar)
        x = alpha * x0 + sigma * noise_fn(step.t)
        eps, second = call_network(predict, x, step.t)
        x0_hat = threshold_x0(predict_x0(x, eps, alpha, sigma), chain.clip_x0, chain.dynamic_threshold)
        given = {name: cov(eps, second, (sigma / alpha) ** 2) for name, cov in HEAD_COV_X0.items() if name in inputs}
        given["learned"] = second
        if "analytic" in inputs:
            given["analytic"] = inputs["analytic"][step.t]
        ratios = {name: VARIANCES[name](step, given.get(name)) for name in chain.variances}
        return {name: bound_term(step, x0, x0_hat, ratio) for name, ratio in ratios.items()}

    terms = jax.lax.map(at_step, steps)  # [S, B] each
    prior = prior_term(x0, last)
    return {name: jnp.concatenate([prior[None], values]).T for name, values in terms.items()}


def _predict(chain: Chain, params: dict, inputs: dict, scale: jax.Array | None) -> Callable[..., tuple]:
    """(x, t) → ε and what the variance needs besides, or None."""
    for kind in HEAD_COV_X0:
        if kind in chain.variances:
            return functools.partial(variance_head.apply, chain.network, params, inputs[kind], chain.schedule)
    if "learned" in chain.variances:
        return with_learned_variance(chain.network).eps_variance_fn(params, chain.schedule)
    eps_fn = chain.network.eps_fn(params, chain.schedule)
    eps_fn = eps_fn if scale is None else scale_eps(eps_fn, scale)
    return lambda x, t: (eps_fn(x, t), None)
