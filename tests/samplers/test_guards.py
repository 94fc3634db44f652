"""An error of 1 % in ε stays small on every spacing: timesteps left out, steps refused, x_0 clipped."""

import itertools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, sampler_with_noise
from published import LINEAR, golden_eps, sample_golden

from s2dm_jax.diffusion.schedule import SCHEDULES, cosine_schedule, log_alpha_bar
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.guards import num_visitable
from s2dm_jax.samplers.specs import SAMPLERS, clips_x0, steps_for_nfe
from s2dm_jax.samplers.thresholding import threshold_eps, threshold_x0
from s2dm_jax.samplers.timesteps import SPACINGS, TimestepSpec, plan_timesteps, unvisited_note

COSINE = cosine_schedule()
# Data of mean 0 and this deviation: a Gaussian, and two modes at ±0.49 of deviation 0.1.
STD, MODE, WIDTH = 0.5, 0.49, 0.1
# Quantiles of the normal distribution, and the errors in ε.
X_T = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)], np.float32).reshape(1, 4, 4, 1)
DATA, ERRORS = ("gaussian", "two modes"), (0.01, -0.01)
# The spacings of the default suite; the others are slow.
FEW = ("uniform", "linspace", "karras")


def exact_eps(alpha_bar, x, two_modes):
    """The noise expected in x for the data."""
    signal, noise = jnp.sqrt(alpha_bar), 1 - alpha_bar
    var, width = STD**2 * alpha_bar + noise, WIDTH**2 * alpha_bar + noise
    mode = MODE * jnp.tanh(MODE * signal * x / width)
    return jnp.sqrt(noise) * jnp.where(two_modes, (x - signal * mode) / width, x / var)


def program_of(name, schedule, **options):
    """The compiled sampler of (timesteps, whether the data have two modes, the relative error in ε)."""

    @jax.jit
    def run(timesteps, two_modes, error):
        def eps(x, t):
            alpha_bar = jnp.exp(log_alpha_bar(schedule, t, x.dtype)).reshape(-1, 1, 1, 1)
            return exact_eps(alpha_bar, x, two_modes) * (1 + error)

        def noise(step):
            return 1.4 * jnp.sin(1.7 * step + 2.3 * jnp.arange(16.0)).reshape(X_T.shape)

        return sampler_with_noise(name, noise)(eps, X_T, schedule, timesteps, **options)

    return run


def largest_rms(name, schedule, spacings, nfe, **options):
    """Of the runs with 1 % error on both data; NaN counts as infinite. Refused ones are left out, with a sentence."""
    try:
        spec = TimestepSpec(steps_for_nfe(name, nfe))
    except ValueError:
        return 0.0
    run, found = program_of(name, schedule, **options), [0.0]
    for spacing in spacings:
        request = spec._replace(timestep_spacing=spacing)
        try:
            timesteps = plan_timesteps(1000, name, request, log_snr=schedule.log_snr, **options)
        except ValueError as refusal:
            if "in steps above" not in str(refusal):
                raise
            continue
        for data, error in itertools.product(DATA, ERRORS):
            x = np.asarray(run(timesteps, data == "two modes", error))
            found.append(float(np.nan_to_num(np.sqrt(np.mean(np.square(x))), nan=np.inf)))
    return max(found)


@pytest.mark.slow
@pytest.mark.parametrize("nfe", [5, 10, 50])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_error_of_1_percent_stays_within_3_deviations_of_the_data(name, schedule, nfe):
    spacings = [spacing for spacing in SPACINGS if spacing != "optimal"]
    assert largest_rms(name, SCHEDULES[schedule](), spacings, nfe) < 3 * STD


@pytest.mark.parametrize("name", ["ddim", "deis", "unipc", "s_pndm", "heun"])
def test_an_error_of_1_percent_stays_small_on_the_cosine_schedule(name):
    assert largest_rms(name, COSINE, FEW, 9 if name == "heun" else 10) < 3 * STD


@pytest.mark.parametrize("options", [{"clip_x0": True}, {"dynamic_threshold": 0.9}], ids=["clip", "dynamic"])
@pytest.mark.parametrize("name", ["s_pndm", "heun"])
def test_clipping_visits_all_timesteps_and_bounds_every_result(name, options):
    timesteps = plan_timesteps(
        1000, name, TimestepSpec(4, timestep_spacing="linspace"), log_snr=COSINE.log_snr, **options
    )
    assert timesteps[-1] == 999
    run = program_of(name, COSINE, **options)
    for data, error in itertools.product(DATA, ERRORS):
        assert np.abs(run(timesteps, data == "two modes", error)).max() < 1 + 1e-3


def test_without_the_bound_the_result_explodes():
    """What the guards are for; the same runs as above."""
    for name, least in (("ddim", 3), ("unipc", 5)):
        timesteps = np.round(np.linspace(0, 999, 5)).astype(np.int32)
        assert np.std(program_of(name, COSINE)(timesteps, False, 0.01)) > least


