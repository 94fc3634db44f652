"""The interface of a network: one of 20 lines is trained, sampled, evaluated and exported."""

import jax
import numpy as np
import pytest
from helpers import ToyNetwork, small_config

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import network_of
from s2dm_jax.config.validate import check_config
from s2dm_jax.data.datasets import load_dataset
from s2dm_jax.diffusion.parameterization import PREDICTIONS, eps_fn
from s2dm_jax.diffusion.schedule import cosine_schedule, linear_schedule
from s2dm_jax.evaluation.evaluate import evaluate
from s2dm_jax.inference.model import load
from s2dm_jax.models.network import NETWORKS, num_params, with_features
from s2dm_jax.models.unet import UNet
from s2dm_jax.samplers.ddim import ddim
from s2dm_jax.samplers.timesteps import uniform_timesteps
from s2dm_jax.training.loop import train
from s2dm_jax.weights.export import export

NETWORK = ToyNetwork()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the toy network."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    config = small_config(**{"train.steps": 20, "train.log_every": 10, "eval.num_images": 80})
    train(config, workdir, network=NETWORK)
    return workdir


def test_a_toy_network_trains_and_samples(run):
    model = load(run, network=NETWORK)
    assert model.step == 20
    assert jax.tree.map(np.shape, model.ema_params) == jax.tree.map(np.shape, NETWORK.init(0))
    assert all(
        (leaf != fresh).any()
        for leaf, fresh in zip(*map(jax.tree.leaves, (model.ema_params, NETWORK.init(0))), strict=True)
    )
    for sampler in ("ddim", "ddpm", "dpmpp_2m", "unipc"):
        images = model.sample(3, sampler, nfe=5)
        assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert num_params(NETWORK) == 16 + 16 + 16


def test_a_toy_network_is_evaluated(run, tmp_path):
    model = load(run, network=NETWORK)
    model.config.eval.update({"nfe": (3,), "samplers": "ddim,analytic", "num_images": 80, "noise_stat_images": 4})
    results = evaluate(model, load_dataset(model.config), tmp_path)
    assert [row["name"] for row in results["rows"]] == [
        "real (floor)",
        "ddim, quadratic",
        "analytic, quadratic",
        "noise (ceiling)",
    ]
    assert all(np.isfinite(row["frechet_distance"]) for row in results["rows"])


def test_a_toy_network_is_exported(run):
    model = load(run, network=NETWORK)
    model.config.sample.update({"nfe": 4, "steps": 0})
    file = export(model.config, str(run), network=NETWORK)
    again = load(file, network=NETWORK)
    np.testing.assert_array_equal(again.sample(2, nfe=4), model.sample(2, nfe=4))


def test_a_network_without_features_has_no_variance_head():
    with pytest.raises(UserError, match="ToyNetwork has no features for a variance head to read"):
        with_features(NETWORK)


def test_every_network_of_the_table_is_what_a_config_builds():
    for name in NETWORKS:
        config = small_config(**{"model.name": name, "model.prediction": "v"})
        network = network_of(config, "float32")
        assert (network.image_shape, network.prediction, network.dropout) == ((8, 8, 1), "v", 0.1)


def test_a_prediction_that_a_network_does_not_have_is_an_error(monkeypatch):
    monkeypatch.setattr("s2dm_jax.config.build.network_class", lambda name: ToyNetwork)
    network_of(small_config(), "float32")
    with pytest.raises(UserError, match=r"config\.model\.prediction='v' is not a field of ToyNetwork"):
        check_config(small_config(**{"model.prediction": "v"}))


@pytest.mark.parametrize("schedule", [linear_schedule(50, 1e-3, 0.2), cosine_schedule(50)], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whatever_a_network_predicts_sampling_is_that_of_its_epsilon(prediction, schedule):
    def predicted(x, t):
        """The prediction that stands for ε = 0.3·x, by the definitions of v and x_0."""
        alpha_bar = np.asarray(schedule.alpha_bar)[np.asarray(t, int)].reshape(-1, 1, 1, 1)
        alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        eps = 0.3 * x
        x0 = (x - sigma * eps) / alpha
        return {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0}[prediction]

    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1)).astype(np.float32)
    t = np.array([0, 10, 30, 49], np.float32)
    np.testing.assert_allclose(eps_fn(predicted, schedule, prediction)(x, t), 0.3 * x, rtol=2e-4, atol=2e-5)


def test_a_unet_that_predicts_v_samples_like_its_epsilon():
    """The same weights read as v give the images of ε computed from v by hand, and others than read as ε."""
    schedule, timesteps = linear_schedule(50, 1e-3, 0.2), uniform_timesteps(50, 5)
    shape = (8, 1, 1, 32, (1,), 1, ())
    of_eps, of_v = UNet(*shape), UNet(*shape, prediction="v")
    params, x_T = of_eps.init(0), np.random.default_rng(1).standard_normal((2, 8, 8, 1)).astype(np.float32)

    def by_hand(x, t):
        alpha_bar = jax.numpy.asarray(schedule.alpha_bar, "float32")[t.astype(int)].reshape(-1, 1, 1, 1)
        return jax.numpy.sqrt(alpha_bar) * of_eps.apply(params, x, t) + jax.numpy.sqrt(1 - alpha_bar) * x

    sampled, expected, other = (
        ddim(function, x_T, schedule, timesteps)
        for function in (of_v.eps_fn(params, schedule), by_hand, of_eps.eps_fn(params, schedule))
    )
    np.testing.assert_allclose(sampled, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(sampled - other).max() > 0.1
