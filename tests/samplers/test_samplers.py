"""Samplers against the published code's results, closed-form solutions and their own promises."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, golden_eps, injected

from s2dm_jax.diffusion.schedule import linear_schedule, log_alpha_bar
from s2dm_jax.samplers.common import scale_eps
from s2dm_jax.samplers.ddim import ddim, ddpm
from s2dm_jax.samplers.multistep import deis, dpmpp_2m, unipc
from s2dm_jax.samplers.noise import image_keys, initial_noise, per_image_noise, slerp
from s2dm_jax.samplers.pndm import f_pndm, s_pndm
from s2dm_jax.samplers.specs import SAMPLERS, get_sampler, nfe_of, steps_for_nfe
from s2dm_jax.samplers.timesteps import _SPACING_FUNCTIONS, check_timesteps, uniform_timesteps

# These clip each prediction of x_0 unless told otherwise.
CLIPPING = ("ddpm", "analytic", "sn", "npr")
GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULE = linear_schedule()


def golden(name):
    """The arrays of a golden file; images come as PyTorch's NCHW and leave as NHWC."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {
            key: np.moveaxis(array, -3, -1) if array.ndim >= 4 else array for key, array in arrays.items()
        }


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """dtype and relative tolerance, with 64-bit arithmetic enabled only where it is asked for."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param, {"float64": 1e-5, "float32": 1e-3}[request.param]


def sample(sampler, x_T, timesteps, dtype, **options):
    """One compiled run of a sampler on the golden network and schedule, results as NumPy arrays."""
    run = jax.jit(lambda x_T: sampler(golden_eps, x_T, SCHEDULE, timesteps, **options))
    return jax.tree.map(np.asarray, run(np.asarray(x_T, dtype)))


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
    # The last step leaves x0 as it is, up to the last bit, which is the compiler's affair.
    assert_close(x0[-1], x, 4 * np.finfo(dtype).eps)


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


PNDM = {"F-PNDM": f_pndm, "S-PNDM": s_pndm}


def pndm_step_by_step(method, x, alpha_bar, grid):
    """PNDM as a plain loop in NumPy; `alpha_bar[⌊t⌋ + 1]` belongs to level t, as in the released code."""

    def phi(x, e, t, s):
        a, b = alpha_bar[int(t) + 1], alpha_bar[int(s) + 1]
        root = np.sqrt(a) * (np.sqrt((1 - b) * a) + np.sqrt((1 - a) * b))
        return x + (b - a) * (x / (np.sqrt(a) * (np.sqrt(a) + np.sqrt(b))) - e / root)

    def f(x, t):
        return golden_eps(x, np.full(len(x), t, np.float64))

    history = []
    for t, s in zip(grid[::-1], [*grid[-2::-1], -1], strict=True):
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
def test_pndm_matches_published_steps(case, precision):
    """What the golden file holds is the corrected convention: the released step functions were fed an
    alpha_bar that starts with the clean image's 1, an entry that the release's own table has not."""
    dtype, rtol = precision
    arrays = golden("pndm")
    method, steps = case.split("_")
    x = sample(PNDM[method], arrays["x_T"], arrays[f"{case}/seq"], dtype)
    assert x.dtype == dtype
    assert_close(x, arrays[f"{case}/x"], rtol)
    assert nfe_of(method.lower().replace("-", "_"), int(steps)) == arrays[f"{case}/nfe"]


@pytest.mark.parametrize("method", ["F-PNDM", "S-PNDM"])
def test_pndm_in_the_published_convention(method):
    """The same loop that reproduces the golden file, on the release's own table, with half levels."""
    arrays = golden("pndm")
    published = arrays[f"{method}_10/seq"].tolist()
    loop = pndm_step_by_step(method, arrays["x_T"], SCHEDULE.alpha_bar_with_x0, published)
    assert_close(loop, arrays[f"{method}_10/x"], 1e-12)

    grid = list(range(0, 1000, 125))
    expected = pndm_step_by_step(method, arrays["x_T"], SCHEDULE.alpha_bar, grid)
    with jax.enable_x64(True):
        x = sample(PNDM[method], arrays["x_T"], grid, "float64", pndm_convention="published")
    assert_close(x, expected, 1e-9)


