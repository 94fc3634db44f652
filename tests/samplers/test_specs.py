"""What the table of samplers promises, for every sampler in it: NFE, options, one small program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, sampler_with_noise
from published import LINEAR, golden_eps, sample_golden

from s2dm_jax.samplers.pndm import f_pndm
from s2dm_jax.samplers.specs import SAMPLERS, check_options, nfe_of, steps_for_nfe
from s2dm_jax.samplers.timesteps import uniform_timesteps

# These clip each prediction of x_0 by default.
CLIPPING = ("ddpm", "analytic", "sn", "npr")


def test_budgets_become_steps():
    assert [steps_for_nfe(name, 20) for name in ("ddim", "f_pndm", "s_pndm", "unipc")] == [20, 11, 19, 20]
    for name in SAMPLERS:
        for nfe in range(13, 30, SAMPLERS[name].evaluations_per_step):
            assert nfe_of(name, steps_for_nfe(name, nfe)) == nfe
    with pytest.raises(
        ValueError, match="nfe=12 is too few for f_pndm: its smallest number of steps makes 13 evaluations"
    ):
        steps_for_nfe("f_pndm", 12)
    with pytest.raises(ValueError, match="nfe=20 is not possible with heun: 10 steps make 19"):
        steps_for_nfe("heun", 20)
    with pytest.raises(ValueError, match="steps=3 is too few for f_pndm: it needs at least 4"):
        nfe_of("f_pndm", 3)
    with pytest.raises(ValueError, match="sampler='euler' is not one of ddim, ddpm, "):
        nfe_of("euler", 10)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("ddim", {"eta": 1.01}, r"eta=1.01 is not allowed: it must be from 0 \(deterministic\) to 1"),
        ("ddim", {"eta": -0.1}, "eta=-0.1 is not allowed"),
        ("ddim", {"eta": float("nan")}, "eta=nan is not allowed"),
        ("unipc", {"eta": 0.5}, "eta=0.5 is not an option of unipc, only of ddim, analytic, sn, npr"),
        ("analytic", {"eta": 0.5}, "eta=0.5 is not an option of mean='ddpm', only of mean='ddim'"),
        ("ddim", {"order": 2}, "order=2 is not an option of ddim, only of deis, dpmpp, unipc"),
        ("dpmpp_2m", {"order": 3}, "order=3 is not an option of dpmpp_2m, only of deis, dpmpp, unipc"),
        ("deis", {"variant": "bh1"}, "variant='bh1' is not an option of deis, only of unipc"),
        ("unipc", {"variant": "b1"}, "variant='b1' is not allowed: it must be 'bh1' or 'bh2'"),
        ("ddpm", {"variance": "medium"}, "variance='medium' is not allowed: it must be 'large' or 'small'"),
        ("analytic", {"clip_pixel": 0.0}, "clip_pixel=0.0 is not allowed: it must be a number above 0, or inf"),
        ("ddim", {"raw_eps": True}, "raw_eps=True has no effect without clip_x0=True"),
        ("ddim", {"clip": True}, "clip=True is not an option of any sampler; choose among eta, clip_x0"),
    ],
)
def test_options_are_checked_by_name_value_and_sampler(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(sampler, **options)


def test_eta_0_suits_every_sampler():
    for name in SAMPLERS:
        check_options(name, eta=0.0)
    check_options("analytic", mean="ddim", eta=1.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in SAMPLERS), *((name, {"order": n}) for name in ("dpmpp", "unipc") for n in (1, 3))],
)
def test_a_sampler_is_one_small_program(name, options):
    """Evaluations made while running, copies of the network in it, and traces when the timesteps change."""
    calls, traces = [], []
    steps = 7

    def eps_fn(x, t):
        jax.debug.callback(lambda: calls.append(None))
        return golden_eps(jnp.arctan(x), t)

    def run(x, timesteps):
        traces.append(None)
        return sampler_with_noise(name)(eps_fn, x, LINEAR, timesteps, **options)

    x_T = np.random.default_rng(0).standard_normal((2, 2, 2, 1), np.float32)
    program = jax.jit(run)
    assert str(program.trace(x_T, uniform_timesteps(1000, steps)).jaxpr).count("= atan ") in (1, 2)
    first = program(x_T, uniform_timesteps(1000, steps))
    jax.effects_barrier()
    assert len(calls) == nfe_of(name, steps)

    second = program(x_T, np.array([0, 1, 5, 30, 200, 600, 998], np.int32))
    assert len(traces) == 1
    assert np.abs(np.asarray(first) - second).max() > 1e-3


@pytest.mark.parametrize("name", ["ddpm", "f_pndm", "deis", "dpmpp_3m", "unipc", "heun"])
def test_a_thousand_steps_in_float32(name):
    """No coefficient loses its digits where neighbouring timesteps are close: float32 agrees with float64."""
    x_T = np.random.default_rng(0).standard_normal((1, 2, 2, 1))
    results = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            options = {"order": 3} if name == "unipc" else {}
            results.append(sample_golden(sampler_with_noise(name), x_T, np.arange(1000), dtype, **options))
    assert_close(*results, 1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_return_x0_gives_every_steps_prediction(name):
    x_T = np.random.default_rng(0).standard_normal((2, 2, 2, 1), np.float32)
    timesteps = uniform_timesteps(1000, 6)
    x_0, x0 = sample_golden(sampler_with_noise(name), x_T, timesteps, "float32", return_x0=True)
    assert x0.shape == (6, *x_T.shape)
    signal, sigma = np.sqrt(LINEAR.alpha_bar[timesteps[-1]]), np.sqrt(1 - LINEAR.alpha_bar[timesteps[-1]])
    first = (x_T - sigma * golden_eps(x_T, np.full(2, timesteps[-1]))) / signal
    assert_close(x0[0], np.clip(first, -1, 1) if name in CLIPPING else first, 1e-5)
    # PNDM's last step looks back too; every other sampler ends with its last prediction.
    assert_close(x0[-1], x_0, 5e-2 if "pndm" in name else 1e-6)


def test_samplers_can_be_vmapped():
    x_T = np.random.default_rng(0).standard_normal((6, 2, 2, 1), np.float32)
    run = functools.partial(f_pndm, golden_eps, schedule=LINEAR, timesteps=uniform_timesteps(1000, 5))
    mapped = jax.jit(jax.vmap(run))(x_T.reshape(3, 2, 2, 2, 1))
    np.testing.assert_allclose(mapped.reshape(x_T.shape), jax.jit(run)(x_T), atol=1e-6)


def test_arithmetic_stays_in_float32_around_a_bfloat16_network():
    x_T = jnp.zeros((2, 4, 4, 1))
    timesteps = uniform_timesteps(1000, 10)
    seen = []

    def bfloat16_eps(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return golden_eps(x, t).astype(jnp.bfloat16)

    for name in SAMPLERS:
        run = functools.partial(sampler_with_noise(name), bfloat16_eps, schedule=LINEAR, timesteps=timesteps)
        x_0 = jax.eval_shape(run, x_T)
        assert (x_0.dtype, x_0.shape) == (jnp.float32, x_T.shape)
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), (2,))}
