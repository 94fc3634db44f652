"""Power-function EMAs and their post-hoc synthesis, the ramp-up and the other EMAs, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import ToyNetwork, small_config

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.ema import extra_names, parse_choice
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.training.averages import averages_of, power_rate, rampup_rate, update_averages
from s2dm_jax.training.step import StepConfig, apply_gradient
from s2dm_jax.workdir.ema import chosen_weights, save_snapshot, synthesized_weights
from s2dm_jax.workdir.power_ema import (
    average_weights,
    gamma_of,
    profile_products,
    read_snapshots,
    snapshot_path,
    snapshot_steps,
    solve_weights,
    synthesize,
    write_snapshot,
)
from s2dm_jax.workdir.state import init_state, make_optimizer

NETWORK, STEPS, EVERY = ToyNetwork(), 120, 4
TRACKED = (0.05, 0.1, 0.15)


def profile(gamma, t):
    """The weights of θ_1 … θ_t: the integrals of p_γ,t over the unit intervals before 1 … t."""
    k = np.arange(1, t + 1)
    return (k ** (gamma + 1) - (k - 1.0) ** (gamma + 1)) / float(t) ** (gamma + 1)


def average(sequence, weights):
    return jax.tree.map(lambda *leaves: np.tensordot(weights, np.float64(leaves), 1), *sequence)


def distance(a, b):
    squares = jax.tree.map(lambda x, y: np.sum((np.float64(x) - np.float64(y)) ** 2), a, b)
    return np.sqrt(sum(jax.tree.leaves(squares)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a run, its folder with snapshots, the weights after each step and the last state."""
    config, folder = small_config(), tmp_path_factory.mktemp("run")
    config.train.update(ema_sigma_rel=TRACKED, ema_decays=(0.9, 0.99), ema_decay=0.9, seed=0)
    optimizer = make_optimizer(0.1, 0.0)
    parts = NETWORK, linear_schedule(), objectives.paper(), optimizer
    made_of = StepConfig(*parts, averages_of(config.train))
    state, rng = init_state(NETWORK, optimizer, 0, ema_extra=extra_names(config.train)), np.random.default_rng(1)
    step = jax.jit(functools.partial(apply_gradient, made_of))
    sequence = []
    for number in range(1, STEPS + 1):
        state = step(state, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), state.params))
        sequence.append(jax.device_get(state.params))
        if number % EVERY == 0:
            save_snapshot(folder, config, state)
    return config, folder, sequence, state


def test_gamma_is_the_papers_and_gives_the_width():
    # Karras et al. 2024, section 3.1.
    assert [round(gamma_of(sigma_rel), 2) for sigma_rel in (0.05, 0.10)] == [16.97, 6.94]
    for sigma_rel in (0.001, 0.02, 0.25, 0.28):
        gamma = gamma_of(sigma_rel)
        assert np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_recursion_is_the_exact_average_of_the_sequence(run):
    _, _, sequence, state = run
    for sigma_rel in TRACKED:
        exact = average(sequence, profile(gamma_of(sigma_rel), STEPS))
        assert distance(state.ema_extra[f"sigma_rel={sigma_rel}"], exact) < 1e-6 * distance(exact, sequence[0])
    # Late in a long training, where 1 − β is 1e-5.
    for sigma_rel, t in ((0.05, 10**6), (0.1, 3 * 10**7)):
        exact = -np.expm1((gamma_of(sigma_rel) + 1) * np.log1p(-1 / t))
        assert float(power_rate(sigma_rel, t)) == pytest.approx(exact, rel=1e-6)
    # Weights that stay are not changed by any number of updates.
    averages, ones = averages_of(run[0].train), {"w": jnp.full(3, 1.1, jnp.float32)}
    extra = dict.fromkeys(extra_names(run[0].train), ones)
    for updates in (0, 10**5, 10**6):
        made = update_averages(averages, ones, extra, ones, updates)[1]
        np.testing.assert_array_equal(made["sigma_rel=0.05"]["w"], ones["w"])


def test_a_further_decay_is_the_ema_of_a_run_with_it_to_the_bit(run):
    _, _, sequence, state = run
    jax.tree.map(np.testing.assert_array_equal, state.ema_extra["0.9"], state.ema_params)
    weights = 0.01 * 0.99 ** np.arange(STEPS)[::-1]
    start = average([init_state(NETWORK, make_optimizer(0.1, 0.0), 0).params], np.array([0.99**STEPS]))
    exact = jax.tree.map(np.add, average(sequence, weights), start)
    assert distance(state.ema_extra["0.99"], exact) < 4e-6 * distance(exact, sequence[0])


