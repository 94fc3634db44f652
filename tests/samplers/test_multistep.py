"""The orders of convergence that docs/samplers.md states, and multistep solvers against DDIM and diffusers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, assert_close
from published import LINEAR, golden_eps, sample_golden

from s2dm_jax.diffusion.schedule import NoiseSchedule
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.multistep import deis, dpmpp, unipc
from s2dm_jax.samplers.specs import SAMPLERS, get_sampler
from s2dm_jax.samplers.timesteps import TimestepSpec, plan_timesteps

X_T = np.array([-1.5, -0.3, 0.7, 2.0]).reshape(1, 2, 2, 1)
# Gaussian data of this mean and deviation.
MEAN, STD = 0.2, 0.3


def fine_log_alpha_bar(t):
    """That of the linear schedule of 1000 timesteps, continuous, in steps so short that grids need no rounding."""
    u = 1 + 999 * t / (2**17 - 1)
    return -(1e-4 * u + 0.5 * (0.02 - 1e-4) / 1000 * u**2)


FINE = NoiseSchedule(-np.expm1(np.diff(fine_log_alpha_bar(np.arange(2**17)), prepend=0.0)))


def gaussian_eps(x, t):
    """The noise expected in x for Gaussian data; NumPy in, NumPy out."""
    xp = np if isinstance(x, np.ndarray) else jnp
    a = xp.exp(fine_log_alpha_bar(t.astype(x.dtype)[:, None, None, None]))
    return xp.sqrt(1 - a) * (x - MEAN * xp.sqrt(a)) / (STD**2 * a + 1 - a)


def exact_prediction(x, t):
    """The prediction of x_0 at timestep 0 on the probability-flow ODE's trajectory through x at timestep t, along which
    (x − mean)/deviation of the marginal is constant.
    """
    a, a_0 = np.exp(fine_log_alpha_bar(np.array([t, 0])))
    z = (x - MEAN * np.sqrt(a)) / np.sqrt(STD**2 * a + 1 - a)
    x_0 = MEAN * np.sqrt(a_0) + z * np.sqrt(STD**2 * a_0 + 1 - a_0)
    return (x_0 - np.sqrt(1 - a_0) * gaussian_eps(x_0, np.zeros(1))) / np.sqrt(a_0)


GRIDS = ("uniform", "quadratic", "logsnr", "truncated_logsnr")
DOCS = (ROOT / "docs" / "samplers.md").read_text()
# Of each row of the documentation's table, a sampler with its options, the order on each grid.
ORDERS = {
    row: dict(zip(GRIDS, map(float, orders.split(" | ")), strict=True))
    for row, orders in re.findall(r"^\| `([\w= ]+)` \| (\d\.\d\d(?: \| \d\.\d\d)+) \|$", DOCS, re.MULTILINE)
}


def test_orders_of_all_deterministic_samplers_are_documented():
    assert f"| sampler | {' | '.join(GRIDS)} |" in DOCS
    same = {"dpmpp_2m", "dpmpp_3m"}  # As dpmpp of that order.
    assert {row.split()[0] for row in ORDERS} | same == {name for name in SAMPLERS if not SAMPLERS[name].stochastic}


# Their code is tested by the other rows, and their numbers are compared with those of diffusers below.
SLOW = ("unipc order=1 variant=bh1", "unipc order=3 variant=bh1")


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (row in SLOW)) for row in ORDERS])
def test_convergence_orders_on_gaussian_data(row):
    """log2 of the ratio of errors at 64 and 128 steps. All grids end at the same timestep, and the error does not count
    the DDIM step from there to the clean image: where its end is refined as well, order 2 is the most.
    """
    name, *options = row.split()
    options = {key: int(value) if value.isdigit() else value for key, value in (each.split("=") for each in options)}
    errors = {}
    with jax.enable_x64(True):
        for steps in (64, 128):
            run = jax.jit(
                lambda x, t: get_sampler(name)(gaussian_eps, x, FINE, t, **options),
                # Half of the compilation's time.
                compiler_options={"xla_backend_optimization_level": 0},
            )
            for grid in GRIDS:
                spec = TimestepSpec(steps, timestep_spacing=grid)
                timesteps = plan_timesteps(FINE.T, name, spec, log_snr=FINE.log_snr, **options)
                error = np.abs(run(X_T, timesteps) - exact_prediction(X_T, timesteps[-1])).max()
                errors.setdefault(grid, []).append(error)
    measured = {grid: np.log2(first / second) for grid, (first, second) in errors.items()}
    assert measured == pytest.approx(ORDERS[row], abs=0.02)


TIMESTEPS = [0, 1, 5, 30, 100, 200, 400, 600, 800, 998]
# The last prediction of x_0 from X_T of diffusers 0.42.1 in float64, UniPCMultistepScheduler and
# DPMSolverMultistepScheduler, on the golden network and schedule.
DIFFUSERS = {
    ("unipc", 1, "bh1"): [-0.21440639, 0.12722997, 0.31829591, 0.75137876],
    ("unipc", 1, "bh2"): [-0.24742371, 0.15435161, 0.26635245, 0.7313957],
    ("unipc", 2, "bh1"): [-0.34062224, 0.08795503, 0.41954309, 0.95653356],
    ("unipc", 2, "bh2"): [-0.32104208, 0.13620079, 0.32645852, 0.85466284],
    ("unipc", 3, "bh1"): [-0.31503615, 0.09701977, 0.37651959, 0.90515959],
    ("unipc", 3, "bh2"): [-0.41456158, 0.13248797, 0.30482433, 0.89979911],
    ("dpmpp", 2, None): [-0.25417287, 0.08693038, 0.38776275, 0.83364634],
}


@pytest.fixture(scope="module")
def predictions_of_ddim():
    with jax.enable_x64(True):
        return sample_golden(ddim, X_T, TIMESTEPS, "float64", return_x0=True)[1]


@pytest.mark.parametrize("sampler", [deis, dpmpp])
def test_order_1_is_ddim(sampler, predictions_of_ddim):
    with jax.enable_x64(True):
        _, x0 = sample_golden(sampler, X_T, TIMESTEPS, "float64", order=1, return_x0=True)
    assert_close(x0, predictions_of_ddim, 1e-12)


@pytest.mark.parametrize("sampler", [dpmpp, unipc])
def test_one_step_is_ddim_whatever_the_order(sampler, predictions_of_ddim):
    with jax.enable_x64(True):
        x_0 = sample_golden(sampler, X_T, TIMESTEPS[-1:], "float64", order=3)
    assert_close(x_0, predictions_of_ddim[0], 1e-12)


@pytest.mark.parametrize(("name", "order", "variant"), DIFFUSERS)
def test_the_numbers_of_diffusers_after_ddims_first_step(name, order, variant, predictions_of_ddim):
    options = {"variant": variant} if variant else {}
    with jax.enable_x64(True):
        x, x0 = sample_golden(get_sampler(name), X_T, TIMESTEPS, "float64", order=order, return_x0=True, **options)
    np.testing.assert_allclose(x.ravel(), DIFFUSERS[name, order, variant], atol=1e-7)
    # Without a history the predictor is DDIM, and what it leads to is evaluated before it is corrected.
    assert_close(x0[:2], predictions_of_ddim[:2], 1e-12)


def test_orders_and_variants_that_do_not_exist_are_refused():
    for sampler in (deis, dpmpp, unipc):
        with pytest.raises(ValueError, match="order=4 is not allowed: it must be 1 or 2 or 3"):
            sampler(golden_eps, X_T, LINEAR, [0, 500], order=4)
    with pytest.raises(ValueError, match="variant='bh3' is not allowed: it must be 'bh1' or 'bh2'"):
        unipc(golden_eps, X_T, LINEAR, [0, 500], variant="bh3")
