"""The order of convergence of every deterministic sampler, and DEIS of order 1 against DDIM's goldens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from published import LINEAR, golden_eps, sample_golden

from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.heun import heun
from s2dm_jax.samplers.multistep import deis, dpmpp_2m, dpmpp_3m, unipc
from s2dm_jax.samplers.pndm import f_pndm, s_pndm
from s2dm_jax.samplers.timesteps import uniform_timesteps

# Gaussian data of this mean and deviation, on a schedule so fine that all timesteps below are exact.
MEAN, STD, FINE = 0.2, 0.3, linear_schedule(2**14, 1e-4 * 1000 / 2**14, 2e-2 * 1000 / 2**14)


def gaussian_eps(schedule, x, t):
    """The noise expected in x for Gaussian data; alpha_bar between integer timesteps as documented."""
    u = t.astype(x.dtype)[:, None, None, None] + 1
    log_ab = jnp.asarray(schedule.log_alpha_bar_with_x0, x.dtype)
    below = u.astype(int)
    above = jnp.minimum(below + 1, schedule.T)
    a = jnp.exp(log_ab[below] + (u - below) * (log_ab[above] - log_ab[below]))
    return jnp.sqrt(1 - a) * (x - MEAN * jnp.sqrt(a)) / (STD**2 * a + 1 - a)


def exact_flow(x, t, t_next):
    """The probability-flow ODE's solution: (x − mean)/deviation of the marginal is constant."""
    a, a_next = FINE.alpha_bar_with_x0[t + 1], FINE.alpha_bar_with_x0[t_next + 1]
    z = (x - MEAN * np.sqrt(a)) / np.sqrt(STD**2 * a + 1 - a)
    return MEAN * np.sqrt(a_next) + z * np.sqrt(STD**2 * a_next + 1 - a_next)


@pytest.mark.parametrize(
    ("sampler", "order", "ends_at_clean"),
    [
        (ddim, 1, True),
        (s_pndm, 2, True),
        (f_pndm, 2, True),
        (dpmpp_2m, 2, True),
        (heun, 2, True),
        (dpmpp_3m, 3, False),
        (functools.partial(deis, order=2), 2, False),
        (functools.partial(deis, order=3), 3, False),
        (unipc, 3, False),
    ],
)
def test_convergence_order_on_gaussian_data(sampler, order, ends_at_clean):
    """Error against the exact ODE when the step in √t halves; trajectories are smooth in it down to t = 0.

    With the clean end all timesteps are refined together, and the error is that of x_0. A solver whose last
    step is DDIM's has order 2 there at most, so higher orders are measured above a lowest timestep that is
    fixed: the expected result is then the prediction of x_0 at the exact solution there.
    """
    x_T = np.array([-1.5, -0.3, 0.7, 2.0]).reshape(1, 2, 2, 1)
    errors = []
    with jax.enable_x64(True):
        for steps in (64, 128):
            if ends_at_clean:
                timesteps = FINE.T * np.arange(1, steps + 1) ** 2 // steps**2 - 1
                expected = exact_flow(x_T, FINE.T - 1, -1)
            else:
                roots = np.linspace(np.sqrt(FINE.T / 64), np.sqrt(FINE.T), steps)
                timesteps = np.round(roots**2).astype(int) - 1
                x = exact_flow(x_T, FINE.T - 1, timesteps[0])
                a = FINE.alpha_bar[timesteps[0]]
                eps = np.sqrt(1 - a) * (x - MEAN * np.sqrt(a)) / (STD**2 * a + 1 - a)
                expected = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
            run = jax.jit(lambda x, t: sampler(functools.partial(gaussian_eps, FINE), x, FINE, t))
            errors.append(np.abs(run(x_T, timesteps) - expected).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_deis_of_order_1_is_ddim(golden):
    arrays = golden("ddim.npz")
    x = sample_golden(deis, arrays["x_T"], uniform_timesteps(1000, 10), "float32", order=1)
    assert_close(x, arrays["uniform_10_eta0.0/x"], 1e-3)


def test_an_order_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="order=4 is not allowed"):
        deis(golden_eps, jnp.zeros((1, 2, 2, 1)), LINEAR, [0, 500], order=4)
