"""What the objectives do to a network, in numbers: the closed forms and tables of docs/objectives.md."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.objectives import PRESETS, NoiseSample
from s2dm_jax.diffusion.schedule import linear_schedule

SCHEDULE = linear_schedule()
PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()


def sequence_optimum(preset, K, lam, variance=0.25):
    """a_t of the linear f = a_t·x_t that minimises L_simple + λ·L_sa over all t on Gaussian pixels, and the plain a_t.

    A residual has a_t·√ᾱ_t of x_0, which a window shares, and a_t·√(1−ᾱ_t) − 1 of its own noise. float64 [T] each.
    """
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    plain = noise / (variance * alpha_bar + noise**2)
    rows, targets = [], []
    sigma, weight = np.sqrt(variance), np.sqrt(lam) / K
    for t in range(1000):
        window = range(t, t + K) if preset == "paper" else range(t, t - K, -1)
        counted = [s for s in window if s in (range(1, 1000) if preset == "paper" else range(1000))]
        # Residuals that must be 0: those of L_simple at t, then of L_sa; what is of x_0 adds up, what is of ε does not.
        rows += [{t: signal[t] * sigma}, {t: noise[t]}, {s: weight * signal[s] * sigma for s in counted}]
        targets += [0.0, 1.0, 0.0]
        rows += [{s: weight * noise[s]} for s in counted]
        targets += [weight] * len(counted)
    normal, right = np.zeros((1000, 1000)), np.zeros(1000)
    for row, target in zip(rows, targets, strict=True):
        at, values = list(row), np.array(list(row.values()))
        normal[np.ix_(at, at)] += np.outer(values, values)
        right[at] += values * target
    return np.linalg.solve(normal, right), plain


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize(("K", "lam"), [(2, 1.0), (2, 0.1), (3, 0.3), (4, 0.2)])
def test_sequence_aware_optimum_on_gaussian_data(preset, K, lam):
    optimum, plain = sequence_optimum(preset, K, lam)
    (row,) = re.findall(rf"\| {preset} \| {K} \| {lam:g} \| \S+ \|(.*)\|", PAGE)
    printed = [float(cell) for cell in row.split("|")]
    timesteps = (0, 1, 2, 20, 100, 200, 400, 700, 999)
    np.testing.assert_allclose((optimum / plain)[list(timesteps)], printed, atol=5.1e-4)
    # Each sign of x_0 with each of the noises: their second moments are those of independent Gaussians.
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=K + 1)), np.float32)
    x0, noise = (np.tile(part, (1000, 1))[..., None, None] for part in (0.5 * signs[:, :1], signs[:, 1:]))
    t = np.repeat(np.arange(1000), len(signs))
    sample = NoiseSample(jnp.asarray(t), jnp.asarray(noise[..., None]), None)
    objective = PRESETS[preset](K=K, lam=lam)

    def mean_loss(a):
        def eps_fn(x, t):
            return a[t][:, None, None, None] * x

        return objectives.loss(eps_fn, SCHEDULE, objective, jnp.asarray(x0), sample)[0].sum() / len(signs)

    gradient = jax.jit(jax.grad(mean_loss))
    assert np.abs(gradient(jnp.asarray(optimum, jnp.float32))).max() < 2e-5
    assert np.abs(gradient(jnp.asarray(plain, jnp.float32))).max() > 1e-2


def test_claims_of_s2_about_sizes():
    """The factors that eq. 10 takes for equal, and the size of L_skip, as docs/objectives.md prints them."""
    alpha = 1 - np.linspace(1e-4, 0.02, 1000)
    t = np.arange(1000)
    for skip in (2, 10, 50):
        row = re.search(rf"^\| {skip} \| (.*) \|$", PAGE, re.MULTILINE)[1].split(" | ")
        last = [np.prod(alpha[1000 - skip :]), alpha[999]]
        np.testing.assert_allclose([float(cell) for cell in row[:2]], np.sqrt(last), atol=5.1e-4)
        for preset, factors, cell in (("paper", skip, row[2]), ("released", skip - 1, row[3])):
            a = np.array([np.prod(alpha[max(i - factors + 1, 0) : i + 1]) for i in t])
            c = np.sqrt((1 - a) / a)
            np.testing.assert_allclose(objectives.skip_ratio(SCHEDULE, PRESETS[preset](skip=skip)), c, rtol=1e-6)
            # A perfect network's f is ε: (ε − cε)² with the same noise, 1 + c² with a second one.
            exact = ((1 - c) ** 2 if preset == "paper" else 1 + c**2).mean()
            assert abs(float(cell) - exact) < 5.1e-3
