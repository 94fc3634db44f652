"""Streams of noise, and the interpolation between noise images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sampler_with_noise
from published import LINEAR, golden_eps

from s2dm_jax.samplers.noise import image_keys, initial_noise, per_image_noise, slerp
from s2dm_jax.samplers.timesteps import uniform_timesteps


def test_an_image_depends_on_its_own_seed_alone():
    shape, timesteps = (4, 4, 3), uniform_timesteps(1000, 5)

    @jax.jit
    def images(seed, indices):
        sampler = sampler_with_noise("ddim", per_image_noise(image_keys(seed, indices), shape))
        return sampler(golden_eps, initial_noise(seed, indices, shape), LINEAR, timesteps)

    together = np.asarray(images(7, np.arange(5)))
    np.testing.assert_allclose(images(7, np.array([4, 1])), together[[4, 1]], atol=1e-6)
    assert np.abs(images(8, np.array([4, 1])) - together[[4, 1]]).max() > 0.1
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_noise_streams_are_disjoint_and_standard_normal():
    shape, indices = (8, 8, 3), jnp.arange(32)

    @jax.jit
    def draw(seed):
        keys = image_keys(seed, indices)
        steps = jax.lax.map(per_image_noise(keys, shape), jnp.arange(4))
        draws = jnp.concatenate([initial_noise(seed, indices, shape)[None], steps])
        from_step_keys = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        training = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(seed), step))(jnp.arange(100))
        training = jax.vmap(lambda key: jax.vmap(lambda k: jax.random.fold_in(key, k))(indices))(training)
        return draws, from_step_keys, jax.random.key_data(keys), jax.random.key_data(training)

    draws, from_step_keys, sampling_keys, training_keys = map(np.asarray, draw(3))
    images = draws.reshape(len(draws) * len(indices), -1)
    correlation = images @ images.T / images.shape[1] - np.eye(len(images))
    assert np.abs(correlation).max() < 0.5
    assert abs(draws.mean()) < 0.03
    assert draws.std() == pytest.approx(1, abs=0.03)
    # The keys that steps are folded into are not drawn from, for x_T least of all.
    assert np.abs(draws[0] - from_step_keys).min(axis=0).max() > 0.1
    # Training folds its step and then other numbers into its seed: sampling with it meets none of these keys.
    assert not (sampling_keys[:, None, None] == training_keys).all(-1).any()


def test_slerp_runs_along_the_great_circle():
    x_a, x_b = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 3), np.float32)

    def norm(x):
        return np.sqrt((x**2).sum((-3, -2, -1)))

    def angle(a, b):
        return np.arccos((a * b).sum((-3, -2, -1)) / norm(a) / norm(b))

    # Equal norms are preserved, and the angle is shared in proportion.
    x_b *= (norm(x_a) / norm(x_b))[:, None, None, None]
    between = np.asarray(jax.jit(slerp)(x_a, x_b, np.linspace(0, 1, 5, dtype=np.float32)[:, None]))
    assert between.shape == (5, 3, 8, 8, 3)
    np.testing.assert_array_equal(between[0], x_a)
    np.testing.assert_array_equal(between[-1], x_b)
    np.testing.assert_allclose(norm(between), np.tile(norm(x_a), (5, 1)), rtol=1e-5)
    np.testing.assert_allclose(angle(x_a, between[1]), angle(x_a, x_b) / 4, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(slerp)(x_a, x_a, 0.3), x_a, rtol=1e-5)


def test_another_generator_in_the_environment_changes_no_noise():
    expected = np.asarray(initial_noise(3, np.arange(2), (4, 4, 1)))
    keys = jax.random.key_data(image_keys(3, np.arange(2)))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(initial_noise(3, np.arange(2), (4, 4, 1)), expected)
        np.testing.assert_array_equal(jax.random.key_data(image_keys(3, np.arange(2))), keys)
