"""What timestep_spacing="auto" promises: at equal NFE no sampler is further from the exact solution than DDIM."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import load_file
from published import LINEAR

from s2dm_jax.diffusion.schedule import cosine_schedule
from s2dm_jax.samplers.analytic import analytic, cov_x0
from s2dm_jax.samplers.ddim import ddpm
from s2dm_jax.samplers.noise import image_keys, per_image_noise
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


def perfect_cov_x0(eps_fn, x0):
    """cov(x_0 | x_t) at each timestep, [T], from the mean square of the perfect ε on data x0."""
    signal, sigma = (np.sqrt(each)[:, None, None, None, None] for each in (LINEAR.alpha_bar, 1 - LINEAR.alpha_bar))
    x = signal * x0 + sigma * np.random.default_rng(0).standard_normal((LINEAR.T, *x0.shape))
    eps = eps_fn(x.reshape(-1, *x0.shape[1:]), np.repeat(np.arange(LINEAR.T, dtype=float), len(x0)))
    return cov_x0(LINEAR, np.mean(np.asarray(eps).reshape(LINEAR.T, -1) ** 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("index", "has_modes"), [(0, True), (1, False)])
def test_the_optimal_variance_is_not_worse_than_ddpms_at_its_default_spacing(index, has_modes):
    """Samplers that draw noise, among themselves, by the quantiles of their samples."""
    with jax.enable_x64(True):
        x_T, exact = (array[..., [index]] for array in spacings.exact_solution())

        def eps_fn(x, t):
            return spacings.perfect_eps(LINEAR, x, t)[..., [index]]

        noise_fn = per_image_noise(image_keys(0, np.arange(len(x_T))), x_T.shape[1:], np.float64)
        cov = perfect_cov_x0(eps_fn, exact)
        runs = {
            "ddpm": jax.jit(lambda x, t: ddpm(eps_fn, x, LINEAR, t, noise_fn=noise_fn)),
            "analytic": jax.jit(lambda x, t: analytic(eps_fn, x, LINEAR, t, cov_x0=cov, noise_fn=noise_fn)),
        }
        for nfe in spacings.NFE:
            errors = {}
            for name, run in runs.items():
                timesteps = plan_timesteps(1000, name, TimestepSpec(nfe=nfe), log_snr=LINEAR.log_snr)
                # The two modes get as many samples as chance will have it.
                x, expected = (np.sort(abs(y) if has_modes else y, 0) for y in (np.asarray(run(x_T, timesteps)), exact))
                errors[name] = np.sqrt(np.mean((x - expected) ** 2))
            assert errors["analytic"] <= errors["ddpm"], (nfe, errors)


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
