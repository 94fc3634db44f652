"""SA-DPM's theory on random networks: Theorem 1's identity, Theorem 2's bounds, the gap while sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FunctionNetwork

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.objectives import NoiseSample, paper
from s2dm_jax.diffusion.schedule import cosine_schedule, linear_schedule
from s2dm_jax.evaluation.estimation_gap import accumulate, estimation_gap, gap_coefficients, gap_curve

T = 30
IMAGES, SHAPE = 5, (2, 2, 1)
SCHEDULES = {"linear": linear_schedule(T, 1e-4 * 1000 / T, 2e-2 * 1000 / T), "cosine": cosine_schedule(T)}


def random_net(kind, seed):
    """An untrained network, a function of all pixels and of t, with random weights."""
    rng = np.random.default_rng(seed)
    w1, w2 = rng.standard_normal((2, 4, 4)).astype(np.float32)
    b = rng.standard_normal(4).astype(np.float32)

    def net(x, t):
        xp = np if isinstance(x, np.ndarray) else jnp
        flat, u = x.reshape(len(x), -1), t[:, None] / T
        if kind == "linear":
            out = flat @ (w1 + 0.3 * w2) + u * b
        else:
            out = xp.tanh(flat @ w1 + u * b) @ w2 * (1 + xp.sin(5 * u))
        return out.reshape(x.shape)

    return net


def residuals_of(schedule, net, seed):
    """f(x_s, s) − ε_s at every timestep, for one joint draw of x_0, ε_1 … ε_T per image: [N, T, H, W, C]."""
    rng = np.random.default_rng(seed)
    x0 = rng.uniform(-1, 1, (IMAGES, 1, *SHAPE)).astype(np.float32)
    noise = rng.standard_normal((IMAGES, T, *SHAPE)).astype(np.float32)
    a = schedule.alpha_bar.reshape(-1, 1, 1, 1)
    x = (np.sqrt(a) * x0 + np.sqrt(1 - a) * noise).astype(np.float32)
    t = np.tile(np.arange(T, dtype=np.float32), IMAGES)
    return net(x.reshape(-1, *SHAPE), t).reshape(noise.shape) - noise, x0[:, 0], noise


def squared(x):
    return np.square(np.asarray(x, np.float64)).sum((-3, -2, -1))


def three_losses(schedule, objective, residuals):
    """L_simple^τ, L_sa and L_θ of each image, exactly: sums over every t that Theorem 2 lets t be."""
    weights = objectives.tau_s(schedule) if objective.use_tau_s else np.arange(T) > 0
    weighted = weights.reshape(-1, 1, 1, 1) * residuals
    # The theorem's t goes over 1−K … T in the paper's count.
    t = jnp.arange(-objective.K, T)
    timesteps = objectives.window_timesteps(objective, t)
    weight = objectives.window_weight(schedule, objective, timesteps)
    windows = residuals[:, np.clip(timesteps, 0, T - 1)].reshape(-1, objective.K, *SHAPE)
    per_pixel = objectives.sequence_loss(windows, np.tile(weight, (len(residuals), 1)), objective.sa_norm)
    sa = np.asarray(per_pixel, np.float64).reshape(len(residuals), T + objective.K, -1).sum(-1).mean(-1)
    return squared(weighted[:, 1:]).mean(-1), sa, squared(weighted.sum(1))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_theorem_1_recursion_is_the_weighted_sum_of_errors(schedule):
    residuals = residuals_of(schedule, random_net("tanh", 0), seed=0)[0].astype(np.float64)
    gamma_1, gamma_2 = gap_coefficients(schedule)
    a = schedule.alpha_bar
    own = (gamma_1 * np.sqrt((1 - a) / a)).reshape(-1, 1, 1, 1) * residuals
    total = own[:, T - 1]
    # From the paper's step T down to its step 2, which is timestep 1.
    for t in range(T - 2, 0, -1):
        total = own[:, t] + gamma_2[t] * total

    def weighted_sum(tau):
        return np.einsum("nthwc,t->nhwc", residuals, tau)

    tau = objectives.tau_s(schedule)
    np.testing.assert_allclose(total, weighted_sum(tau), rtol=1e-9)
    scanned = accumulate(jnp.asarray(np.moveaxis(own[:, :0:-1], 1, 0), jnp.float32), gamma_2[:0:-1])
    np.testing.assert_allclose(scanned[-1], total, rtol=1e-4, atol=1e-5)
    for wrong in (np.where(np.arange(T) == T // 2, 1.05, 1.0) * tau, np.roll(tau, 1), np.ones(T)):
        assert np.abs(weighted_sum(wrong) - total).max() > 1e-6 * np.abs(total).max()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_theorem_1_product_of_gammas(schedule):
    _, gamma_2 = gap_coefficients(schedule)
    before = schedule.alpha_bar_with_x0[:-1]
    for t in range(1, T):
        products = np.cumprod(gamma_2[t:-1])
        closed = np.sqrt(before[t + 1 :] / before[t]) * (1 - before[t]) / (1 - before[t + 1 :])
        np.testing.assert_allclose(products, closed, rtol=1e-10)
    # The theorem stops where it does because the step to the clean image carries nothing over.
    assert gamma_2[0] == 0


@pytest.mark.parametrize("tau_s", [True, False], ids=["tau_s", "tau=1"])
@pytest.mark.parametrize("K", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_theorem_2_bounds_on_random_networks(schedule, K, tau_s):
    objective = paper(K=K, lam=1.0, use_tau_s=tau_s)
    residuals = [
        residuals_of(schedule, random_net(kind, seed), seed)[0] for kind in ("linear", "tanh") for seed in range(3)
    ]
    simple, sa, total = three_losses(schedule, objective, np.concatenate(residuals))
    upper, lower = (T - 1) / (T + K) * simple, total / (T + K) ** 2
    # With one joint draw of all noise per image both hold for each image, so for every mean over images.
    assert (upper >= sa * (1 - 1e-5)).all()
    assert (sa >= lower * (1 - 1e-5)).all()
    if K == 1:
        np.testing.assert_allclose(upper, sa, rtol=1e-5)
    else:
        assert (upper > sa).all()
    assert (sa > lower).all()


@pytest.mark.parametrize("K", [2, 3, 7])
def test_theorem_2_upper_bound_is_reached_but_for_the_ends_of_the_sequence(K):
    objective = paper(K=K, lam=1.0, use_tau_s=True)
    tau = objectives.tau_s(SCHEDULES["linear"])
    equal = np.where(np.arange(T) > 0, 1 / np.maximum(tau, 1e-30), 0).reshape(1, -1, 1, 1, 1) * np.ones(SHAPE)
    simple, sa, _ = three_losses(SCHEDULES["linear"], objective, equal.astype(np.float32))
    # Weighted errors that are all equal make Jensen's inequality an equation in every window that lies
    # within 2 … T; the K−1 windows that hang over either end hold j < K of them.
    within, over = T - K, 2 * sum((j / K) ** 2 for j in range(1, K))
    np.testing.assert_allclose(sa * (T + K) / ((T - 1) * simple), (within + over) / (T - 1), rtol=1e-5)
    _, too_much, _ = three_losses(
        SCHEDULES["linear"], dataclasses.replace(objective, sa_norm="K"), equal.astype(np.float32)
    )
    assert (too_much > (T - 1) / (T + K) * simple).all(), "a divisor K instead of K² must break the bound"


@pytest.mark.parametrize("K", [2, 7])
def test_theorem_2_lower_bound_is_reached_but_for_two_empty_windows(K):
    # T − 2 = 28 is a multiple of K: one error in each K timesteps gives every window that holds any of them
    # the same sum. The two lowest windows end below the paper's step 2 and are empty.
    objective = paper(K=K, lam=1.0)
    spaced = (np.arange(T) % K == 1 % K).astype(np.float32).reshape(1, -1, 1, 1, 1) * np.ones(SHAPE, np.float32)
    assert spaced[0, -1].all()
    _, sa, total = three_losses(SCHEDULES["linear"], objective, spaced)
    np.testing.assert_allclose(sa * (T + K) ** 2 / total, (T + K) / (T + K - 2), rtol=1e-5)


def test_theorem_2_needs_the_first_timestep_left_out():
    first = np.zeros((1, T, *SHAPE), np.float32)
    first[:, 0] = 1
    simple, sa, _ = three_losses(SCHEDULES["linear"], paper(K=2, lam=1.0), first)
    np.testing.assert_array_equal([simple, sa], 0)
    _, sa, _ = three_losses(SCHEDULES["linear"], paper(K=2, lam=1.0, window_boundary="all"), first)
    assert sa > 0


def test_training_minimises_the_theorems_loss():
    schedule, objective = SCHEDULES["cosine"], paper(K=3, lam=1.0, use_tau_s=True)
    net = random_net("tanh", 3)
    residuals, x0, noise = residuals_of(schedule, net, seed=3)
    _, sa, _ = three_losses(schedule, objective, residuals)
    t = jnp.arange(-objective.K, T)
    timesteps = np.clip(objectives.window_timesteps(objective, t), 0, T - 1)
    sample = NoiseSample(t, jnp.asarray(noise[0][timesteps]), None)
    images = jnp.broadcast_to(x0[0], (len(t), *SHAPE))
    _, terms = objectives.loss(net, schedule, objective, images, sample)
    np.testing.assert_allclose(terms["sequence"].mean(), sa[0], rtol=1e-4)


def exact_noise(schedule, x0, error=0.0):
    """A network that knows the image: the noise in x_t, plus an error."""
    a = jnp.asarray(schedule.alpha_bar, jnp.float32)

    def net(x, t):
        a_t = a[t.astype(jnp.int32)][:, None, None, None]
        return (x - jnp.sqrt(a_t) * x0) / jnp.sqrt(1 - a_t) + error

    return net


def gap_inputs(seed=0):
    rng = np.random.default_rng(seed)
    x0 = rng.uniform(-1, 1, (IMAGES, *SHAPE)).astype(np.float32)
    noise = rng.standard_normal((T + 1, IMAGES, *SHAPE)).astype(np.float32)
    return x0, noise[0], noise[1:]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gap_of_known_errors(eta):
    schedule, start = SCHEDULES["linear"], T - 1
    x0, noise, step_noise = gap_inputs()
    tau = objectives.tau_s(schedule)

    @jax.jit
    def gap_for(error):
        net = exact_noise(schedule, x0, error)
        return estimation_gap(net, schedule, x0, noise, start, eta=eta, noise_fn=lambda i: jnp.asarray(step_noise)[i])

    gap = gap_for(0.0)
    np.testing.assert_array_equal(gap.t, np.arange(start, 0, -1))
    np.testing.assert_allclose(gap.square, 0, atol=1e-9)
    gap = gap_for(0.3)
    # Theorem 1: the same error at every timestep adds up by τ_s.
    np.testing.assert_allclose(gap.mean[-1], 0.3 * tau.sum(), rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(gap.square[-1]), 0.3 * tau.sum(), rtol=1e-4)
    np.testing.assert_allclose(gap.mean[0], 0.3 * carried_to(schedule, start)[start], rtol=1e-4)
    np.testing.assert_allclose(gap.mean[start - 10], 0.3 * carried_to(schedule, 10).sum(), rtol=1e-4)


def carried_to(schedule, t):
    """Weight of each timestep's error in d̄_t: the product formula of Theorem 1's proof."""
    a, before = schedule.alpha_bar, schedule.alpha_bar_with_x0[:-1]
    own = gap_coefficients(schedule)[0] * np.sqrt((1 - a) / a)
    with np.errstate(divide="ignore", invalid="ignore"):
        carried = np.sqrt(before / before[t]) * (1 - before[t]) / (1 - before)
    return np.where(np.arange(len(a)) >= t, carried * own, 0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gap_of_a_random_network_step_by_step(eta):
    schedule, start, net = SCHEDULES["linear"], 20, random_net("tanh", 1)
    x0, noise, step_noise = gap_inputs(1)
    gap = jax.jit(
        lambda x0: estimation_gap(
            net, schedule, x0, noise, start, eta=eta, noise_fn=lambda i: jnp.asarray(step_noise)[i]
        )
    )(x0)

    a, before = schedule.alpha_bar, schedule.alpha_bar_with_x0[:-1]
    x = np.sqrt(a[start]) * x0 + np.sqrt(1 - a[start]) * noise
    informed, total = x, np.zeros_like(x)
    for i, t in enumerate(range(start, 0, -1)):
        f = net(x, np.full(IMAGES, t, np.float32))
        eps_t = (x - np.sqrt(a[t]) * x0) / np.sqrt(1 - a[t])
        gamma_1 = np.sqrt(before[t]) * schedule.beta[t] / (1 - a[t])
        gamma_2 = np.sqrt(schedule.alpha[t]) * (1 - before[t]) / (1 - a[t])
        total = gamma_1 * np.sqrt(1 - a[t]) / np.sqrt(a[t]) * (f - eps_t) + gamma_2 * total
        x0_hat = (x - np.sqrt(1 - a[t]) * f) / np.sqrt(a[t])
        if eta == 1:
            spread = np.sqrt(schedule.beta[t] * (1 - before[t]) / (1 - a[t])) * step_noise[i]
            x = gamma_1 * x0_hat + gamma_2 * x + spread
            informed = gamma_1 * x0 + gamma_2 * informed + spread
            # The total gap is the distance from the chain that knows x_0.
            np.testing.assert_allclose(informed - x, total, rtol=1e-4, atol=1e-4)
        else:
            x = np.sqrt(before[t]) * x0_hat + np.sqrt(1 - before[t]) * f
        np.testing.assert_allclose(gap.mean[i], total.mean(0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(gap.square[i], np.square(total).mean((1, 2, 3)), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("start", [0, T])
def test_gap_refuses_a_start_outside_its_range(start):
    x0, noise, _ = gap_inputs()
    with pytest.raises(ValueError, match=f"start={start} .* allows 1 to {T - 1}"):
        estimation_gap(random_net("linear", 0), SCHEDULES["linear"], x0, noise, start, eta=0.0)


def test_gap_curve_does_not_depend_on_the_batches():
    net = random_net("linear", 2)
    network = FunctionNetwork(lambda params, x, t: net(x, t), SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), np.uint8)
    whole, cut = (gap_curve(network, {}, SCHEDULES["linear"], images, 12, seed=1, batch_size=size) for size in (100, 4))
    np.testing.assert_array_equal(whole["t"], np.arange(12, 0, -1))
    for name in ("rms", "rms_of_mean"):
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-5)
    assert (whole["rms_of_mean"] < whole["rms"]).all()
