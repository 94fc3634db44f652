"""Spacings of timesteps, lists of them, and what a `TimestepSpec` stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import LINEAR, golden_eps

from s2dm_jax.diffusion.schedule import cosine_schedule, linear_schedule
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.guards import MIN_LOG_SNR
from s2dm_jax.samplers.timesteps import (
    LOG_SNR_SPACINGS,
    SPACING_FUNCTIONS,
    TimestepSpec,
    check_timesteps,
    karras_timesteps,
    log_snr_timesteps,
    plan_timesteps,
    quadratic_timesteps,
    split_timestep_spec,
    trailing_timesteps,
)


@pytest.mark.parametrize("schedule", [LINEAR, cosine_schedule(), linear_schedule(50)])
@pytest.mark.parametrize("name", [*SPACING_FUNCTIONS, *LOG_SNR_SPACINGS])
def test_spacings_have_exactly_the_requested_steps(name, schedule):
    # The cosine schedule's last timesteps, and those of a short one, have no signal to divide by.
    T, visitable = schedule.T, np.count_nonzero(schedule.log_snr >= MIN_LOG_SNR)

    def spaced(steps):
        return plan_timesteps(T, "ddim", TimestepSpec(steps, timestep_spacing=name), log_snr=schedule.log_snr)

    for steps in range(1 + (name == "linspace"), visitable + 1):
        timesteps = spaced(steps)
        assert (len(timesteps), timesteps.dtype) == (steps, np.int32)
        np.testing.assert_array_equal(check_timesteps(T, timesteps), timesteps)
    np.testing.assert_array_equal(timesteps, np.arange(visitable))
    if visitable < T:
        with pytest.raises(
            ValueError, match=rf"min_log_snr=-5.1 or more is timestep {visitable - 1}, and ddim divides"
        ):
            spaced(visitable + 1)
    with pytest.raises(ValueError, match=f"steps={T + 1} is out of range"):
        spaced(T + 1)


def test_quadratic_spacing_is_the_published_one_until_that_repeats_a_timestep():
    for steps in range(1, 30):
        published = (np.linspace(0, np.sqrt(800), steps) ** 2).astype(int)
        np.testing.assert_array_equal(quadratic_timesteps(1000, steps), published)
    # ⌊linspace(0, √800, 30)²⌋ begins with 0, 0, 3, 8.
    assert quadratic_timesteps(1000, 30)[:5].tolist() == [0, 1, 3, 8, 15]
    # Beyond 0.8·T they move only where there are too few below.
    assert quadratic_timesteps(1000, 700)[-1] == 800


def test_timesteps_are_equally_spaced_in_the_signal_to_noise_ratio():
    log_snr = LINEAR.log_snr
    for function, values in ((log_snr_timesteps, log_snr), (karras_timesteps, np.exp(-log_snr / 7))):
        timesteps = function(log_snr, 10)
        nearest = np.abs(values[:, None] - np.linspace(values[0], values[-1], 10)).argmin(0)
        assert (timesteps[0], timesteps[-1]) == (0, 999)
        assert np.abs(timesteps - nearest).max() <= 1
        assert function(log_snr, 1).tolist() == [999]


def test_trailing_timesteps_end_at_the_noisiest():
    assert trailing_timesteps(1000, 4).tolist() == [249, 499, 749, 999]
    assert trailing_timesteps(1000, 3).tolist() == [332, 666, 999]


def test_log_snr_is_half_the_log_of_the_ratio():
    alpha_bar = LINEAR.alpha_bar
    np.testing.assert_allclose(LINEAR.log_snr, np.log(alpha_bar / (1 - alpha_bar)) / 2, rtol=1e-9)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([0, 500, 400], "not in ascending order"),
        ([0, 0, 400], "not in ascending order"),
        ([-1, 400], "from -1 to 400; T=1000 allows 0 to 999"),
        ([0, 1000], "from 0 to 1000"),
        ([0.5, 10], "not integers"),
        ([], "steps=0 is out of range"),
        ([[0, 10]], "has shape"),
        (range(1001), "steps=1001 is out of range"),
    ],
)
def test_bad_timesteps_are_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        ddim(golden_eps, jnp.zeros((1, 2, 2, 1)), LINEAR, timesteps)


def test_traced_timesteps_of_a_bad_shape_are_refused():
    def run(timesteps):
        return ddim(golden_eps, jnp.zeros((1, 2, 2, 1)), LINEAR, timesteps)

    with pytest.raises(ValueError, match=r"timesteps has shape \(1001,\)"):
        jax.eval_shape(run, np.arange(1001))


def test_a_spec_is_split_from_a_users_arguments():
    spec, others = split_timestep_spec({"nfe": 13, "eta": 0.5, "timesteps": ()})
    assert (spec, others) == (TimestepSpec(nfe=13), {"eta": 0.5})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (TimestepSpec(), [0, 1000]),
        (TimestepSpec(nfe=13), [0, 88, 355, 800]),
        (TimestepSpec(steps=4, nfe=13, timestep_spacing="uniform"), [0, 250, 500, 750]),
        (TimestepSpec(steps=4, timestep_spacing="linspace"), [0, 333, 666, 999]),
        (TimestepSpec(steps=4, timestep_spacing="optimal"), [0, 250, 500, 750]),
        (TimestepSpec(timesteps=(0, 7, 8, 999)), [0, 7, 8, 999]),
    ],
)
def test_timesteps_of_a_spec(spec, expected):
    # The default is an NFE of 10: 10 steps of DDIM, too few for F-PNDM.
    if spec == TimestepSpec():
        assert len(plan_timesteps(1000, "ddim", spec)) == 10
    else:
        np.testing.assert_array_equal(plan_timesteps(1000, "f_pndm", spec), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TimestepSpec(timestep_spacing="cosine"), "timestep_spacing='cosine' is not one of auto, uniform,"),
        (TimestepSpec(), "nfe=10 is too few for f_pndm"),
        (TimestepSpec(nfe=1010), "nfe=1010 is not possible: steps=1001 is out of range"),
        (TimestepSpec(steps=5, nfe=13), "nfe=13 contradicts steps=5: 5 steps of f_pndm make 14"),
        (TimestepSpec(nfe=14, timesteps=(0, 1, 2, 3)), "nfe=14 contradicts timesteps: 4 steps of f_pndm"),
        (TimestepSpec(steps=5, timesteps=(0, 1, 2, 3)), "steps=5 contradicts timesteps, which are 4"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        plan_timesteps(1000, "f_pndm", spec)
