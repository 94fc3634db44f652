"""The objectives and the training step against the published code, and their identities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY
from published import group, published_run
from torch_random import sketch

from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.objectives import Term, paper, released
from s2dm_jax.diffusion.schedule import add_noise, cosine_schedule, linear_schedule
from s2dm_jax.models.flops import equations

SCHEDULE = linear_schedule()


@pytest.mark.parametrize("name", ["train_ddpm.npz", "train_sa2.npz", "train_sa3.npz", "train_s2.npz"])
def test_published_training_loop(golden, name):
    arrays = golden(name)
    history, params, ema = published_run(arrays)
    np.testing.assert_allclose(history[:, 0], arrays["loss"], rtol=1e-3)
    np.testing.assert_allclose(history[:, 1], arrays["grad_norm"], rtol=1e-3)
    init, published_move = group(arrays, "init/"), arrays["final_sketch"]
    move = sketch({k: params[k].astype(np.float64) - init[k] for k in init})
    assert np.linalg.norm(move - published_move) <= 0.01 * np.linalg.norm(published_move)
    for k, expected in group(arrays, "ema/").items():
        # Five steps move the average by 2e-7, near float32's rounding; started after the first step (as
        # SA-DPM's code does) it would have moved by the learning rate, 2e-4.
        np.testing.assert_allclose(ema[k], expected, atol=1.5e-7)


def linear_net(scale=0.7):
    return lambda x, t: scale * x + 0.1 * jnp.sin(t / 100).reshape(-1, *[1] * (x.ndim - 1))


def batch(objective, size=6, shape=(4, 4, 1), T=1000, seed=0):
    key, x_key = jax.random.split(jax.random.key(seed))
    x0 = jax.random.uniform(x_key, (size, *shape), minval=-1, maxval=1)
    return x0, objectives.sample_noise(objective, key, T, x0.shape)


@pytest.mark.parametrize("preset", [paper, released])
@pytest.mark.parametrize(
    "reduced", [{"K": 1, "lam": 2.0}, {"K": 3, "lam": 0.0}, {"skip": 10, "tau": 1.0}, {"skip": 0, "tau": 0.5}]
)
def test_reduces_exactly_to_the_plain_objective(preset, reduced):
    plain, same = preset(reduction="sum"), preset(reduction="sum", **reduced)
    x0, sample = batch(plain)
    expected, _ = objectives.loss(linear_net(), SCHEDULE, plain, x0, sample)
    x0, sample = batch(same)
    actual, terms = objectives.loss(linear_net(), SCHEDULE, same, x0, sample)
    np.testing.assert_array_equal(actual, expected)
    assert terms.keys() == {"simple"}


def loss_in_numpy(objective, x0, sample, net):
    """L for one example at a time, in float64, as the papers' formulas read."""
    a, totals = SCHEDULE.alpha_bar, []
    for i, t in enumerate(np.asarray(sample.t)):
        residuals = []
        for k in range(objective.num_timesteps_per_image):
            s = t + k if objective.window == "forward" else t - k
            first = 1 if objective.window_boundary == "inner" else 0
            clipped = np.clip(s, 0, 999)
            e = np.asarray(sample.noise[i, k], np.float64)
            x = np.sqrt(a[clipped]) * np.asarray(x0[i], np.float64) + np.sqrt(1 - a[clipped]) * e
            f = np.asarray(net(x[None], np.array([clipped])), np.float64)[0]
            if k == 0:
                f0, e0 = f, e
            weight = 1.0 if first <= s < 1000 else 0.0
            if objective.use_tau_s and weight:
                weight = tau_by_induction(SCHEDULE)[clipped]
            residuals.append(weight * (f - e))
        reduce = np.sum if objective.reduction == "sum" else np.mean
        simple = total = reduce((e0 - f0) ** 2)
        factors = objective.skip_factors
        if objective.skip and not (t < factors and objective.skip_boundary == "plain"):
            a_skip = np.prod(SCHEDULE.alpha[max(t - factors + 1, 0) : t + 1])
            c = np.sqrt(1 - a_skip) / np.sqrt(a_skip)
            target = e0 if objective.skip_noise == "shared" else np.asarray(sample.skip_noise[i])
            total = objective.tau * simple + (1 - objective.tau) * reduce((target - c * f0) ** 2)
        if objective.num_timesteps_per_image > 1:
            divisor = objective.K**2 if objective.sa_norm == "K^2" else objective.K
            total += objective.lam * reduce(sum(residuals) ** 2) / divisor
        totals.append(total)
    return np.array(totals)


