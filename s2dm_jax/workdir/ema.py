"""The EMA of the weights, corrected for its start, from which a run in its first steps is sampled.

With decay r the EMA after n steps still holds r^n of the initial weights, 37 % after 1,000 steps with r = 0.999, and
what is sampled from it is noise. The initial weights are a function of the seed, so that share is subtracted exactly. A
checkpoint holds the EMA as the steps made it.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.config.ema import EmaChoice, has_rampup, main_decay, sigma_rel_name
from s2dm_jax.workdir.paths import CARD
from s2dm_jax.workdir.power_ema import Average, read_snapshots, synthesize, write_snapshot

if TYPE_CHECKING:
    from s2dm_jax.models.network import Network
    from s2dm_jax.workdir.state import TrainState

# Up to this share of initial weights the EMA is used as it is: a long run's images do not depend on this file.
NEGLIGIBLE = 0.01
# Above this share, the first step of Adam, which `ema_start="first_step"` leaves unknown, would be magnified.
_UNKNOWN_FIRST_STEP = 0.5
# Room for rounding above the bound on Adam's updates.
_MARGIN = 1.1


class Averaging(NamedTuple):
    """How an EMA was made.

    Attributes:
      decay, start: the decay per step, `train.ema_start`.
      updates: n, the number of optimizer steps, without those that were skipped.
    """

    decay: float
    start: str
    updates: int

    @property
    def factors(self) -> tuple[float, float]:
        """r and s of ema ← r·ema + s·params, as `optax.incremental_update` rounds them to float32."""
        rate = np.float32(1 - self.decay)
        # From a traced rate, which a special first step needs, 1 − rate is computed in float32.
        kept = np.float32(1) - rate if self.start == "first_step" else np.float32(1 - (1 - self.decay))
        return float(kept), float(rate)

    @property
    def initial_share(self) -> float:
        """r^n: the share of the EMA that is still the weights that it started from."""
        return self.factors[0] ** self.updates


def corrected_ema(ema: dict, initial: dict, averaging: Averaging) -> dict:
    """The average of the weights after each of n steps, without the weights before: Adam's bias correction.

    With ema_0 = θ_0 and ema_n = r·ema_{n−1} + s·θ_n this is (ema_n − r^n·θ_0) / (s·(1 + r + … + r^{n−1})), computed in
    float64 with the r and s of float32 steps. The EMA's own rounding is magnified: after one step the result is θ_1 to
    a few units in the last place, times 1/(1−r). With `start="first_step"`, where ema_1 = θ_1, the exact result
    would need θ_1 in θ_0's place; θ_0 differs from it by Adam's first step, at most the learning rate, so that the
    result is off by at most r^n/(1−r^n) learning rates.

    Args:
      ema: nested dict of float32 arrays, ema_n.
      initial: θ_0, of the same structure.
      averaging: decay, start and n; n = 0, and r = 1, return `ema` itself.

    Returns:
      Nested dict of float32 numpy arrays.
    """
    import jax

    (kept, rate), share = averaging.factors, averaging.initial_share
    if not averaging.updates or not rate:
        return ema
    total = rate * (averaging.updates if kept == 1 else (1 - share) / (1 - kept))

    def correct(average, start):
        return ((np.asarray(average, np.float64) - share * np.asarray(start, np.float64)) / total).astype(np.float32)

    return jax.tree.map(correct, ema, initial)


def chosen_weights(
    config: ConfigDict, network: "Network", state: "TrainState", workdir: str | Path, choice: EmaChoice
) -> tuple[dict, str]:
    """The weights that a field `ema` names, and a sentence if they differ from the stored ones.

    The arguments are as for `sampling_ema`, but no array needs to be replicated.

    Raises:
      UserError: for a snapshot that is damaged.
    """
    from s2dm_jax.devices.sharding import unshard

    if choice.kind == "weights":
        return unshard(state.params), ""
    if choice.kind == "sigma_rel":
        own = _power_averages(config, state)
        return synthesized_weights(workdir, choice.value, own[0].step, own)
    # The run's EMA is named by its decay too, where that is constant.
    decay = choice.value if choice.name in state.ema_extra else None
    ema = unshard(state.ema_params if decay is None else state.ema_extra[choice.name])
    return sampling_ema(config, network, state._replace(ema_params=ema), workdir, decay)


def save_snapshot(workdir: str | Path, config: ConfigDict, state: "TrainState") -> None:
    """Writes the state's power-function EMAs to a file in the run's folder; every process calls this."""
    from s2dm_jax.devices.distributed import barrier, is_main_process

    averages = _power_averages(config, state)
    if is_main_process():
        ema = {one.sigma_rel: one.read() for one in averages}
        write_snapshot(workdir, averages[0].step, averages[0].updates, ema, config.train.ema_snapshot_dtype)
    barrier("snapshot is written")


def _power_averages(config: ConfigDict, state: "TrainState") -> list[Average]:
    from s2dm_jax.devices.sharding import unshard
    from s2dm_jax.workdir.state import num_updates

    step, updates = int(state.step), int(num_updates(state.opt_state))
    found = {value: unshard(state.ema_extra[sigma_rel_name(value)]) for value in config.train.ema_sigma_rel}
    return [Average(step, updates, value, functools.partial(_flat, ema)) for value, ema in found.items()]


def synthesized_weights(
    workdir: str | Path, sigma_rel: float, step: int, own: Sequence[Average] = ()
) -> tuple[dict, str]:
    """The power-function EMA from the snapshots up to `step` and the checkpoint's `own`, and a sentence or ""."""
    from flax import traverse_util

    from s2dm_jax.devices.sharding import replicate

    # A snapshot is there for longer than the checkpoint, and with float16 differs from it.
    made = synthesize([*read_snapshots(workdir, step), *own], sigma_rel, step)
    return replicate(traverse_util.unflatten_dict(made.weights, sep=".")), made.note


