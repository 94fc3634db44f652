"""The EMA of the weights, corrected for its start: what a young run is sampled from.

With decay r the EMA after n steps still holds r^n of the initial weights, 37 % after 1,000 steps with r = 0.999, and
what is sampled from it is noise. The initial weights are a function of the seed, so that share is subtracted exactly. A
checkpoint holds the EMA as the steps made it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from s2dm_jax.workdir.paths import CARD

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
      decay, start: `train.ema_decay` and `train.ema_start`.
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


def sampling_ema(config: ConfigDict, network: "Network", state: "TrainState", workdir: str | Path) -> tuple[dict, str]:
    """The weights to sample from, and a sentence where they are not just the EMA of the state.

    They are the EMA where at most NEGLIGIBLE of it are initial weights, else `corrected_ema`. The EMA of a run that
    started from converted weights (a folder with a model card) started from those: nothing is subtracted.

    Args:
      config: the run's.
      network: what is trained, or what the variance head in `state` belongs to.
      state: with its EMA replicated.
      workdir: folder of the run.
    """
    import jax

    from s2dm_jax.devices.sharding import replicate
    from s2dm_jax.models import variance_head
    from s2dm_jax.workdir.state import num_updates

    train = config.train
    averaging = Averaging(train.ema_decay, train.ema_start, int(num_updates(state.opt_state)))
    share = averaging.initial_share
    if not averaging.updates or share <= NEGLIGIBLE or (Path(workdir) / CARD).exists():
        return state.ema_params, ""
    held = f"the EMA still holds {100 * share:.3g} % of the initial weights (train.ema_decay={train.ema_decay:g})"
    if train.ema_decay == 1:
        return state.ema_params, f"{held} and never changes; images are sampled from those weights"
    if train.ema_start == "first_step" and share > _UNKNOWN_FIRST_STEP:
        reason = "after its first step, which is not stored; it is used uncorrected while that is above 50 %"
        return state.ema_params, f"{held} {reason}"
    is_head = bool(config.variance_head.kind)
    initial = variance_head.init_params(network, train.seed) if is_head else network.init(train.seed)
    ema = jax.tree.map(np.asarray, state.ema_params)
    if not _reachable(ema, initial, averaging, train):
        return state.ema_params, f"{held}, but not of those that train.seed={train.seed} gives; it is used uncorrected"
    corrected = replicate(corrected_ema(ema, initial, averaging))
    return corrected, f"{held}; images are sampled from the EMA corrected for this"


def largest_update(b1: float, b2: float) -> float:
    """Upper bound of Adam's |m̂|/√v̂ by Cauchy and Schwarz, with bias correction; infinite where β₁² ≥ β₂.

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