def tau_by_induction(schedule):
    """τ_s of Theorem 1 from its recursion: the error at timestep s is carried down by γ₂ at every step."""
    a, before = schedule.alpha_bar, schedule.alpha_bar_with_x0[:-1]
    gamma_1 = np.sqrt(before) * schedule.beta / (1 - a)
    gamma_2 = np.sqrt(schedule.alpha) * (1 - before) / (1 - a)
    own = gamma_1 * np.sqrt((1 - a) / a)
    carried = np.concatenate([[0.0, 1.0], np.cumprod(gamma_2[1:-1])])
    return carried * own


@pytest.mark.parametrize(
    "objective",
    [
        paper(skip=10, K=2, lam=1.0),
        paper(skip=50, tau=0.9, K=4, lam=0.3),
        paper(K=3, lam=2.0, use_tau_s=True),
        paper(K=3, lam=0.5, sa_norm="K", window="backward", window_boundary="all"),
        released(skip=10, K=3, lam=0.3),
        released(skip=2, reduction="mean"),
    ],
)
def test_formulas_timestep_by_timestep(objective):
    t = jnp.array([0, 1, 2, 8, 9, 10, 500, 997, 998, 999])
    x0, sample = batch(objective, size=len(t))
    sample = sample._replace(t=t)
    actual, _ = objectives.loss(linear_net(), SCHEDULE, objective, x0, sample)
    np.testing.assert_allclose(actual, loss_in_numpy(objective, x0, sample, linear_net()), rtol=1e-4)


def test_published_values_of_tau_s():
    ours = objectives.tau_s(SCHEDULE)
    np.testing.assert_allclose(ours, tau_by_induction(SCHEDULE), rtol=1e-9)
    # The paper counts from 1.
    published = {2: 8.1e-3, 10: 4.0e-4, 100: 6.1e-6, 500: 3.2e-7, 1000: 1.3e-8}
    for s, value in published.items():
        np.testing.assert_allclose(ours[s - 1], value, rtol=0.02)


def test_released_code_drops_one_factor_of_alpha_skip():
    c = objectives.skip_ratio(SCHEDULE, released(skip=10))
    np.testing.assert_allclose(c[999], 0.446, atol=5e-4)
    np.testing.assert_allclose(objectives.skip_ratio(SCHEDULE, released(skip=50))[999], 1.276, atol=5e-4)
    with_ten = np.prod(SCHEDULE.alpha[990:1000])
    assert objectives.alpha_skip(SCHEDULE, paper(skip=10).skip_factors)[999] == pytest.approx(with_ten)


def test_network_is_called_once_whatever_K():
    calls = []

    def net(x, t):
        calls.append(x.shape)
        return x

    objective = released(skip=10, K=4, lam=1.0)
    x0, sample = batch(objective)
    objectives.loss(net, SCHEDULE, objective, x0, sample)
    assert calls == [(6 * 4, 4, 4, 1)]


