"""Variance heads and Analytic-DPM's statistic: what they estimate, and whose statistic is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, FunctionNetwork

from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.inference import noise_statistics
from s2dm_jax.models import variance_head

SCHEDULE = linear_schedule(50, 1e-3, 0.2)
PARAMS = TINY.init(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)


def test_variance_head_reads_the_features_that_noise_is_read_from():
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 40])
    # With the weights of the network's last layers, the variance head must give their output, ε̂.
    own = {"norm_out2": PARAMS["norm_out"], "conv_out2": PARAMS["conv_out"]}
    eps, head = variance_head.apply(TINY, PARAMS, own, SCHEDULE, x, t)
    np.testing.assert_allclose(eps, TINY.apply(PARAMS, x, t), rtol=1e-6)
    np.testing.assert_array_equal(head, eps)
    assert jax.tree.map(jnp.shape, variance_head.init_params(TINY, 0)) == jax.tree.map(jnp.shape, own)


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_only_the_variance_head_has_a_gradient(kind):
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 40])

    def loss(params, head_params):
        eps_hat, head = variance_head.apply(TINY, params, head_params, SCHEDULE, x, t)
        return variance_head.loss(kind, x, eps_hat, head).mean()

    network, head = jax.jit(jax.grad(loss, (0, 1)))(PARAMS, variance_head.init_params(TINY, 0))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(network))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(head))


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_the_best_head_is_the_conditional_mean(kind):
    rng = np.random.default_rng(1)
    eps_hat = rng.standard_normal((1, 4, 4, 1))
    # Given x_t, ε is spread around some mean of its own: the loss is least at the mean of its target.
    eps = 0.3 + eps_hat + 0.7 * rng.standard_normal((50_000, 4, 4, 1))
    best = np.mean(eps**2 if kind == "sn" else (eps - eps_hat) ** 2, axis=0, keepdims=True)
    expected = (0.3 + eps_hat) ** 2 + 0.49 if kind == "sn" else np.full_like(eps_hat, 0.09 + 0.49)
    np.testing.assert_allclose(best, expected, rtol=0.05, atol=0.02)
    slope = jax.grad(lambda head: variance_head.loss(kind, eps, eps_hat, head).mean())(jnp.asarray(best))
    np.testing.assert_allclose(slope, 0, atol=2e-3)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ms_eps")
    return folder, noise_statistics.estimate_noise_statistics(
        TINY, SCHEDULE, PARAMS, IMAGES, folder, num_images=8, batch_size=8
    )


def test_statistic_is_the_mean_square_of_the_predicted_noise(estimated, monkeypatch):
    folder, statistic = estimated
    assert statistic.num_images == 8
    assert statistic.ms_eps.shape == statistic.standard_error.shape == (50,)
    kept = noise_statistics.load_cached(SCHEDULE, PARAMS, folder)
    np.testing.assert_array_equal(kept.ms_eps, statistic.ms_eps)
    assert noise_statistics.load_cached(SCHEDULE, PARAMS, folder, num_images=9) is None
    monkeypatch.setattr(noise_statistics, "_squares", None)
    again = noise_statistics.estimate_noise_statistics(TINY, SCHEDULE, PARAMS, IMAGES, folder, num_images=8)
    np.testing.assert_array_equal(again.ms_eps, statistic.ms_eps)


def test_statistic_of_a_network_that_says_what_it_sees(tmp_path):
    """ε̂ = x_t: E‖x_t‖²/dim is ᾱ·mean(x_0²) + 1 − ᾱ, to within a few of the standard errors reported."""
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), np.uint8)
    network = FunctionNetwork(lambda params, x, t: x)
    statistic = noise_statistics.estimate_noise_statistics(
        network, SCHEDULE, {"w": np.ones(1)}, images, tmp_path, num_images=400
    )
    ab = SCHEDULE.alpha_bar
    expected = ab * np.square(images / 127.5 - 1).mean() + 1 - ab
    z = (statistic.ms_eps - expected) / statistic.standard_error
    assert np.abs(z).max() < 5
    assert 0.5 < np.sqrt(np.mean(z**2)) < 2


def test_an_interrupted_estimate_goes_on_and_no_batch_matters(estimated, tmp_path, monkeypatch):
    _, expected = estimated
    squares, calls = noise_statistics._squares, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return squares(*arguments)

    monkeypatch.setattr(noise_statistics, "_squares", interrupted)
    how = {"num_images": 8, "batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        noise_statistics.estimate_noise_statistics(TINY, SCHEDULE, PARAMS, IMAGES, tmp_path, num_images=8, batch_size=8)
    assert noise_statistics.load_cached(SCHEDULE, PARAMS, tmp_path) is None
    monkeypatch.setattr(noise_statistics, "_squares", squares)
    resumed = noise_statistics.estimate_noise_statistics(TINY, SCHEDULE, PARAMS, IMAGES, tmp_path, **how)
    np.testing.assert_allclose(resumed.ms_eps, expected.ms_eps, rtol=1e-5)
    np.testing.assert_allclose(resumed.standard_error, expected.standard_error, rtol=1e-4)


def test_statistic_of_other_weights_or_a_damaged_file_is_not_used(estimated, tmp_path):
    folder, _ = estimated
    assert noise_statistics.load_cached(SCHEDULE, jax.tree.map(lambda p: p * 1.001, PARAMS), folder) is None
    assert noise_statistics.load_cached(linear_schedule(50, 1e-3, 0.1), PARAMS, folder) is None
    (file,) = folder.glob("*.npz")
    (tmp_path / file.name).write_bytes(file.read_bytes()[:-100])
    assert noise_statistics.load_cached(SCHEDULE, PARAMS, tmp_path) is None