# Gaussian data of this mean and deviation, on a schedule so fine that every grid below is exact.
MEAN, STD, FINE = 0.2, 0.3, linear_schedule(2**14, 1e-4 * 1000 / 2**14, 2e-2 * 1000 / 2**14)


def gaussian_eps(schedule, x, t):
    """The noise expected in x when the data are Gaussian; alpha_bar between whole levels as documented."""
    u = t.astype(x.dtype)[:, None, None, None] + 1
    log_ab = jnp.asarray(schedule.log_alpha_bar_with_x0, x.dtype)
    below = u.astype(int)
    above = jnp.minimum(below + 1, schedule.T)
    a = jnp.exp(log_ab[below] + (u - below) * (log_ab[above] - log_ab[below]))
    return jnp.sqrt(1 - a) * (x - MEAN * jnp.sqrt(a)) / (STD**2 * a + 1 - a)


def exact_flow(x, t, t_next):
    """The probability-flow ODE's solution: it keeps (x − mean)/deviation of the marginal."""
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
        (functools.partial(deis, order=2), 2, False),
        (functools.partial(deis, order=3), 3, False),
        (unipc, 3, False),
    ],
)
def test_convergence_order_on_gaussian_data(sampler, order, ends_at_clean):
    """Error against the exact ODE when the step in √t halves; trajectories are smooth in it down to t = 0.

    With the clean end all levels are refined together, and the error is that of x_0. A solver whose last step
    is DDIM's has order 2 there at most, so higher orders are measured above a lowest level that stays put:
    what should arrive is then the prediction of x_0 at the exact solution's place on that level.
    """
    x_T = np.array([-1.5, -0.3, 0.7, 2.0]).reshape(1, 2, 2, 1)
    errors = []
    with jax.enable_x64(True):
        for steps in (32, 64):
            if ends_at_clean:
                levels = FINE.T * np.arange(1, steps + 1) ** 2 // steps**2 - 1
                expected = exact_flow(x_T, FINE.T - 1, -1)
            else:
                roots = np.linspace(np.sqrt(FINE.T / 64), np.sqrt(FINE.T), steps)
                levels = np.round(roots**2).astype(int) - 1
                x = exact_flow(x_T, FINE.T - 1, levels[0])
                a = FINE.alpha_bar[levels[0]]
                eps = np.sqrt(1 - a) * (x - MEAN * np.sqrt(a)) / (STD**2 * a + 1 - a)
                expected = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
            run = jax.jit(lambda x, t: sampler(functools.partial(gaussian_eps, FINE), x, FINE, t))
            errors.append(np.abs(run(x_T, levels) - expected).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def with_noise(name, noise_fn=lambda step: jnp.sin(1.7 * step)):
    """The sampler by name, with noise where it draws any."""
    if name in ("sn", "npr"):

        def with_head(eps_fn, x_T, schedule, timesteps, **options):
            def eps_variance_fn(x, t):
                eps = eps_fn(x, t)
                return eps, 0.1 + eps**2

            return get_sampler(name)(eps_variance_fn, x_T, schedule, timesteps, noise_fn=noise_fn, **options)

        return with_head
    options = {"ddpm": {}, "ddim": {"eta": 0.7}, "analytic": {"cov_x0": np.full(1000, 0.1)}}.get(name)
    return (
        get_sampler(name)
        if options is None
        else functools.partial(get_sampler(name), noise_fn=noise_fn, **options)
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_one_small_program(name):
    """Evaluations made while running, copies of the network in it, and traces when the grid changes."""
    calls, traces = [], []
    steps = 7

    def eps_fn(x, t):
        jax.debug.callback(lambda: calls.append(None))
        return golden_eps(jnp.arctan(x), t)

    def run(x, timesteps):
        traces.append(None)
        return with_noise(name)(eps_fn, x, SCHEDULE, timesteps)

    x_T = np.random.default_rng(0).standard_normal((2, 2, 2, 1), np.float32)
    program = jax.jit(run)
    assert str(program.trace(x_T, uniform_timesteps(1000, steps)).jaxpr).count("= atan ") in (1, 2)
    first = program(x_T, uniform_timesteps(1000, steps))
    jax.effects_barrier()
    assert len(calls) == nfe_of(name, steps)

    second = program(x_T, np.array([0, 1, 5, 30, 200, 600, 998], np.int32))
    assert len(traces) == 1
    assert np.abs(np.asarray(first) - second).max() > 1e-3


@pytest.mark.parametrize("name", ["ddpm", "f_pndm", "deis", "unipc"])
def test_a_thousand_steps_in_float32(name):
    """No coefficient loses its digits where neighbouring levels are close: float32 agrees with float64."""
    x_T = np.random.default_rng(0).standard_normal((1, 2, 2, 1))
    results = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            results.append(sample(with_noise(name), x_T, np.arange(1000), dtype))
    assert_close(*results, 1e-3)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    with jax.enable_x64(True):
        arrays = golden("ddpm")
        options = {"noise_fn": injected(arrays["10/noise"], "float64"), "return_x0": True}
        x, x0 = sample(ddim, arrays["x_T"], arrays["10/seq"], "float64", eta=1.0, **options)
        small = {"variance": "small", "clip_x0": False}
        y, y0 = sample(ddpm, arrays["x_T"], arrays["10/seq"], "float64", **small, **options)
    # The same noise goes through both: equal paths mean equal means and equal variances at every step.
    assert_close(x, y, 1e-12)
    assert_close(x0, y0, 1e-12)


def test_deis_of_order_1_is_ddim():
    x_T, grid = golden("ddim")["x_T"], uniform_timesteps(1000, 10)
    assert_close(sample(deis, x_T, grid, "float32", order=1), golden("ddim")["uniform_10_eta0.0/x"], 1e-3)


def test_ddim_takes_a_traced_eta():
    arrays = golden("ddim")
    case = "uniform_20_eta0.5"
    run = jax.jit(
        lambda eta: ddim(
            golden_eps,
            arrays["x_T"].astype(np.float32),
            SCHEDULE,
            arrays[f"{case}/seq"],
            eta=eta,
            noise_fn=injected(arrays[f"{case}/noise"], jnp.float32),
        )
    )
    assert_close(run(0.5), arrays[f"{case}/x"], 1e-3)


def test_ddim_clips_x0_and_keeps_the_noise_that_agrees():
    x_T = np.array([-9.0, 0.0, 2.0, 9.0]).reshape(1, 2, 2, 1)
    with jax.enable_x64(True):
        _, free = sample(ddim, x_T, [99, 499, 999], "float64", return_x0=True)
        x_0, x0 = sample(ddim, x_T, [99, 499, 999], "float64", clip_x0=True, return_x0=True)
        assert np.abs(free[0]).max() > 1
        np.testing.assert_allclose(x0[0], np.clip(free[0], -1, 1))
        a, a_next = SCHEDULE.alpha_bar[999], SCHEDULE.alpha_bar[499]
        x_1 = np.sqrt(a_next) * x0[0] + np.sqrt((1 - a_next) / (1 - a)) * (x_T - np.sqrt(a) * x0[0])
        eps = golden_eps(np.asarray(x_1), np.array([499.0]))
        np.testing.assert_allclose(x0[1], np.clip((x_1 - np.sqrt(1 - a_next) * eps) / np.sqrt(a_next), -1, 1))
    np.testing.assert_array_equal(x_0, x0[-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_return_x0_gives_every_steps_prediction(name):
    x_T = np.random.default_rng(0).standard_normal((2, 2, 2, 1), np.float32)
    grid = uniform_timesteps(1000, 6)
    x_0, x0 = sample(with_noise(name), x_T, grid, "float32", return_x0=True)
    assert x0.shape == (6, *x_T.shape)
    signal, sigma = np.sqrt(SCHEDULE.alpha_bar[grid[-1]]), np.sqrt(1 - SCHEDULE.alpha_bar[grid[-1]])
    first = (x_T - sigma * golden_eps(x_T, np.full(2, grid[-1]))) / signal
    assert_close(x0[0], np.clip(first, -1, 1) if name in CLIPPING else first, 1e-5)
    # PNDM's last step looks back too; every other sampler ends with its last prediction.
    assert_close(x0[-1], x_0, 5e-2 if "pndm" in name else 1e-6)


def test_an_image_depends_on_its_own_seed_alone():
    shape, grid = (4, 4, 3), uniform_timesteps(1000, 5)

    @jax.jit
    def images(seed, indices):
        sampler = with_noise("ddim", per_image_noise(image_keys(seed, indices), shape))
        return sampler(golden_eps, initial_noise(seed, indices, shape), SCHEDULE, grid)

    together = np.asarray(images(7, np.arange(5)))
    np.testing.assert_allclose(images(7, np.array([4, 1])), together[[4, 1]], atol=1e-6)
    assert np.abs(images(8, np.array([4, 1])) - together[[4, 1]]).max() > 0.1
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_noise_streams_are_disjoint_and_standard_normal():
    shape, indices = (8, 8, 3), jnp.arange(32)

    @jax.jit
    def draw(seed):
        keys = image_keys(seed, indices)
        steps = jax.lax.map(per_image_noise(keys, shape), jnp.arange(4))
        draws = jnp.concatenate([initial_noise(seed, indices, shape)[None], steps])
        from_step_keys = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        training = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(seed), step))(jnp.arange(100))
        training = jax.vmap(lambda key: jax.vmap(lambda k: jax.random.fold_in(key, k))(indices))(training)
        return draws, from_step_keys, jax.random.key_data(keys), jax.random.key_data(training)

    draws, from_step_keys, sampling_keys, training_keys = map(np.asarray, draw(3))
    images = draws.reshape(len(draws) * len(indices), -1)
    correlation = images @ images.T / images.shape[1] - np.eye(len(images))
    assert np.abs(correlation).max() < 0.5
    assert abs(draws.mean()) < 0.03
    assert draws.std() == pytest.approx(1, abs=0.03)
    # The keys that steps are folded into are not drawn from, for x_T least of all.
    assert np.abs(draws[0] - from_step_keys).min(axis=0).max() > 0.1
    # Training folds its step and then other numbers into its seed: sampling with it meets none of these keys.
    assert not (sampling_keys[:, None, None] == training_keys).all(-1).any()


def test_samplers_can_be_vmapped():
    x_T = np.random.default_rng(0).standard_normal((6, 2, 2, 1), np.float32)
    run = functools.partial(f_pndm, golden_eps, schedule=SCHEDULE, timesteps=uniform_timesteps(1000, 5))
    mapped = jax.jit(jax.vmap(run))(x_T.reshape(3, 2, 2, 2, 1))
    np.testing.assert_allclose(mapped.reshape(x_T.shape), jax.jit(run)(x_T), atol=1e-6)


def test_arithmetic_stays_in_float32_around_a_bfloat16_network():
    x_T = jnp.zeros((2, 4, 4, 1))
    grid = uniform_timesteps(1000, 10)
    seen = []

    def bfloat16_eps(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return golden_eps(x, t).astype(jnp.bfloat16)

    for name in SAMPLERS:
        run = functools.partial(with_noise(name), bfloat16_eps, schedule=SCHEDULE, timesteps=grid)
        x_0 = jax.eval_shape(run, x_T)
        assert (x_0.dtype, x_0.shape) == (jnp.float32, x_T.shape)
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), (2,))}


