"""The EMAs of the weights that a step updates: decays, the ramp-up of EDM, power functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from s2dm_jax.config.ema import decay_name, has_rampup, main_decay, sigma_rel_name
from s2dm_jax.workdir.power_ema import gamma_of

Count = jax.Array | np.ndarray | int


class Averages(NamedTuple):
    """Which EMAs a run tracks.

    Attributes:
      decay: of the run's EMA, after the ramp-up if there is one.
      start: it starts at the "initial" weights (DDIM code), or at those after the "first_step" (SA-DPM code).
      halflife: of the run's EMA in updates; 0 without a ramp-up.
      rampup_ratio: the half-life is at most this times the updates before.
      decays: of further EMAs, which start as the run's.
      sigma_rel: relative widths of power-function EMAs, which have no start.
    """

    decay: float
    start: str = "initial"
    halflife: float = 0.0
    rampup_ratio: float = 0.0
    decays: tuple[float, ...] = ()
    sigma_rel: tuple[float, ...] = ()


def averages_of(train: ConfigDict) -> Averages:
    """The EMAs that the fields of `train` name."""
    halflife = train.ema_halflife_images / train.batch_size if has_rampup(train) else 0.0
    ratio = train.ema_rampup_ratio if halflife else 0.0
    return Averages(main_decay(train), train.ema_start, halflife, ratio, train.ema_decays, train.ema_sigma_rel)


def rampup_rate(halflife: float, ratio: float, updates: Count) -> jax.Array:
    """1 − β of EDM's EMA (Karras et al. 2022, training loop): β = 0.5^(1/min(halflife, ratio·n)) after n updates.

    `halflife` is in updates; with batches of B images EDM's β = 0.5^(B/min(half-life, ratio·images seen)) is the same.
    """
    # As there: 1e-8 for the first update, which replaces the initial weights.
    reached = jnp.maximum(jnp.minimum(halflife, ratio * jnp.float32(updates)), 1e-8)
    return -jnp.expm1(-jnp.log(2.0) / reached)


def power_rate(sigma_rel: float, updates: Count) -> jax.Array:
    """1 − β_γ(t) = 1 − (1 − 1/t)^(γ+1) at update t = 1, 2, … (Karras et al. 2024, section 3.1)."""
    return -jnp.expm1((gamma_of(sigma_rel) + 1) * jnp.log1p(-1 / jnp.float32(updates)))


def update_averages(
    averages: Averages, ema_params: dict, ema_extra: dict, params: dict, updates: Count
) -> tuple[dict, dict]:
    """The EMAs after a step, ema ← β·ema + (1−β)·params.

    Args:
      ema_params: the run's EMA.
      ema_extra: the others by their names (`config.ema.extra_names`).
      params: the weights after the step.
      updates: steps before this one that were not skipped.
    """

    def by_decay(ema, decay):
        rate: float | jax.Array = 1 - decay
        if averages.start == "first_step":
            rate = jnp.where(updates == 0, 1.0, rate)
        return optax.incremental_update(params, ema, rate)

    def by_power(ema, sigma_rel):
        rate = power_rate(sigma_rel, updates + 1)
        # Exact for weights that stay, where β and 1 − β, each rounded, would shrink them in 10⁵ updates.
        return jax.tree.map(lambda average, new: average + rate * (new - average), ema, params)

    if averages.halflife:
        rate = rampup_rate(averages.halflife, averages.rampup_ratio, updates)
        ema_params = optax.incremental_update(params, ema_params, rate)
    else:
        ema_params = by_decay(ema_params, averages.decay)
    named = {decay_name(decay): (by_decay, decay) for decay in averages.decays}
    named |= {sigma_rel_name(sigma_rel): (by_power, sigma_rel) for sigma_rel in averages.sigma_rel}
    return ema_params, {name: update(ema_extra[name], value) for name, (update, value) in named.items()}
