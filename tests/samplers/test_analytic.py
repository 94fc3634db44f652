"""Analytic-, SN- and NPR-DPM against the published code, and exact on Gaussian data."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from published import LINEAR, golden_eps, injected

from s2dm_jax.diffusion.schedule import SCHEDULES, linear_schedule, log_alpha_bar
from s2dm_jax.samplers.analytic import analytic, cov_x0, npr, optimal_timesteps, reverse_coefficients, sn, step_costs
from s2dm_jax.samplers.ddim import ddpm
from s2dm_jax.samplers.timesteps import linspace_timesteps

VARIANCE = 0.25


def golden_variance_head(kind):
    """The closed-form variance heads of the golden file."""

    def eps_variance_fn(x, t):
        eps = golden_eps(x, t)
        if kind == "eps2":
            return eps, eps**2 + 0.1 + 0.08 * jnp.cos(2 * x)
        return eps, 0.2 + 0.1 * jnp.sin(2 * x) ** 2

    return eps_variance_fn


@pytest.mark.parametrize(
    "case",
    [
        "linear_ddpm_eps_linear_10_clip1x2_eta1.0",
        "linear_ddim_eps_linear_10_clip1x2_eta0.0",
        "cosine_ddpm_eps_linear_25_clip1x1_eta1.0",
        "linear_ddpm_eps_eps2_linear_10_clip1x2_eta1.0",
        "linear_ddpm_eps_epsc_linear_10_clip1x2_eta1.0",
    ],
)
def test_published_sampling(golden, case, precision):
    dtype, rtol = precision
    arrays = golden("analytic_dpm.npz")
    name, mean, head, pixels = re.match(r"(\w+?)_(\w+?)_eps_(?:(eps2|epsc)_)?linear.*x(\d)", case).groups()
    schedule = SCHEDULES[name]()
    # The published code draws no noise in its last step; here it is multiplied by 0.
    noise = np.pad(arrays[f"{case}/noise"], [(0, 1)] + 4 * [(0, 0)])
    options = {"mean": mean, "clip_pixel": float(pixels), "noise_fn": injected(noise, dtype)}
    timesteps = arrays[f"{case}/steps"] - 1
    x_T = jnp.asarray(arrays["x_T"], dtype)
    np.testing.assert_array_equal(timesteps, linspace_timesteps(1000, len(timesteps)))
    if head is None:
        cov = cov_x0(schedule, arrays["ms_eps"][1:])
        x = analytic(golden_eps, x_T, schedule, timesteps, cov_x0=cov, **options)
        t_next = np.concatenate([[-1], timesteps[:-1]])
        log_ab = (log_alpha_bar(schedule, t, dtype) for t in (timesteps, t_next))
        _, _, base, gain = reverse_coefficients(*log_ab, mean, 0.0)
        assert_close(base + gain * cov[timesteps], arrays[f"{case}/sigma2"], rtol)
    else:
        x = {"eps2": sn, "epsc": npr}[head](golden_variance_head(head), x_T, schedule, timesteps, **options)
    assert x.dtype == dtype
    assert_close(x, arrays[f"{case}/x"], rtol)


def gaussian_eps(schedule):
    """The exact network for pixels of variance 1/4 around 0, and its mean square at each timestep."""
    alpha_bar = schedule.alpha_bar
    factor = np.sqrt(1 - alpha_bar) / (alpha_bar * VARIANCE + 1 - alpha_bar)

    def eps(x, t):
        return jnp.asarray(factor, x.dtype)[t.astype(int)].reshape(-1, 1, 1, 1) * x

    return eps, (1 - alpha_bar) / (alpha_bar * VARIANCE + 1 - alpha_bar)


@pytest.mark.parametrize("steps", [2, 5, 50])
@pytest.mark.parametrize(("mean", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
@pytest.mark.parametrize("name", ["analytic", "sn", "npr"])
def test_gaussian_data_keep_their_variance_at_any_number_of_steps(name, mean, eta, steps):
    eps, ms_eps = gaussian_eps(LINEAR)
    residual = 1 - ms_eps
    timesteps = linspace_timesteps(1000, steps)
    options = {"mean": mean, "eta": eta, "clip_pixel": np.inf, "clip_x0": False}

    def eps_variance_fn(x, t):
        noise = eps(x, t)
        spread = jnp.asarray(residual, x.dtype)[t.astype(int)].reshape(-1, 1, 1, 1)
        return noise, spread + (noise**2 if name == "sn" else 0)

    @jax.jit
    def run(x_T, noise):
        noise_fn = lambda step: noise[step]  # noqa: E731
        if name == "analytic":
            cov = cov_x0(LINEAR, ms_eps)
            return analytic(eps, x_T, LINEAR, timesteps, cov_x0=cov, noise_fn=noise_fn, **options)
        sampler = {"sn": sn, "npr": npr}[name]
        return sampler(eps_variance_fn, x_T, LINEAR, timesteps, noise_fn=noise_fn, **options)

    with jax.enable_x64(True):
        # Each row is one x_T or one step's noise of 1, everything else 0.
        impulses = np.eye(steps + 1)
        gains = [run(jnp.full((1, 1, 1, 1), row[0]), jnp.asarray(row[1:]).reshape(-1, 1, 1, 1, 1)) for row in impulses]
        variance = float(sum(jnp.square(gain) for gain in gains).squeeze())
    # The last step, from timestep 0 to the clean image, adds no noise: that much is missing. And x_T has
    # variance 1, where the data noised to the last timestep have 3e-5 less.
    missing = (1 - ms_eps[0]) * (1 - LINEAR.alpha_bar[0]) / LINEAR.alpha_bar[0]
    np.testing.assert_allclose(variance, VARIANCE - missing, rtol=5e-5)


def test_ddpm_loses_variance_on_the_same_data():
    eps, _ = gaussian_eps(LINEAR)
    with jax.enable_x64(True):
        gains = []
        for row in np.eye(6):
            noise = jnp.asarray(row[1:]).reshape(-1, 1, 1, 1, 1)
            x_T, options = jnp.full((1, 1, 1, 1), row[0]), {"variance": "small", "clip_x0": False}
            gains.append(ddpm(eps, x_T, LINEAR, linspace_timesteps(1000, 5), noise_fn=noise.__getitem__, **options))
        variance = float(sum(jnp.square(gain) for gain in gains).squeeze())
    assert variance == pytest.approx(0.044, abs=5e-4)


def test_mean_ddim_with_eta_1_is_mean_ddpm():
    rng = np.random.default_rng(0)
    ms_eps = gaussian_eps(LINEAR)[1]
    noise = injected(rng.standard_normal((10, 2, 4, 4, 1)), "float32")
    x_T = jnp.asarray(rng.standard_normal((2, 4, 4, 1)), jnp.float32)
    common = {"cov_x0": cov_x0(LINEAR, ms_eps), "noise_fn": noise, "clip_pixel": 2, "clip_x0": False}
    run = lambda **mean: analytic(golden_eps, x_T, LINEAR, linspace_timesteps(1000, 10), **common, **mean)  # noqa: E731
    np.testing.assert_allclose(run(mean="ddim", eta=1.0), run(mean="ddpm"), rtol=1e-3, atol=1e-4)


def test_last_noise_is_capped_in_grey_values():
    x_T, timesteps = jnp.zeros((1, 8, 8, 1)), np.array([500, 999])
    noise = injected(np.sign(np.random.default_rng(0).standard_normal((2, 1, 8, 8, 1))), "float32")
    silent = lambda x, t: (jnp.zeros_like(x), jnp.ones_like(x))  # noqa: E731
    for mean, pixels in (("ddpm", 2), ("ddim", 1)):
        _, x0 = npr(silent, x_T, LINEAR, timesteps, noise_fn=noise, mean=mean, clip_x0=False, return_x0=True)
        # A silent network's x_0 at timestep 500 is x_500/√ᾱ: only the first step's noise is in it.
        step_noise = np.abs(x0[1]) * np.sqrt(LINEAR.alpha_bar[500])
        # A standard normal's mean absolute value is √(2/π): y grey values of 2/255 each.
        np.testing.assert_allclose(step_noise * np.sqrt(2 / np.pi), pixels * 2 / 255, rtol=1e-5)


def test_cost_of_a_path_on_gaussian_data_is_the_same_for_every_path():
    _, ms_eps = gaussian_eps(LINEAR)
    cost = step_costs(LINEAR, ms_eps)
    last = LINEAR.alpha_bar[-1] * VARIANCE
    expected = np.log(last / (last + 1 - LINEAR.alpha_bar[-1]))
    for timesteps in ([999], [0, 999], [3, 100, 700, 999], range(1000)):
        path = [0, *(t + 1 for t in timesteps)]
        np.testing.assert_allclose(sum(cost[s, r] for s, r in itertools.pairwise(path)), expected, rtol=1e-6)


def test_optimal_timesteps_beat_all_others():
    schedule = linear_schedule(12, 1e-2, 0.4)
    rng = np.random.default_rng(0)
    ms_eps = np.sort(rng.uniform(0.2, 0.99, 12))
    cost = step_costs(schedule, ms_eps)

    def total(timesteps):
        path = [0, *(t + 1 for t in timesteps)]
        return sum(cost[s, r] for s, r in itertools.pairwise(path))

    for steps in (1, 2, 4, 12):
        best = optimal_timesteps(schedule, ms_eps, steps)
        every = [(*rest, 11) for rest in itertools.combinations(range(11), steps - 1)]
        assert tuple(best) == min(every, key=total)


def test_optimal_timesteps_survive_noisy_estimates():
    ms_eps = np.minimum(gaussian_eps(LINEAR)[1], 1) + 1e-3 * np.random.default_rng(0).standard_normal(1000)
    assert (ms_eps > 1).any()
    timesteps = optimal_timesteps(LINEAR, ms_eps, 20)
    assert len(timesteps) == 20
    assert timesteps[-1] == 999
    assert (np.diff(timesteps) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "ode"}, "mean='ode' is not allowed"),
        ({"eta": 0.5}, "only of mean='ddim'"),
        ({"mean": "ddim", "eta": 1.5}, "eta=1.5 is not allowed"),
        ({"cov_x0": np.zeros(7)}, "1000 numbers"),
    ],
)
def test_bad_input_is_refused(options, message):
    options = {"cov_x0": np.zeros(1000), "noise_fn": None, **options}
    with pytest.raises(ValueError, match=message):
        analytic(golden_eps, jnp.zeros((1, 4, 4, 1)), LINEAR, [0, 999], **options)


def test_bad_statistics_are_refused():
    for ms_eps in (np.ones(999), np.full(1000, np.nan)):
        with pytest.raises(ValueError, match="1000 finite numbers"):
            cov_x0(LINEAR, ms_eps)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps={steps}"):
            optimal_timesteps(LINEAR, np.ones(1000), steps)
