"""Samplers against the published code's results, closed-form solutions and their own promises."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2dm_jax.samplers import ddim, ddpm
from s2dm_jax.schedule import linear_schedule

GOLDEN = Path(__file__).parent / "golden"
SCHEDULE = linear_schedule()


def golden(name):
    """The arrays of a golden file; images come as PyTorch's NCHW and leave as NHWC."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {
            key: np.moveaxis(array, -3, -1) if array.ndim >= 4 else array for key, array in arrays.items()
        }


def golden_eps(x, t):
    """The closed-form network that the golden files were made with."""
    u = t.astype(x.dtype)[:, None, None, None] + 1
    a = jnp.exp(-(1e-4 * u + 0.5 * (0.02 - 1e-4) / 1000 * u**2))
    return jnp.sqrt(1 - a) * (x - 0.2 * jnp.sqrt(a)) / (0.09 * a + 1 - a) + 0.05 * jnp.sin(3 * x)


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """dtype and relative tolerance, with 64-bit arithmetic enabled only where it is asked for."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param, {"float64": 1e-5, "float32": 1e-3}[request.param]


def sample(sampler, x_T, timesteps, dtype, **options):
    """One compiled run of a sampler on the golden network and schedule."""
    run = jax.jit(lambda x_T: sampler(golden_eps, x_T, SCHEDULE, timesteps, **options))
    return run(jnp.asarray(x_T, dtype))


def injected(noise, dtype):
    noise = jnp.asarray(noise, dtype)
    return lambda step: noise[step]


def assert_close(actual, expected, rtol):
    # Relative to the largest value: a pixel near 0 has no relative precision of its own.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    "case",
    ["uniform_10_eta0.0", "uniform_50_eta0.0", "quad_20_eta0.0", "uniform_20_eta0.5", "uniform_10_eta1.0"],
)
def test_ddim_matches_published_code(case, precision):
    dtype, rtol = precision
    arrays = golden("ddim")
    noise = arrays.get(f"{case}/noise")
    x, x0 = sample(
        ddim,
        arrays["x_T"],
        arrays[f"{case}/seq"],
        dtype,
        eta=float(case.split("eta")[1]),
        noise_fn=None if noise is None else injected(noise, dtype),
        return_x0=True,
    )
    assert x.dtype == dtype
    assert_close(x, arrays[f"{case}/x"], rtol)
    assert_close(x0[0], arrays[f"{case}/x0_first"], rtol)
    np.testing.assert_array_equal(x0[-1], x)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_matches_published_code(steps, precision):
    dtype, rtol = precision
    arrays = golden("ddpm")
    x = sample(
        ddpm,
        arrays["x_T"],
        arrays[f"{steps}/seq"],
        dtype,
        noise_fn=injected(arrays[f"{steps}/noise"], dtype),
    )
    assert x.dtype == dtype
    assert_close(x, arrays[f"{steps}/x"], rtol)
