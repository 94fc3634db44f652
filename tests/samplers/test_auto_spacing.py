"""What timestep_spacing="auto" promises: at equal NFE no sampler is further from the exact solution than DDIM."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import load_file
from published import LINEAR

from s2dm_jax.diffusion.schedule import cosine_schedule
from s2dm_jax.samplers.specs import SAMPLERS
from s2dm_jax.samplers.timesteps import TimestepSpec, auto_spacing, plan_timesteps, quadratic_timesteps

COSINE = cosine_schedule()
spacings = load_file(Path(__file__).parents[2] / "scripts" / "compare_spacings.py")

# Below these NFE a start-up of lower order, or one that costs evaluations, leaves a sampler above DDIM.
FEWEST = {"s_pndm": 8, "f_pndm": 20, "dpmpp_3m": 8, "heun": 20}
SOLVERS = [name for name, spec in SAMPLERS.items() if not (spec.requires or spec.stochastic or name == "ddim")]


def compare(sampler, nfe):
    if nfe >= FEWEST.get(sampler, 0):
        with jax.enable_x64(True):
            found, ddim = (
                spacings.rms_errors(LINEAR, name, spacings.nearest_nfe(name, nfe)) for name in (sampler, "ddim")
            )
        for data, error in found.items():
            assert error <= ddim[data], (data, nfe)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_no_solver_is_worse_than_ddim_at_its_default_spacing(sampler):
    compare(sampler, 8)
    compare(sampler, 20)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("nfe", [5, 10, 15, 30, 50, 100])
def test_no_solver_is_worse_than_ddim_at_any_nfe(sampler, nfe):
    compare(sampler, nfe)


def test_uniform_timesteps_would_break_that_promise():
    with jax.enable_x64(True):
        found, ddim = (spacings.rms_errors(LINEAR, name, 20, "uniform") for name in ("unipc", "ddim"))
    assert found["two modes"] > 3 * ddim["two modes"]


def test_the_default_is_the_samplers_own_spacing():
    np.testing.assert_array_equal(plan_timesteps(1000, "ddim", TimestepSpec()), quadratic_timesteps(1000, 10))
    assert auto_spacing("unipc", LINEAR.log_snr) == auto_spacing("unipc") == "truncated_logsnr"
    # The cosine schedule has a tenth of the image's variance left where quadratic timesteps begin.
    assert [auto_spacing(name, COSINE.log_snr) for name in ("ddim", "deis")] == ["uniform", "truncated_logsnr"]


def test_truncated_log_snr_begins_where_little_of_the_image_is_left():
    for schedule, last in ((LINEAR, 794), (COSINE, 972)):
        timesteps = plan_timesteps(
            1000, "unipc", TimestepSpec(steps=10, timestep_spacing="truncated_logsnr"), log_snr=schedule.log_snr
        )
        assert (timesteps[0], timesteps[-1]) == (0, last)
        assert np.std(np.diff(schedule.log_snr[timesteps])) < 0.1
