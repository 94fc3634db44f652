"""F- and S-PNDM against the published code in both conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from published import LINEAR, golden_eps, sample_golden

from s2dm_jax.samplers.pndm import f_pndm, s_pndm
from s2dm_jax.samplers.specs import nfe_of

PNDM = {"F-PNDM": f_pndm, "S-PNDM": s_pndm}


def pndm_step_by_step(method, x, alpha_bar, timesteps):
    """PNDM as a plain loop in NumPy; `alpha_bar[⌊t⌋ + 1]` belongs to timestep t, as in the released code."""

    def phi(x, e, t, s):
        a, b = alpha_bar[int(t) + 1], alpha_bar[int(s) + 1]
        root = np.sqrt(a) * (np.sqrt((1 - b) * a) + np.sqrt((1 - a) * b))
        return x + (b - a) * (x / (np.sqrt(a) * (np.sqrt(a) + np.sqrt(b))) - e / root)

    def f(x, t):
        return golden_eps(x, np.full(len(x), t, np.float64))

    history = []
    for t, s in zip(timesteps[::-1], [*timesteps[-2::-1], -1], strict=True):
        e1 = f(x, t)
        history.append(e1)
        if method == "S-PNDM":
            first = len(history) == 1
            e = (e1 + f(phi(x, e1, t, s), s)) / 2 if first else (3 * e1 - history[-2]) / 2
        elif len(history) < 4:
            mid = (t + s) / 2
            e2 = f(phi(x, e1, t, mid), mid)
            e3 = f(phi(x, e2, t, mid), mid)
            e = (e1 + 2 * e2 + 2 * e3 + f(phi(x, e3, t, s), s)) / 6
        else:
            e = (55 * e1 - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24
        x = phi(x, e, t, s)
    return x


@pytest.mark.parametrize("case", ["F-PNDM_10", "F-PNDM_50", "S-PNDM_10"])
def test_pndm_matches_published_steps(golden, case, precision):
    """What the golden file holds is the corrected convention: the released step functions were fed an
    alpha_bar that starts with the clean image's 1, an entry that the release's own table has not."""
    dtype, rtol = precision
    arrays = golden("pndm.npz")
    method, steps = case.split("_")
    x = sample_golden(PNDM[method], arrays["x_T"], arrays[f"{case}/seq"], dtype)
    assert x.dtype == dtype
    assert_close(x, arrays[f"{case}/x"], rtol)
    assert nfe_of(method.lower().replace("-", "_"), int(steps)) == arrays[f"{case}/nfe"]


@pytest.mark.parametrize("method", ["F-PNDM", "S-PNDM"])
def test_pndm_in_the_published_convention(golden, method):
    """The same loop that reproduces the golden file, on the release's own table, with half-way timesteps."""
    arrays = golden("pndm.npz")
    published = arrays[f"{method}_10/seq"].tolist()
    loop = pndm_step_by_step(method, arrays["x_T"], LINEAR.alpha_bar_with_x0, published)
    assert_close(loop, arrays[f"{method}_10/x"], 1e-12)

    timesteps = list(range(0, 1000, 125))
    expected = pndm_step_by_step(method, arrays["x_T"], LINEAR.alpha_bar, timesteps)
    with jax.enable_x64(True):
        x = sample_golden(PNDM[method], arrays["x_T"], timesteps, "float64", pndm_convention="published")
    assert_close(x, expected, 1e-9)


@pytest.mark.parametrize(
    ("sampler", "timesteps", "options", "message"),
    [
        (f_pndm, [0, 250, 500], {}, "steps=3 is too few for f_pndm: it needs at least 4"),
        (s_pndm, [0], {}, "it needs at least 2"),
        (s_pndm, [0, 500], {"pndm_convention": "torch"}, "pndm_convention='torch' is not allowed"),
        (s_pndm, [0, 999], {"pndm_convention": "published"}, "must end below T−1=999"),
    ],
)
def test_bad_input_is_refused(sampler, timesteps, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(golden_eps, jnp.zeros((1, 2, 2, 1)), LINEAR, timesteps, **options)


def test_traced_timesteps_that_must_contain_the_last_are_refused():
    def run(timesteps):
        return f_pndm(golden_eps, jnp.zeros((1, 2, 2, 1)), LINEAR, timesteps, pndm_convention="published")

    with pytest.raises(ValueError, match="must end below T−1=999"):
        jax.eval_shape(run, np.arange(1000))