def _flat(params: dict) -> dict[str, np.ndarray]:
    from flax import traverse_util

    return {name: np.asarray(value) for name, value in traverse_util.flatten_dict(params, sep=".").items()}


def sampling_ema(
    config: ConfigDict, network: "Network", state: "TrainState", workdir: str | Path, decay: float | None = None
) -> tuple[dict, str]:
    """The weights to sample from, and a sentence if they are not simply the EMA of the state.

    They are the EMA if at most NEGLIGIBLE of it is initial weights, else `corrected_ema`. The EMA of a run that
    started from converted weights (a folder with a model card) started from those: nothing is subtracted. Neither is it
    with a ramp-up, whose first update replaces the initial weights.

    Args:
      config: the run's.
      network: the trained network, or that of the variance head in `state`.
      state: with its EMA replicated.
      workdir: folder of the run.
      decay: that of the EMA if it is one of `train.ema_decays`; None for the run's own.
    """
    import jax

    from s2dm_jax.devices.sharding import replicate
    from s2dm_jax.models import variance_head
    from s2dm_jax.workdir.state import num_updates

    train = config.train
    if decay is None and has_rampup(train):
        return state.ema_params, ""
    field = "ema_halflife_images" if train.ema_halflife_images else "ema_decay"
    stated = f"decay={decay:g}" if decay is not None else f"train.{field}={train[field]:g}"
    decay = main_decay(train) if decay is None else decay
    averaging = Averaging(decay, train.ema_start, int(num_updates(state.opt_state)))
    share = averaging.initial_share
    if not averaging.updates or share <= NEGLIGIBLE or (Path(workdir) / CARD).exists():
        return state.ema_params, ""
    held = f"the EMA still holds {100 * share:.3g} % of the initial weights ({stated})"
    if decay == 1:
        return state.ema_params, f"{held} and never changes; images are sampled from those weights"
    if train.ema_start == "first_step" and share > _UNKNOWN_FIRST_STEP:
        reason = "after its first step, which is not stored; it is used uncorrected while that is above 50 %"
        return state.ema_params, f"{held} {reason}"
    is_head = bool(config.variance_head.kind)
    initial = variance_head.init_params(network, train.seed) if is_head else network.init(train.seed)
    ema = jax.tree.map(np.asarray, state.ema_params)
    if not _reachable(ema, initial, averaging, train):
        return (
            state.ema_params,
            f"{held}, but of other ones than train.seed={train.seed} generates; it is used uncorrected",
        )
    corrected = replicate(corrected_ema(ema, initial, averaging))
    return corrected, f"{held}; images are sampled from the EMA corrected for this"


def largest_update(b1: float, b2: float) -> float:
    """Upper bound of Adam's |m̂|/√v̂ by Cauchy and Schwarz, with bias correction; infinite if β₁² ≥ β₂.

    It is √((1−β₁)²/((1−β₂)(1−β₁²/β₂))), times √(1−β₂)/(1−β₁) where that is more than 1: 7.3 for 0.9 and 0.999.
    """
    if b1**2 >= b2:
        return float("inf")
    ratio = (1 - b1) / (1 - b2) ** 0.5
    return max(ratio, 1.0) / (1 - b1**2 / b2) ** 0.5


def _reachable(ema: dict, initial: dict, averaging: Averaging, train: ConfigDict) -> bool:
    """Whether the EMA can have come from these initial weights: AdamW's steps are bounded."""
    import jax

    steps = averaging.updates
    moved = train.lr * steps * _MARGIN * largest_update(train.adam_b1, train.adam_b2)
    # No schedule exceeds train.lr, so that n steps of weight decay take at most this share of a weight.
    decayed = 1 - (1 - train.lr * train.weight_decay) ** steps
    if averaging.start == "initial":
        moved *= 1 - averaging.initial_share
    # Each step rounds the EMA once or twice.
    rounding = 2 * steps * np.finfo(np.float32).eps

    def reachable(average, start):
        bound = moved + decayed * np.abs(start) + rounding * (np.abs(start) + np.abs(average))
        # NaN is no sign of other initial weights.
        return average.shape == start.shape and not np.any(np.abs(average - start) > bound)

    return all(jax.tree.leaves(jax.tree.map(reachable, ema, initial)))
