"""Spacings of timesteps, lists of them, and what a `TimestepSpec` stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import LINEAR, golden_eps

from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.timesteps import (
    SPACING_FUNCTIONS,
    TimestepSpec,
    check_timesteps,
    plan_timesteps,
    split_timestep_spec,
)


@pytest.mark.parametrize("name", SPACING_FUNCTIONS)
def test_spacings_have_exactly_the_requested_steps(name):
    for steps in (2, 7, 10, 20):
        timesteps = SPACING_FUNCTIONS[name](1000, steps)
        assert len(timesteps) == steps
        np.testing.assert_array_equal(check_timesteps(1000, timesteps), timesteps)
    with pytest.raises(ValueError, match="steps=1001 is out of range"):
        SPACING_FUNCTIONS[name](1000, 1001)


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
        (TimestepSpec(nfe=13), [0, 250, 500, 750]),
        (TimestepSpec(steps=4, nfe=13), [0, 250, 500, 750]),
        (TimestepSpec(steps=4, timestep_spacing="linspace"), [0, 333, 666, 999]),
        (TimestepSpec(steps=4, timestep_spacing="optimal"), [0, 250, 500, 750]),
        (TimestepSpec(timesteps=(0, 7, 8, 999)), [0, 7, 8, 999]),
    ],
)
def test_timesteps_of_a_spec(spec, expected):
    # The default is an NFE of 10: 10 steps of DDIM, too few for F-PNDM.
    if spec == TimestepSpec():
        np.testing.assert_array_equal(plan_timesteps(1000, "ddim", spec), np.arange(0, 1000, 100))
    else:
        np.testing.assert_array_equal(plan_timesteps(1000, "f_pndm", spec), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TimestepSpec(timestep_spacing="cosine"), "timestep_spacing='cosine' is not one of uniform,"),
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