@pytest.mark.parametrize(
    ("name", "options", "visitable"),
    [
        ("ddim", {}, 996),
        ("ddim", {"clip_x0": True}, 1000),
        ("ddim", {"dynamic_threshold": 0.995}, 1000),
        ("ddpm", {}, 1000),
        ("ddpm", {"clip_x0": False}, 996),
        ("analytic", {"clip_x0": None}, 1000),
        ("s_pndm", {"pndm_convention": "published"}, 995),
    ],
)
def test_which_timesteps_may_be_visited(name, options, visitable):
    assert num_visitable(1000, name, -5.1, COSINE.log_snr, **options) == visitable
    assert clips_x0(name, **options) == (visitable == 1000)
    # DDPM's own schedule has no such timesteps.
    assert num_visitable(1000, name, -5.1, LINEAR.log_snr, **options) == 1000


def test_spacings_end_where_the_bound_is_and_say_so():
    def plan(spec, **options):
        return plan_timesteps(1000, "ddim", spec, log_snr=COSINE.log_snr, **options).tolist()

    linspace = TimestepSpec(4, timestep_spacing="linspace")
    assert plan(linspace) == [0, 332, 663, 995]
    note = unvisited_note(1000, "ddim", linspace, COSINE.log_snr)
    assert note.startswith("timesteps 996 to 999 are not visited by ddim: log(alpha/sigma) is below min_log_snr=-5.1")
    # The published spacings that end below stay as they are, and so do those of samplers that clip.
    assert plan(TimestepSpec(4)) == [0, 250, 500, 750]
    assert unvisited_note(1000, "ddim", TimestepSpec(4), COSINE.log_snr) == ""
    for change in ({"clip_x0": True}, {"dynamic_threshold": 1.0}):
        assert plan(linspace, **change) == [0, 333, 666, 999]
        assert unvisited_note(1000, "ddim", linspace, COSINE.log_snr, **change) == ""
    for bound in (-1000.0, -np.inf):
        assert plan(linspace._replace(min_log_snr=bound)) == [0, 333, 666, 999]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TimestepSpec(timesteps=(0, 999)), "timesteps end at 999, but the last with .* is timestep 995, and ddim"),
        (TimestepSpec(997), "steps=997 end at 9.., but the last .* give clip_x0=True, dynamic_threshold=0.995"),
        (TimestepSpec(nfe=1000), "nfe=1000 is not possible: steps=1000 end at 999"),
        (TimestepSpec(3, min_log_snr=20.0), "with log.* of min_log_snr=20 or more is none"),
    ],
)
def test_timesteps_beyond_the_bound_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        plan_timesteps(1000, "ddim", spec, log_snr=COSINE.log_snr)


def test_steps_that_multiply_the_networks_error_are_refused():
    spec = TimestepSpec(3, timestep_spacing="linspace")
    with pytest.raises(
        ValueError, match=r"timesteps 995 and 497 are 5.1 apart .*, and heun .* above 2.4; give clip_x0"
    ):
        plan_timesteps(1000, "heun", spec, log_snr=COSINE.log_snr)
    for name, options in (("heun", {"clip_x0": True}), ("unipc", {})):
        assert len(plan_timesteps(1000, name, spec, log_snr=COSINE.log_snr, **options)) == 3


def test_dynamic_thresholding_is_imagens_and_of_each_image_alone():
    x0 = np.random.default_rng(0).normal(0, 2, (3, 4, 4, 2)).astype(np.float32)
    x0[2] /= 10
    bounded = np.asarray(threshold_x0(x0, False, 0.9))
    for image, result in zip(x0, bounded, strict=True):
        s = max(1, np.quantile(np.abs(image), 0.9))
        np.testing.assert_allclose(result, np.clip(image, -s, s) / s, rtol=1e-5)
    np.testing.assert_allclose(bounded[2], x0[2], rtol=1e-6)
    np.testing.assert_array_equal(threshold_x0(x0[1:2], True, 0.9), bounded[1:2])


@pytest.mark.parametrize("options", [{"clip_x0": True}, {"dynamic_threshold": 0.8}], ids=["clip", "dynamic"])
def test_the_bounded_network_is_ddims_own_clipping(options):
    x_T = np.random.default_rng(0).normal(0, 3, (2, 2, 2, 1))

    def at(t):
        return log_alpha_bar(LINEAR, t, "float64")

    with jax.enable_x64(True):
        own = sample_golden(ddim, x_T, [0, 499, 999], "float64", **options)
        wrapped = ddim(threshold_eps(golden_eps, at, **options), x_T, LINEAR, [0, 499, 999])
    assert_close(wrapped, own, 1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_a_dynamic_threshold(name):
    x_T = np.random.default_rng(0).normal(0, 3, (2, 2, 2, 1)).astype(np.float32)
    run = sampler_with_noise(name)
    timesteps = np.array([0, 150, 330, 700], np.int32)
    x = run(golden_eps, x_T, LINEAR, timesteps, dynamic_threshold=0.7)
    assert np.abs(x).max() <= 1 + 1e-5
    # An image depends on its own values alone.
    assert_close(run(golden_eps, x_T[:1], LINEAR, timesteps, dynamic_threshold=0.7), x[:1], 1e-5)
    with pytest.raises(ValueError, match=r"dynamic_threshold=99\.5 is not allowed: it must be a fraction"):
        run(golden_eps, x_T, LINEAR, timesteps, dynamic_threshold=99.5)