def test_scale_eps_multiplies_by_the_levels_factor():
    scale = np.linspace(0.5, 1.0, 1000) ** 2
    x = np.random.default_rng(0).standard_normal((4, 2, 2, 1), np.float32)
    t = np.array([0.0, 10.0, 10.5, 999.0], np.float32)
    factor = np.array([scale[0], scale[10], (scale[10] + scale[11]) / 2, scale[999]]).reshape(4, 1, 1, 1)
    scaled = scale_eps(golden_eps, scale)
    np.testing.assert_allclose(scaled(x, t), factor * golden_eps(x, t), rtol=1e-4, atol=1e-6)
    half = scale_eps(lambda x, t: golden_eps(x, t).astype(jnp.bfloat16), scale)
    assert jax.eval_shape(half, x, t).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"scale has shape \(\)"):
        scale_eps(golden_eps, 0.9)


def test_slerp_runs_along_the_great_circle():
    x_a, x_b = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 3), np.float32)

    def norm(x):
        return np.sqrt((x**2).sum((-3, -2, -1)))

    def angle(a, b):
        return np.arccos((a * b).sum((-3, -2, -1)) / norm(a) / norm(b))

    # Equal norms are kept, and the angle is shared in proportion.
    x_b *= (norm(x_a) / norm(x_b))[:, None, None, None]
    between = np.asarray(jax.jit(slerp)(x_a, x_b, np.linspace(0, 1, 5, dtype=np.float32)[:, None]))
    assert between.shape == (5, 3, 8, 8, 3)
    np.testing.assert_array_equal(between[0], x_a)
    np.testing.assert_array_equal(between[-1], x_b)
    np.testing.assert_allclose(norm(between), np.tile(norm(x_a), (5, 1)), rtol=1e-5)
    np.testing.assert_allclose(angle(x_a, between[1]), angle(x_a, x_b) / 4, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(slerp)(x_a, x_a, 0.3), x_a, rtol=1e-5)


