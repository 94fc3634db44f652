"""Noise schedules between the timesteps."""

import jax.numpy as jnp
import numpy as np
from published import LINEAR

from s2dm_jax.diffusion.schedule import log_alpha_bar


def test_log_alpha_bar_between_timesteps():
    t = jnp.array([-1.0, 0.0, 41.5, 999.0])
    table = np.log(LINEAR.alpha_bar)
    expected = [0, table[0], (table[41] + table[42]) / 2, table[999]]
    np.testing.assert_allclose(log_alpha_bar(LINEAR, t), expected, rtol=1e-6)
