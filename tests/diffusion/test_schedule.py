"""Noise schedules: their betas for any T, and what is between the timesteps."""

import jax.numpy as jnp
import numpy as np
import pytest
from published import LINEAR

from s2dm_jax.diffusion.betas import BETAS, ScheduleSpec, schedule_betas
from s2dm_jax.diffusion.schedule import SCHEDULES, linear_schedule, log_alpha_bar


def test_log_alpha_bar_between_timesteps():
    t = jnp.array([-1.0, 0.0, 41.5, 999.0])
    table = np.log(LINEAR.alpha_bar)
    expected = [0, table[0], (table[41] + table[42]) / 2, table[999]]
    np.testing.assert_allclose(log_alpha_bar(LINEAR, t), expected, rtol=1e-6)


def test_betas_of_1000_timesteps_are_the_published_ones_to_the_bit():
    published = {
        "linear": np.linspace(1e-4, 0.02, 1000),
        "quadratic": np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2,
        "const": np.full(1000, 0.02),
        "sigmoid": 1e-4 + (0.02 - 1e-4) / (1 + np.exp(-np.linspace(-6, 6, 1000))),
    }
    for name, betas in published.items():
        np.testing.assert_array_equal(SCHEDULES[name]().beta, betas)
    assert list(SCHEDULES) == list(BETAS)


@pytest.mark.parametrize("name", BETAS)
def test_a_schedule_ends_in_noise_at_any_T(name):
    for T in (25, 100, 4000):
        assert SCHEDULES[name](T).alpha_bar[-1] < 1e-3
    # As the improved-DDPM code: scaled by 1000/T. What is given is taken as it is.
    if name != "cosine":
        assert SCHEDULES[name](100).beta[-1] == pytest.approx(10 * SCHEDULES[name]().beta[-1])
        assert SCHEDULES[name](100, beta_end=0.3).beta[-1] == pytest.approx(0.3, rel=0.01)
    np.testing.assert_array_equal(linear_schedule(100, 1e-4, 0.02).beta, np.linspace(1e-4, 0.02, 100))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            ScheduleSpec("linear", 20),
            "T=20 is too small for the linear schedule: beta_end, 0.02 scaled by 1000/T, is 1",
        ),
        (ScheduleSpec("linear", 20), "give a T of at least 21, or set beta_end"),
        (ScheduleSpec("cosine", 1000, None, 0.02), "beta_end=0.02 is not a field of the cosine schedule"),
        (ScheduleSpec("const", 1000, 1e-4), "beta_start=0.0001 is not a field of the const schedule"),
        (ScheduleSpec("linear", 1000, 0.03), "beta_start=0.03 is above beta_end=0.02"),
        (ScheduleSpec("linear", 1000, None, 1.5), "beta_end=1.5 is out of range"),
        (ScheduleSpec("log"), "schedule='log' is not one of linear, cosine"),
    ],
)
def test_betas_that_are_impossible_are_refused(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedule_betas(spec)