def test_log_alpha_bar_between_levels():
    t = jnp.array([-1.0, 0.0, 41.5, 999.0])
    table = np.log(SCHEDULE.alpha_bar)
    expected = [0, table[0], (table[41] + table[42]) / 2, table[999]]
    np.testing.assert_allclose(log_alpha_bar(SCHEDULE, t), expected, rtol=1e-6)


@pytest.mark.parametrize("name", _SPACING_FUNCTIONS)
def test_grids_have_exactly_the_steps_asked_for(name):
    for steps in (2, 7, 10, 20):
        grid = _SPACING_FUNCTIONS[name](1000, steps)
        assert len(grid) == steps
        np.testing.assert_array_equal(check_timesteps(1000, grid), grid)
    with pytest.raises(ValueError, match="steps=1001 is not"):
        _SPACING_FUNCTIONS[name](1000, 1001)


def test_budgets_become_steps():
    assert [steps_for_nfe(name, 20) for name in ("ddim", "f_pndm", "s_pndm", "unipc")] == [20, 11, 19, 20]
    for name in SAMPLERS:
        for nfe in range(13, 30):
            assert nfe_of(name, steps_for_nfe(name, nfe)) == nfe
    with pytest.raises(
        ValueError, match="nfe=12 is too few for f_pndm: its fewest steps make 13 evaluations"
    ):
        steps_for_nfe("f_pndm", 12)
    with pytest.raises(ValueError, match="steps=3 is too few for f_pndm: it needs at least 4"):
        nfe_of("f_pndm", 3)
    with pytest.raises(ValueError, match="sampler='euler' is not one of ddim, ddpm, "):
        nfe_of("euler", 10)


