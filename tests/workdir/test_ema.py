"""The EMA that young runs are sampled from: corrected for its start, exactly, and only where that matters."""

import jax
import numpy as np
import pytest
from helpers import ToyNetwork, small_config

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.training.averages import Averages
from s2dm_jax.training.step import StepConfig, apply_gradient
from s2dm_jax.workdir.ema import NEGLIGIBLE, Averaging, corrected_ema, sampling_ema
from s2dm_jax.workdir.state import init_state, make_optimizer

NETWORK, RATE = ToyNetwork(), 1e-3


def trained(steps, decay, start="initial", seed=0):
    """The weights after each step from `init_state`'s, and the last state."""
    optimizer = make_optimizer(RATE, 0.0)
    made_of = StepConfig(NETWORK, linear_schedule(), objectives.paper(), optimizer, Averages(decay, start))
    state, rng = init_state(NETWORK, optimizer, seed), np.random.default_rng(1)
    sequence = [jax.device_get(state.params)]
    step = jax.jit(lambda state, grads: apply_gradient(made_of, state, grads))
    for _ in range(steps):
        state = step(state, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), state.params))
        sequence.append(jax.device_get(state.params))
    return sequence, state


def average(sequence, decay):
    """The average of the weights after each step, in float64; the newest counts most."""
    weights = np.float64(decay) ** np.arange(len(sequence))[::-1]
    return jax.tree.map(lambda *leaves: np.average(np.float64(leaves), axis=0, weights=weights), *sequence)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)))


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.9999), (1, 0.9), (7, 0.999), (60, 0.95)])
def test_the_correction_gives_the_average_of_the_weights_after_each_step(steps, decay):
    sequence, state = trained(steps, decay)
    found = corrected_ema(state.ema_params, sequence[0], Averaging(decay, "initial", steps))
    expected = average(sequence[1:], decay)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(sequence[0]))
    assert largest_difference(found, expected) < 4 * np.spacing(np.float32(largest)) / (1 - decay)
    # Without it, the average is dominated by the initial weights.
    if decay**steps > 0.5:
        assert largest_difference(state.ema_params, sequence[0]) < largest_difference(found, sequence[0])


def test_nothing_is_corrected_before_the_first_step_or_where_the_average_never_moves():
    ema = {"w": np.ones(3, np.float32)}
    assert corrected_ema(ema, ema, Averaging(0.999, "initial", 0)) is ema
    assert corrected_ema(ema, ema, Averaging(1.0, "initial", 5)) is ema


def config_of(decay, **changes):
    return small_config(**{"train.ema_decay": decay, "train.lr": RATE, **changes})


def test_a_long_run_is_sampled_from_its_ema_to_the_bit(tmp_path):
    _, state = trained(45, 0.9)
    assert 0.9**45 < NEGLIGIBLE < 0.9**40
    assert sampling_ema(config_of(0.9), NETWORK, state, tmp_path) == (state.ema_params, "")
    assert sampling_ema(config_of(0.9), NETWORK, state, tmp_path)[0] is state.ema_params
    assert (
        "the EMA still holds 1.48 % of the initial weights"
        in sampling_ema(config_of(0.9), NETWORK, trained(40, 0.9)[1], tmp_path)[1]
    )


def test_a_young_run_is_sampled_from_the_average(tmp_path):
    sequence, state = trained(20, 0.999)
    found, note = sampling_ema(config_of(0.999), NETWORK, state, tmp_path)
    assert largest_difference(found, average(sequence[1:], 0.999)) < 2e-4
    assert "98 % of the initial weights (train.ema_decay=0.999); images are sampled from the EMA corrected" in note
    # Of SA-DPM's start the first step is not stored: later, it is less than one learning rate.
    state = trained(20, 0.999, "first_step")[1]
    found, note = sampling_ema(config_of(0.999, **{"train.ema_start": "first_step"}), NETWORK, state, tmp_path)
    assert found is state.ema_params
    assert "is used uncorrected while that is above 50 %" in note
    sequence, state = trained(15, 0.95, "first_step")
    found, note = sampling_ema(config_of(0.95, **{"train.ema_start": "first_step"}), NETWORK, state, tmp_path)
    assert largest_difference(found, average(sequence[1:], 0.95)) < RATE


def test_only_the_initial_weights_of_the_run_are_subtracted(tmp_path):
    state = trained(20, 0.999)[1]
    # Skipped steps do not count, for they average nothing.
    found = sampling_ema(config_of(0.999), NETWORK, state._replace(step=np.int32(500)), tmp_path)[0]
    expected = sampling_ema(config_of(0.999), NETWORK, state, tmp_path)[0]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    found, note = sampling_ema(config_of(0.999, **{"train.seed": 1}), NETWORK, state, tmp_path)
    assert found is state.ema_params
    assert "but of other ones than train.seed=1 generates; it is used uncorrected" in note
    # A converted run started from weights that somebody else has trained.
    (tmp_path / "model_card.json").write_text("{}")
    assert sampling_ema(config_of(0.999), NETWORK, state, tmp_path) == (state.ema_params, "")


def test_a_half_life_is_a_decay_and_a_ramp_up_leaves_nothing_to_correct(tmp_path):
    decay, half_life = 0.5 ** (8 / 8000), {"train.batch_size": 8, "train.ema_halflife_images": 8000.0}
    state = trained(20, decay)[1]
    expected = sampling_ema(config_of(decay), NETWORK, state, tmp_path)[0]
    without_ramp_up = config_of(0.5, **half_life, **{"train.ema_rampup_ratio": 0.0})
    found, note = sampling_ema(without_ramp_up, NETWORK, state, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert "98.6 % of the initial weights (train.ema_halflife_images=8000); images are" in note
    assert sampling_ema(config_of(0.5, **half_life), NETWORK, state, tmp_path) == (state.ema_params, "")