@pytest.mark.parametrize("ratio", [0.05, 0.0])
def test_the_ramp_up_is_edms(ratio):
    """Against their training loop: the half-life in images, and the images seen before the step."""
    config = small_config(**{"train.batch_size": 32, "train.ema_rampup_ratio": ratio})
    config.train.ema_halflife_images = 500
    averages = averages_of(config.train)
    ema, expected = {"w": jnp.float32(5)}, 5.0
    for n in range(600):
        params = np.sin(n)
        halflife = min(500, n * 32 * ratio) if ratio else 500
        beta = 0.5 ** (32 / max(halflife, 1e-8))
        expected = beta * expected + (1 - beta) * params
        ema, _ = update_averages(averages, ema, {}, {"w": jnp.float32(params)}, n)
        if n in (0, 1, 50, 599):
            assert float(ema["w"]) == pytest.approx(expected, abs=1e-5)
            if ratio:
                assert float(rampup_rate(500 / 32, ratio, n)) == pytest.approx(1 - beta, rel=1e-6)


def test_products_of_profiles_are_their_integrals_and_solving_is_algorithm_3():
    t, gamma = np.array([30.0, 30, 60, 60, 90, 90]), np.array([16.97, 6.94] * 3)
    middle = (np.arange(900_000) + 0.5) / 1e4
    curves = [np.where(middle <= a, (g + 1) * middle**g / a ** (g + 1), 0) for a, g in zip(t, gamma, strict=True)]
    products = profile_products(t[:, None], gamma[:, None], t, gamma)
    np.testing.assert_allclose(products, np.array(curves) @ np.array(curves).T / 1e4, rtol=1e-3)
    target = profile_products(t, gamma, 90.0, 3.0)
    found = solve_weights(t, gamma, 90.0, 3.0)
    np.testing.assert_allclose(found, np.linalg.solve(products, target), rtol=1e-8)
    # What is stored is found, and an average has weights that sum to 1.
    np.testing.assert_allclose(solve_weights(t, gamma, 60, 6.94), np.eye(6)[3], atol=1e-12)
    average, error = average_weights(t, gamma, 90.0, 3.0)
    assert found.sum() != pytest.approx(1, abs=1e-3)
    assert average.sum() == pytest.approx(1, abs=1e-12)
    exact = 4 * middle**3 / 90**4
    assert error == pytest.approx(np.sqrt(np.sum((average @ curves - exact) ** 2) / np.sum(exact**2)), rel=1e-2)
    # More snapshots than can be told apart do no harm.
    twice = average_weights(np.append(t, 90.0), np.append(gamma, 6.94 + 1e-9), 90.0, 3.0)
    assert np.abs(twice[0]).max() < 10


def test_post_hoc_synthesis_is_the_average_that_was_tracked_or_could_have_been(run):
    config, folder, sequence, state = run
    assert snapshot_steps(folder) == list(range(EVERY, STEPS + 1, EVERY))
    tracked, note = chosen_weights(config, NETWORK, state, folder, parse_choice("sigma_rel=0.1"))
    scale = distance(state.ema_extra["sigma_rel=0.1"], state.ema_extra["sigma_rel=0.15"])
    assert (note, distance(tracked, state.ema_extra["sigma_rel=0.1"]) < 1e-5 * scale) == ("", True)
    # From two widths as in the paper; also at a step without a checkpoint.
    for sigma_rel, step, allowed in ((0.15, STEPS, 0.01), (0.07, STEPS, 0.005), (0.03, STEPS, 0.05), (0.2, 80, 0.05)):
        exact = average(sequence[:step], profile(gamma_of(sigma_rel), step))
        apart = distance(exact, average(sequence[:step], profile(gamma_of(sigma_rel * 1.5), step)))
        two = [one for one in read_snapshots(folder, step) if one.sigma_rel in TRACKED[:2]]
        made = synthesize(two, sigma_rel, step)
        assert len(two) == made.snapshots == 2 * step // EVERY
        found = traverse_util.unflatten_dict(made.weights, sep=".")
        assert (made.note, distance(found, exact) < allowed * apart) == ("", True)
        if sigma_rel == 0.2:
            # Of all widths that are stored.
            assert distance(synthesized_weights(folder, sigma_rel, step)[0], exact) < 0.2 * distance(found, exact)


def test_few_snapshots_are_an_average_with_a_note(tmp_path):
    """Constant weights stay what they are; of Algorithm 3's coefficients the sum is 0.93 here."""
    for step in (350, 700, 1050):
        ema = {0.05: {"w": np.full(2, 3.0)}, 0.1: {"w": np.full(2, 3.0)}}
        write_snapshot(tmp_path, step, step, ema, "float16" if step == 700 else "float32")
    assert np.load(snapshot_path(tmp_path, 700))["sigma_rel=0.05/w"].dtype == np.float16
    made = synthesize(read_snapshots(tmp_path, 1050), 0.15, 1050)
    np.testing.assert_allclose(made.weights["w"], 3, rtol=1e-6)
    assert "deviates by 15 % from the requested one, the closest that 6 snapshots can synthesise" in made.note
    snapshot_path(tmp_path, 700).write_bytes(snapshot_path(tmp_path, 700).read_bytes()[:300])
    with pytest.raises(
        UserError, match=r"step_0000700\.npz is damaged or not a snapshot of s2dm_jax; remove it to have the"
    ):
        read_snapshots(tmp_path, 1050)
    assert [one.step for one in read_snapshots(tmp_path, 699)] == [350, 350]