def test_products_of_the_loss_keep_float32_on_accelerators():
    objective, x0 = paper(K=3, lam=1.0, skip=2), np.ones((2, 4, 4, 1), np.float32)
    sample = objectives.sample_noise(objective, jax.random.key(0), 10, x0.shape)

    def mean_loss(scale):
        return objectives.loss(lambda x, t: scale * x, linear_schedule(10, 1e-4, 0.02), objective, x0, sample)[0].mean()

    program = jax.make_jaxpr(jax.grad(mean_loss))(1.0)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert products
    for product in products:
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_convolutions_in_the_compiled_program_do_not_grow_with_K():
    params = TINY.param_shapes()

    def convolutions(objective):
        def mean_loss(params, x0, key):
            eps_fn = functools.partial(TINY.apply, params)
            sample = objectives.sample_noise(objective, key, SCHEDULE.T, x0.shape)
            return objectives.loss(eps_fn, SCHEDULE, objective, x0, sample)[0].mean()

        x0 = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
        program = jax.jit(jax.grad(mean_loss)).lower(params, x0, jax.random.key(0)).compile()
        return program.as_text().count(" convolution(")

    plain = convolutions(paper())
    # A layer has one convolution forward and two backward, less the one towards the noisy images.
    layers = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(params))
    assert plain == 3 * layers - 1
    assert convolutions(paper(skip=10, K=4, lam=1.0)) == plain


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule()])
def test_skip_objective_is_a_quadratic_around_a_scaled_target(noise, schedule):
    objective = paper(skip=10, tau=0.95, skip_noise=noise)
    w, s, k = objectives.skip_quadratic(schedule, objective)
    c = objectives.skip_ratio(schedule, objective)
    rng = np.random.default_rng(0)
    for t in (0, 5, 300, 999):
        f, e = rng.standard_normal((2, 100_000))
        second = e if noise == "shared" else rng.standard_normal(100_000)
        direct = 0.95 * (e - f) ** 2 + 0.05 * (second - c[t] * f) ** 2
        completed = w[t] * (f - s[t] * e) ** 2 + k[t] * e**2
        if noise == "shared":
            np.testing.assert_allclose(direct, completed, rtol=1e-6, atol=1e-9)
        else:
            # Equal on average over the second noise: compare with the standard error of the mean.
            error = (direct - completed).std() / np.sqrt(len(e))
            assert abs((direct - completed).mean()) < 4 * error


def test_published_optima_of_the_skip_objective():
    released_10 = objectives.skip_scale(SCHEDULE, 10, preset="released")
    np.testing.assert_allclose(released_10[[9, 500, 999]], [0.99998, 0.99905, 0.99800], atol=6e-6)
    released_50 = objectives.skip_scale(SCHEDULE, 50, preset="released")
    np.testing.assert_allclose(released_50[[49, 500, 999]], [0.9997, 0.9939, 0.9838], atol=6e-5)
    assert (objectives.skip_scale(SCHEDULE, 10) > 1).all()
    assert objectives.skip_scale(SCHEDULE, 50)[999] < 1
    np.testing.assert_array_equal(objectives.skip_scale(SCHEDULE, 0), 1)
    np.testing.assert_array_equal(objectives.skip_scale(SCHEDULE, 10, tau=1.0), 1)


def test_expected_target_has_the_same_mean_gradient_and_less_variance():
    shape, t = (1, 8, 8, 1), 800
    independent = released(skip=50, tau=0.5, reduction="mean")
    expected = dataclasses.replace(independent, skip_noise="expected")

    def gradient(objective, key):
        x_key, key = jax.random.split(key)
        x0 = jax.random.uniform(x_key, shape, minval=-1, maxval=1)
        sample = objectives.sample_noise(objective, key, 1000, shape)._replace(t=jnp.array([t]))
        return jax.grad(lambda a: objectives.loss(lambda x, _: a * x, SCHEDULE, objective, x0, sample)[0].sum())(0.8)

    keys = jax.random.split(jax.random.key(0), 20_000)
    g_independent = jax.vmap(lambda k: gradient(independent, k))(keys)
    g_expected = jax.vmap(lambda k: gradient(expected, k))(keys)
    # The same keys draw the same timesteps and first noise, so the difference is the second noise's alone.
    difference = np.asarray(g_independent - g_expected)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))
    assert g_expected.var() < 0.5 * g_independent.var()


