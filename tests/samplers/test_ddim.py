"""DDIM and DDPM against the published code, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from published import LINEAR, golden_eps, injected, sample_golden

from s2dm_jax.samplers.ddim import ddim, ddpm


@pytest.mark.parametrize(
    "case", ["uniform_10_eta0.0", "uniform_50_eta0.0", "quad_20_eta0.0", "uniform_20_eta0.5", "uniform_10_eta1.0"]
)
def test_ddim_matches_published_code(golden, case, precision):
    dtype, rtol = precision
    arrays = golden("ddim.npz")
    noise = arrays.get(f"{case}/noise")
    x, x0 = sample_golden(
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
    # The last step leaves x0 as it is, up to the last bit, which is the compiler's affair.
    assert_close(x0[-1], x, 4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_matches_published_code(golden, steps, precision):
    dtype, rtol = precision
    arrays = golden("ddpm.npz")
    x = sample_golden(
        ddpm, arrays["x_T"], arrays[f"{steps}/seq"], dtype, noise_fn=injected(arrays[f"{steps}/noise"], dtype)
    )
    assert x.dtype == dtype
    assert_close(x, arrays[f"{steps}/x"], rtol)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(golden):
    with jax.enable_x64(True):
        arrays = golden("ddpm.npz")
        options = {"noise_fn": injected(arrays["10/noise"], "float64"), "return_x0": True}
        x, x0 = sample_golden(ddim, arrays["x_T"], arrays["10/seq"], "float64", eta=1.0, **options)
        small = {"variance": "small", "clip_x0": False}
        y, y0 = sample_golden(ddpm, arrays["x_T"], arrays["10/seq"], "float64", **small, **options)
    # The same noise goes through both: equal paths mean equal means and equal variances at every step.
    assert_close(x, y, 1e-12)
    assert_close(x0, y0, 1e-12)


def test_ddim_takes_a_traced_eta(golden):
    arrays = golden("ddim.npz")
    case = "uniform_20_eta0.5"
    run = jax.jit(
        lambda eta: ddim(
            golden_eps,
            arrays["x_T"].astype(np.float32),
            LINEAR,
            arrays[f"{case}/seq"],
            eta=eta,
            noise_fn=injected(arrays[f"{case}/noise"], jnp.float32),
        )
    )
    assert_close(run(0.5), arrays[f"{case}/x"], 1e-3)


@pytest.mark.parametrize("raw_eps", [False, True])
def test_ddim_clips_x0_and_keeps_the_noise_that_agrees_or_the_predicted_one(raw_eps):
    x_T = np.array([-9.0, 0.0, 2.0, 9.0]).reshape(1, 2, 2, 1)
    with jax.enable_x64(True):
        _, free = sample_golden(ddim, x_T, [99, 499, 999], "float64", return_x0=True)
        x_0, x0 = sample_golden(ddim, x_T, [99, 499, 999], "float64", clip_x0=True, raw_eps=raw_eps, return_x0=True)
        assert np.abs(free[0]).max() > 1
        np.testing.assert_allclose(x0[0], np.clip(free[0], -1, 1))
        a, a_next = LINEAR.alpha_bar[999], LINEAR.alpha_bar[499]
        clipped = free[0] if raw_eps else x0[0]
        x_1 = np.sqrt(a_next) * x0[0] + np.sqrt((1 - a_next) / (1 - a)) * (x_T - np.sqrt(a) * clipped)
        eps = golden_eps(np.asarray(x_1), np.array([499.0]))
        np.testing.assert_allclose(x0[1], np.clip((x_1 - np.sqrt(1 - a_next) * eps) / np.sqrt(a_next), -1, 1))
    np.testing.assert_array_equal(x_0, x0[-1])


@pytest.mark.parametrize(
    ("sampler", "timesteps", "options", "message"),
    [
        (ddim, [0, 500], {"eta": 1.5}, "eta=1.5 is not allowed"),
        (ddim, [0, 500], {"eta": 0.5}, "give noise_fn"),
        (ddpm, [0, 500], {"noise_fn": None, "variance": "medium"}, "variance='medium' is not allowed"),
    ],
)
def test_bad_options_are_refused(sampler, timesteps, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(golden_eps, jnp.zeros((1, 2, 2, 1)), LINEAR, timesteps, **options)


def test_the_learned_variance_is_that_of_improved_diffusion(golden):
    """Its `p_mean_variance` written out on respaced betas: log Σ between those of the posterior and of β, by v."""
    arrays = golden("ddpm.npz")
    t, x_T, noise = arrays["10/seq"], arrays["x_T"], arrays["10/noise"]

    def v_of(x):
        return 1.2 * jnp.sin(5 * x)

    alpha_bar = np.asarray(LINEAR.alpha_bar)[t]
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    x = np.asarray(x_T, np.float64)
    with jax.enable_x64(True):
        for n, i in enumerate(reversed(range(len(t)))):
            eps, v = np.asarray(golden_eps(x, np.full(len(x), t[i], np.float64))), np.asarray(v_of(x))
            x0 = np.clip((x - np.sqrt(1 - alpha_bar[i]) * eps) / np.sqrt(alpha_bar[i]), -1, 1)
            mean = np.sqrt(before[i]) * beta[i] / (1 - alpha_bar[i]) * x0
            mean += np.sqrt(1 - beta[i]) * (1 - before[i]) / (1 - alpha_bar[i]) * x
            share = (v + 1) / 2
            log_variance = share * np.log(beta[i]) + (1 - share) * np.log(posterior[i] if i else 1.0)
            x = mean + (i > 0) * np.exp(log_variance / 2) * noise[n]

        def eps_and_variance(x, t):
            return golden_eps(x, t), v_of(x)

        noise_fn = injected(noise, "float64")
        sampled = jax.jit(lambda x_T: ddpm(eps_and_variance, x_T, LINEAR, t, noise_fn=noise_fn, variance="learned"))(
            np.asarray(x_T, np.float64)
        )
    assert_close(np.asarray(sampled), x, 1e-10)