@pytest.mark.parametrize(
    ("sampler", "timesteps", "options", "message"),
    [
        (ddim, [0, 500, 400], {}, "not in ascending order"),
        (ddim, [0, 0, 400], {}, "not in ascending order"),
        (ddim, [-1, 400], {}, "from -1 to 400; T=1000 allows 0 to 999"),
        (ddim, [0, 1000], {}, "from 0 to 1000"),
        (ddim, [0.5, 10], {}, "not whole numbers"),
        (ddim, [], {}, "steps=0 is not"),
        (ddim, [[0, 10]], {}, "has shape"),
        (ddim, range(1001), {}, "steps=1001 is not"),
        (ddim, [0, 500], {"eta": 1.5}, "eta=1.5 is not allowed"),
        (ddim, [0, 500], {"eta": 0.5}, "noise_fn must say"),
        (ddpm, [0, 500], {"noise_fn": None, "variance": "medium"}, "variance='medium' is not allowed"),
        (f_pndm, [0, 250, 500], {}, "steps=3 is too few for this PNDM: it needs at least 4"),
        (s_pndm, [0], {}, "it needs at least 2"),
        (s_pndm, [0, 500], {"pndm_convention": "torch"}, "pndm_convention='torch' is not allowed"),
        (s_pndm, [0, 999], {"pndm_convention": "published"}, "must end below T−1=999"),
        (deis, [0, 500], {"order": 4}, "order=4 is not allowed"),
    ],
)
def test_bad_input_is_refused(sampler, timesteps, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(golden_eps, jnp.zeros((1, 2, 2, 1)), SCHEDULE, timesteps, **options)


def test_bad_shapes_of_traced_grids_are_refused():
    def run(sampler, grid, **options):
        x = jnp.zeros((1, 2, 2, 1))
        jax.eval_shape(lambda grid: sampler(golden_eps, x, SCHEDULE, grid, **options), grid)

    with pytest.raises(ValueError, match=r"timesteps has shape \(1001,\)"):
        run(ddim, np.arange(1001))
    with pytest.raises(ValueError, match="must end below T−1=999"):
        run(f_pndm, np.arange(1000), pndm_convention="published")