def test_samples_cover_all_timesteps_and_are_mirrored_when_antithetic():
    key = jax.random.key(0)
    t = objectives.sample_noise(paper(), key, 10, (20_000, 1, 1, 1)).t
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    t = np.asarray(objectives.sample_noise(released(), key, 10, (8, 1, 1, 1)).t)
    # n//2 + 1 free draws, then mirrors, cut to n (DDIM code).
    np.testing.assert_array_equal(t[5:], 9 - t[:3])


def test_second_noise_is_drawn_only_where_it_is_used():
    shape = (2, 4, 4, 1)
    assert objectives.sample_noise(released(skip=10), jax.random.key(0), 1000, shape).skip_noise.shape == shape
    for objective in (paper(skip=10), released(), released(skip=10, skip_noise="expected")):
        assert objectives.sample_noise(objective, jax.random.key(0), 1000, shape).skip_noise is None


def test_a_sample_without_the_second_noise_is_refused():
    objective, x0 = released(skip=10), jnp.zeros((2, 4, 4, 1))
    sample = objectives.sample_noise(objective, jax.random.key(0), 1000, x0.shape)._replace(skip_noise=None)
    with pytest.raises(ValueError, match=r"sample\.skip_noise is missing"):
        objectives.loss(lambda x, t: x, SCHEDULE, objective, x0, sample)


@pytest.mark.parametrize(
    ("objective", "formula"),
    [
        (paper(), "L_simple"),
        (paper(skip=10, tau=1.0, K=3), "L_simple"),
        (paper(skip=10), "0.99·L_simple + 0.01·L_skip (skip 10, shared noise)"),
        (paper(K=3, lam=0.5), "L_simple + 0.5·L_sa (K = 3)"),
        (
            released(skip=10, tau=0.9, K=2, lam=1.0),
            "0.9·L_simple + 0.1·L_skip (skip 10, independent noise) + 1·L_sa (K = 2)",
        ),
    ],
)
def test_an_objective_as_text_has_the_terms_of_its_loss(objective, formula):
    assert objective.formula == formula
    symbols = {"simple": "L_simple", "skip": "L_skip", "sequence": "L_sa"}
    assert objective.terms == tuple(name for name, symbol in symbols.items() if symbol in formula)
    x0, sample = batch(objective)
    _, terms = objectives.loss(linear_net(), SCHEDULE, objective, x0, sample)
    assert tuple(terms) == objective.terms


def test_a_new_term_is_one_entry_of_the_table(monkeypatch):
    def squared_prediction(schedule, objective, sample, timesteps, eps):
        return 0.5, jnp.square(eps[:, 0])

    x0, sample = batch(paper())
    plain, _ = objectives.loss(linear_net(), SCHEDULE, paper(), x0, sample)
    monkeypatch.setitem(objectives.TERMS, "power", Term(lambda o: True, lambda o: "0.5·‖ε_θ‖²", squared_prediction))
    total, terms = objectives.loss(linear_net(), SCHEDULE, paper(), x0, sample)
    assert paper().formula == "L_simple + 0.5·‖ε_θ‖²"
    x_t = add_noise(SCHEDULE, x0, sample.t, sample.noise[:, 0])
    np.testing.assert_allclose(terms["power"], jnp.square(linear_net()(x_t, sample.t)).sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(total, plain + 0.5 * terms["power"], rtol=1e-6)


def test_noised_images_have_the_forward_process_moments():
    x0 = jnp.full((100_000, 1, 1, 1), 0.5)
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    x_t = add_noise(SCHEDULE, x0, jnp.full(len(x0), 300), noise)
    a = SCHEDULE.alpha_bar[300]
    np.testing.assert_allclose(x_t.mean(), 0.5 * np.sqrt(a), atol=5e-3)
    np.testing.assert_allclose(x_t.var(), 1 - a, rtol=0.02)
