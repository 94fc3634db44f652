"""The papers' configs: every method, the published values of their fields, published parameter counts."""

from pathlib import Path

import pytest
from helpers import load_file

from s2dm_jax.config.build import build_network, build_objective
from s2dm_jax.config.defaults import default_config, image_shape
from s2dm_jax.config.presets import OBJECTIVES, set_objective
from s2dm_jax.config.validate import check_config
from s2dm_jax.models.network import num_params

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = ("cifar10", "celeba64", "celebahq256")


def load(name, *method):
    return load_file(CONFIGS / f"{name}.py").get_config(*method)


@pytest.mark.parametrize("name", PAPERS)
def test_every_method_and_combination_makes_a_config(name):
    check_config(load(name))
    for method in (*OBJECTIVES, "s2_10+sa_2", "sa_4+s2_50", "ddpm+cosine", "s2_2+sa_3+cosine", "linear+sa_2"):
        config = load(name, method)
        check_config(config)
        assert build_objective(config).has_skip == ("s2" in method)
        assert build_objective(config).has_sequence == ("sa" in method)
        assert config.diffusion.schedule == ("cosine" if "cosine" in method else "linear")


def test_methods_are_the_papers():
    assert [load("cifar10", f"s2_{n}").loss.skip for n in (2, 10, 50)] == [2, 10, 50]
    # SA-DPM, section on the weight λ: these "consistently outperform DPM".
    assert [(load("cifar10", f"sa_{K}").loss.K, load("cifar10", f"sa_{K}").loss.lam) for K in (2, 3, 4)] == [
        (2, 1.0),
        (3, 0.3),
        (4, 0.2),
    ]
    assert load("celebahq256", "sa_2").loss.lam == 0.1
    both = load("cifar10", "s2_10+sa_2").loss
    assert (both.skip, both.tau, both.K, both.lam) == (10, 0.99, 2, 1.0)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("s2_3", "method 's2_3' is not known; choose one of ddpm, s2_2"),
        ("", "method '' is not known"),
        ("s2_2+s2_10", "exclude one another"),
        ("ddpm+sa_2", "exclude one another"),
        ("sa_2+linear+cosine", "exclude one another"),
    ],
)
def test_methods_that_make_no_sense(method, sentence):
    with pytest.raises(ValueError, match=sentence.replace("+", r"\+")):
        set_objective(default_config(), method)


# Table 1.4; CelebA-HQ: 1.6. Steps: S²-DMs section 4; epochs × steps of 1.6.
VALUES = {
    "cifar10": (32, (1, 2, 2, 2), 0.1, True, 128, 2e-4, 1.0, 0.9999, 600_000, 1_200 * 390),
    "celeba64": (64, (1, 2, 2, 2, 4), 0.1, True, 128, 2e-4, 1.0, 0.9999, 400_000, 1_200 * 1_271),
    "celebahq256": (256, (1, 1, 2, 2, 4, 4), 0.0, False, 24, 2e-5, 0.0, 0.999, 900 * 1_125, 900 * 1_125),
}


@pytest.mark.parametrize(
    ("name", "count"), [*zip(PAPERS, (35_746_307, 78_700_803, 113_673_219), strict=True)]
)
def test_values_and_parameter_counts_are_the_published_ones(name, count):
    c = load(name, "s2_10")
    actual = (
        image_shape(c)[0],
        c.model.ch_mult,
        c.model.dropout,
        c.data.random_flip,
        c.train.batch_size,
        c.train.lr,
        c.train.grad_clip,
        c.train.ema_decay,
        c.train.steps,
        load(name, "sa_2").train.steps,
    )
    assert actual == VALUES[name]
    assert (c.model.ch, c.model.num_res_blocks, c.model.attn_resolutions) == (128, 2, (16,))
    assert (c.diffusion.T, c.diffusion.schedule) == (1000, "linear")
    assert num_params(build_network(c)) == count
