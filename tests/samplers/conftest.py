"""What the tests of samplers share."""

import jax
import pytest


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """dtype and relative tolerance, with 64-bit arithmetic enabled for float64 alone."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param, {"float64": 1e-5, "float32": 1e-3}[request.param]
