"""The parts that samplers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import golden_eps

from s2dm_jax.samplers.common import scale_eps, scan_sampler


def test_scale_eps_multiplies_by_the_factor_of_the_timestep():
    scale = np.linspace(0.5, 1.0, 1000) ** 2
    x = np.random.default_rng(0).standard_normal((4, 2, 2, 1), np.float32)
    t = np.array([0.0, 10.0, 10.5, 999.0], np.float32)
    factor = np.array([scale[0], scale[10], (scale[10] + scale[11]) / 2, scale[999]]).reshape(4, 1, 1, 1)
    scaled = scale_eps(golden_eps, scale)
    np.testing.assert_allclose(scaled(x, t), factor * golden_eps(x, t), rtol=1e-4, atol=1e-6)
    half = scale_eps(lambda x, t: golden_eps(x, t).astype(jnp.bfloat16), scale)
    assert jax.eval_shape(half, x, t).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"scale has shape \(\)"):
        scale_eps(golden_eps, 0.9)


@pytest.mark.parametrize("state", [2.0, (2.0, 10.0)], ids=["x", "x and history"])
def test_scan_sampler_returns_x0_and_the_predictions(state):
    def step(state, factor):
        x, *history = state if isinstance(state, tuple) else (state,)
        x_next = factor * x
        return (x_next, *history) if history else x_next, x + 1

    factors = jnp.array([3.0, 5.0])
    assert scan_sampler(step, state, factors, return_x0=False) == 30
    x_0, predictions = scan_sampler(step, state, factors, return_x0=True)
    assert x_0 == 30
    np.testing.assert_array_equal(predictions, [3, 7])
