"""The variational bound: each term against independent formulas, and exact on Gaussian data."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2dm_jax.diffusion import bound
from s2dm_jax.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule
from s2dm_jax.samplers.analytic import optimal_timesteps, step_costs
from s2dm_jax.samplers.timesteps import SPACING_FUNCTIONS

LEVELS = np.arange(256) / 127.5 - 1
# One standard deviation of the first timestep is 25 grey levels: the decoder's bins are fine.
SCHEDULE = NoiseSchedule(np.append(0.04, np.full(999, -np.expm1(-8 / 999))))


def normal_kl(mean1, variance1, mean2, variance2):
    return (np.log(variance2 / variance1) + (variance1 + (mean1 - mean2) ** 2) / variance2 - 1) / 2


def posterior(schedule, r, s, x0, x):
    """Mean and variance of q(x_s | x_r, x_0), from the product of two Gaussians in x_s; float64."""
    a, b = schedule.alpha_bar_with_x0[[s + 1, r + 1]]
    alpha = b / a
    precision = alpha / (1 - alpha) + 1 / (1 - a)
    return (np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(a) * x0 / (1 - a)) / precision, 1 / precision


def single(tree):
    """The arrays in float32, integers and booleans as they are."""
    return jax.tree.map(lambda table: jnp.asarray(table, np.float32 if table.dtype == np.float64 else None), tree)


@jax.jit
def terms_of(step, x0, x0_hat, v, cov):
    given = {"small": v, "large": v, "learned": v, "analytic": cov}
    return {name: bound.bound_term(step, x0, x0_hat, bound.VARIANCES[name](step, given[name])) for name in given}


@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule()], ids=["linear", "cosine"])
def test_terms_are_those_of_the_definition(schedule):
    rng = np.random.default_rng(0)
    x0, x0_hat = rng.uniform(-1, 1, (2, 3, 4, 4, 2))
    v, cov = rng.uniform(-1, 1, (3, 4, 4, 2)), rng.uniform(0, 0.2, (3, 4, 4, 2))
    timesteps = [3, 40, 41, 500, 999]
    steps = single(bound.chain_steps(schedule, timesteps))
    images = single((x0, x0_hat))
    ab_T = schedule.alpha_bar[-1]
    prior = normal_kl(np.sqrt(ab_T) * x0, 1 - ab_T, 0, 1).mean((1, 2, 3)) / np.log(2)
    coefficients = single(bound.prior_coefficients(schedule, 999))
    np.testing.assert_allclose(bound.prior_term(images[0], coefficients), prior, rtol=1e-4)
    for k, (s, r) in enumerate(itertools.pairwise(timesteps), start=1):
        x = rng.standard_normal(x0.shape)
        mean, small = posterior(schedule, r, s, x0, x)
        model_mean, _ = posterior(schedule, r, s, x0_hat, x)
        large = 1 - schedule.alpha_bar[r] / schedule.alpha_bar[s]
        weight = posterior(schedule, r, s, 1.0, 0.0)[0]
        variances = {
            "small": small,
            "large": large,
            "learned": large ** ((1 + v) / 2) * small ** ((1 - v) / 2),
            "analytic": small + weight**2 * cov,
        }
        terms = terms_of(jax.tree.map(lambda table, k=k: table[k], steps), *images, *single((v, cov)))
        for name, variance in variances.items():
            expected = normal_kl(mean, small, model_mean, variance).mean((1, 2, 3)) / np.log(2)
            np.testing.assert_allclose(terms[name], expected, rtol=1e-4, err_msg=name)


def test_the_decoders_256_levels_have_probability_1_and_exact_tails():
    means, stds = np.array(list(itertools.product((-1.3, -0.999, 0, LEVELS[200], 1), (1e-3, 0.01, 0.3, 5)))).T
    shapes = single((LEVELS, means[:, None], 2 * np.log(stds)[:, None]))
    log_p = np.asarray(jax.jit(bound.decoder_log_prob)(*shapes), np.float64)  # [20, 256]
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, atol=1e-6)
    # The difference of two error functions has its digits where they are not both 1.
    ends = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    z = (ends - means[:, None]) / stds[:, None]
    p = np.diff(np.vectorize(math.erf)(z / np.sqrt(2))) / 2
    inner = np.abs(LEVELS - means[:, None]) < 3 * stds[:, None]
    np.testing.assert_allclose(log_p[inner], np.log(p[inner]), atol=2e-4)
    # Mills' ratio in the tail, where a probability in float32 would be 0: 200 grey levels, 157 standard deviations.
    far = (LEVELS[200] - LEVELS[0] - 1 / 255) / 0.01
    found = log_p[(means == LEVELS[200]) & (stds == 0.01), 0]
    np.testing.assert_allclose(found, -(far**2) / 2 - math.log(far * math.sqrt(2 * math.pi)), rtol=1e-4)


@jax.jit
def _gaussian_terms(steps, last, V):
    """The terms [S] of each variance, and L_T, expected on pixels of variances V with the exact network.

    All are quadratic in x_0 and the noise, so that their mean over ±1 standard deviation of both is exact.
    """
    signs = jnp.asarray([[1, 1], [1, -1], [-1, 1], [-1, -1]], V.dtype)
    x0, noise = (signs[:, i].reshape(4, 1, 1, 1) * factor for i, factor in enumerate((jnp.sqrt(V), jnp.ones_like(V))))

    def at_step(step):
        ab = jnp.exp(step.log_alpha_bar)
        total = ab * V + 1 - ab
        x = jnp.sqrt(ab) * x0 + jnp.sqrt(1 - ab) * noise
        # Analytic-DPM's variance is one number for all pixels.
        cov, x0_hat = jnp.mean(V * (1 - ab) / total), jnp.sqrt(ab) * V * x / total
        ratios = {name: bound.VARIANCES[name](step, cov) for name in ("small", "large", "analytic")}
        return {name: bound.bound_term(step, x0, x0_hat, ratio).mean() for name, ratio in ratios.items()}

    return jax.vmap(at_step)(steps), bound.prior_term(x0, last).mean()


def gaussian_terms(variance, timesteps, V):
    steps, count = bound.chain_steps(SCHEDULE, timesteps), len(timesteps)
    # Of one length for every number of steps: one program.
    padded = jax.tree.map(lambda table: np.pad(table, (0, SCHEDULE.T - count), "edge"), steps)
    V = np.broadcast_to(V, 3).astype(np.float64).reshape(1, -1, 1, 1)
    with jax.enable_x64(True):
        last = bound.prior_coefficients(SCHEDULE, timesteps[-1])
        terms, prior = _gaussian_terms(padded, last, jnp.asarray(V))
    return np.asarray(terms[variance])[:count], float(prior)


@pytest.mark.parametrize("variance", ["small", "large", "analytic"])
def test_gaussian_data_have_the_closed_form(variance):
    V, timesteps = 0.3, [0, 10, 300, 999]
    terms, prior = gaussian_terms(variance, timesteps, V)
    error = V * (1 - SCHEDULE.alpha_bar) / (SCHEDULE.alpha_bar * V + 1 - SCHEDULE.alpha_bar)
    for k, (s, r) in enumerate(itertools.pairwise(timesteps), start=1):
        weight, small = posterior(SCHEDULE, r, s, 1.0, 0.0)
        large = 1 - SCHEDULE.alpha_bar[r] / SCHEDULE.alpha_bar[s]
        sigma2 = {"small": small, "large": large, "analytic": small + weight**2 * error[r]}[variance]
        expected = (np.log(sigma2 / small) + (small + weight**2 * error[r]) / sigma2 - 1) / 2 / np.log(2)
        assert terms[k] == pytest.approx(expected, rel=1e-9)
    # The decoder's bins of 2/255 are fine against its standard deviation.
    sigma2 = error[0] if variance == "analytic" else posterior(SCHEDULE, 10, 0, 0.0, 0.0)[1]
    decoder = np.log2(127.5) + (np.log(2 * np.pi * sigma2) + error[0] / sigma2) / 2 / np.log(2)
    assert terms[0] == pytest.approx(decoder, abs=1e-3)
    ab = SCHEDULE.alpha_bar[-1]
    assert prior == pytest.approx((ab * V - ab - np.log1p(-ab)) / 2 / np.log(2), rel=1e-9)


def test_the_bound_is_the_entropy_of_gaussian_data_and_tends_to_it():
    """With the optimal variance for any timesteps, with β̃ as their number grows, to first order."""
    V = 0.3
    entropy = np.log2(127.5) + np.log2(2 * np.pi * np.e * V) / 2
    for timesteps in ([999], [0, 999], [0, 10, 300, 999], np.arange(1000)):
        terms, prior = gaussian_terms("analytic", timesteps, V)
        assert terms.sum() + prior == pytest.approx(entropy, abs=2e-3)
    gaps = []
    for stride in (27, 9, 3, 1):
        chain = np.arange(0, 1000, stride)
        optimal, small = (gaussian_terms(variance, chain, V)[0][1:].sum() for variance in ("analytic", "small"))
        gaps.append(small - optimal)
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 3, rtol=0.15)
    assert 0 < gaps[-1] < 0.05


@pytest.mark.parametrize("steps", [2, 6])
def test_optimal_timesteps_have_the_lowest_bound(steps):
    """Pixels of different variances, for which timesteps matter; the bound is what `step_costs` adds up."""
    V = np.array([0.5, 0.05, 0.005])
    ab = SCHEDULE.alpha_bar[:, None]
    cov = (V * (1 - ab) / (ab * V + 1 - ab)).mean(1)
    ms_eps = 1 - cov * ab[:, 0] / (1 - ab[:, 0])
    cost = step_costs(SCHEDULE, ms_eps)
    bounds = {}
    grids = {name: spacing(1000, steps) for name, spacing in SPACING_FUNCTIONS.items()}
    rng = np.random.default_rng(0)
    grids |= {str(i): np.append(np.sort(rng.choice(999, steps - 1, replace=False)), 999) for i in range(8)}
    # As good as estimated from 100 images of 8×8 pixels: near T−1 the error is far above the variance of x_0.
    noisy = ms_eps + 3e-3 * rng.standard_normal(1000)
    grids["of the noisy estimate"] = optimal_timesteps(SCHEDULE, noisy, steps)
    for name, timesteps in {"optimal": optimal_timesteps(SCHEDULE, ms_eps, steps), **grids}.items():
        terms, prior = gaussian_terms("analytic", timesteps, V)
        path = [0, *(t + 1 for t in timesteps)]
        costs = sum(cost[s, r] for s, r in itertools.pairwise(path)) / 2 / np.log(2)
        bounds[name] = terms.sum() + prior, costs, timesteps[-1]
    assert min(bounds, key=lambda name: bounds[name][0]) == "optimal"
    assert bounds["of the noisy estimate"][0] - bounds["optimal"][0] < 0.02
    ends = [(value, costs) for value, costs, last in bounds.values() if last == 999]
    np.testing.assert_allclose(np.diff(ends, axis=0)[:, 0], np.diff(ends, axis=0)[:, 1], atol=2e-3)


def test_a_chain_of_one_step_and_an_estimate_without_variance():
    steps = bound.chain_steps(SCHEDULE, [999])
    assert np.exp(steps.log_posterior) == pytest.approx(1 - SCHEDULE.alpha_bar[-1])
    assert steps.log_range == 0
    # cov(x_0|x_t) = 0 of a noisy estimate counts as the variance of rounding in the decoder.
    step = jax.tree.map(lambda table: table[0], steps)
    log_variance = step.log_posterior + float(bound.optimal_variance(step, jnp.zeros(())))
    assert np.exp(log_variance) == pytest.approx((2 / 255) ** 2 / 12, rel=1e-5)
