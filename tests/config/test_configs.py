"""The papers' configs: every objective, the published values and parameter counts."""

from pathlib import Path

import pytest
from helpers import load_file

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.build import build_network, build_objective
from s2dm_jax.config.datasets import CROPS, DATASETS
from s2dm_jax.config.defaults import default_config, image_shape
from s2dm_jax.config.presets import ALIASES, HEADS, OBJECTIVES, set_objective
from s2dm_jax.config.validate import check_config
from s2dm_jax.data.cache import check_preparable
from s2dm_jax.data.datasets import saturation_at_hand
from s2dm_jax.models.network import num_params

CONFIGS = Path(__file__).parents[2] / "configs"
# The networks are those of the golden parameter counts.
PAPERS = {
    "cifar10": "cifar10",
    "celeba64": "celeba",
    "celebahq256": "celebahq",
    "ffhq64": "celeba",
    "afhqv2_64": "celeba",
    "lsun256": "celebahq",
}
JOINED = ("s2_10+sa_2", "sa_4+s2_50", "ddpm+cosine", "s2_2+sa_3+cosine", "linear+sa_2", "s2sa+cosine")


def load(name, *objective):
    return load_file(CONFIGS / f"{name}.py").get_config(*objective)


@pytest.mark.parametrize("name", [*PAPERS, "cifar10_improved", "digits"])
def test_every_objective_and_combination_makes_a_config(name):
    check_config(load(name))
    for objective in (*OBJECTIVES, *ALIASES, *JOINED):
        config = load(name, objective)
        check_config(config)
        assert build_objective(config).has_skip == ("s2" in objective)
        assert build_objective(config).has_sequence == ("sa" in objective)
        assert config.diffusion.schedule == ("cosine" if "cosine" in objective else "linear")
        assert config.variance_head.kind == ""
    for kind in HEADS:
        assert load(name, kind).variance_head.kind == kind
        with pytest.raises(ValueError, match=f"objective '{kind}\\+cosine' is not valid"):
            load(name, f"{kind}+cosine")


def test_an_objective_sets_what_its_name_says_and_nothing_else():
    plain = load("cifar10", "ddpm").loss.to_dict()
    for name in OBJECTIVES.keys() - {"ddpm"}:
        kind, _, number = name.partition("_")
        loss = load("cifar10", name).loss.to_dict()
        fields = {"s2": ["skip"], "sa": ["K", "lam"]}[kind]
        assert [field for field in loss if loss[field] != plain[field]] == fields
        assert loss[fields[0]] == int(number)
    # SA-DPM, section on the weight λ: the larger K, the smaller the best λ.
    weights = [load("cifar10", f"sa_{K}").loss.lam for K in (2, 3, 4)]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("name", [*PAPERS, "cifar10_improved", "digits"])
def test_joined_objectives_are_the_parts_in_any_order(name):
    skip, sequence = load(name, "s2_10").loss, load(name, "sa_2").loss
    both = load(name, "s2_10+sa_2")
    assert (both.loss.skip, both.loss.K, both.loss.lam) == (skip.skip, sequence.K, sequence.lam)
    for same in ("sa_2+s2_10", "s2sa", "s2+sa", "s2_10+sa_2+linear"):
        assert load(name, same).to_dict() == both.to_dict()


@pytest.mark.parametrize(
    ("objective", "sentence"),
    [
        ("s2_3", "objective 's2_3' is not valid; choose one of ddpm, s2_2"),
        ("", "objective '' is not valid"),
        ("s2_2+s2_10", "exclude one another"),
        ("s2sa+sa_3", "exclude one another"),
        ("ddpm+sa_2", "exclude one another"),
        ("sa_2+linear+cosine", "exclude one another"),
    ],
)
def test_objectives_that_make_no_sense(objective, sentence):
    with pytest.raises(ValueError, match=sentence.replace("+", r"\+")):
        set_objective(default_config(), objective)


# The DDIM code's configs; CelebA-HQ, FFHQ and AFHQv2: SA-DPM's. Steps: S²-DMs, section 4; SA-DPM's epochs × steps an
# epoch; LSUN: DDPM's.
VALUES = {
    "cifar10": (32, (1, 2, 2, 2), 0.1, True, 128, 2e-4, 1.0, 0.9999, 600_000, 1_200 * 390),
    "celeba64": (64, (1, 2, 2, 2, 4), 0.1, True, 128, 2e-4, 1.0, 0.9999, 400_000, 1_200 * 1_271),
    "celebahq256": (256, (1, 1, 2, 2, 4, 4), 0.0, False, 24, 2e-5, 0.0, 0.999, 900 * 1_125, 900 * 1_125),
    "ffhq64": (64, (1, 2, 2, 2, 4), 0.1, True, 256, 2e-4, 1.0, 0.9999, 1_500 * 273, 1_500 * 273),
    "afhqv2_64": (64, (1, 2, 2, 2, 4), 0.1, True, 128, 2e-4, 1.0, 0.9999, 2_000 * 112, 2_000 * 112),
    "lsun256": (256, (1, 1, 2, 2, 4, 4), 0.0, True, 64, 2e-5, 0.0, 0.999, 2_400_000, 2_400_000),
}


@pytest.mark.parametrize("name", PAPERS)
def test_values_and_parameter_counts_are_the_published_ones(name, golden):
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
    assert num_params(build_network(c)) == golden("param_counts.json")[PAPERS[name]]


@pytest.mark.parametrize("objective", ["ddpm", "sa_2+cosine", "npr"])
def test_the_improved_network_has_analytic_dpms_values(objective, golden):
    """Its profiles/ddpm/cifar10/base.py and train.py; variance heads as Extended-Analytic-DPM trains them."""
    c = load("cifar10_improved", objective)
    network, train = build_network(c), c.train
    assert num_params(network) == golden("iddpm_param_counts.json")["cifar10_sa_dpm_table2"]
    assert (network.attn_resolutions, network.num_heads, network.dropout, network.t_offset) == ((16, 8), 4, 0.3, 1)
    assert (train.steps, train.batch_size, train.lr, train.weight_decay) == (500_000, 128, 1e-4, 0.0)
    assert (train.grad_clip, train.ema_decay, c.data.random_flip) == (0.0, 0.9999, False)
    assert not build_objective(c).antithetic
    c.loss.preset = "released"
    assert not build_objective(c).antithetic


@pytest.mark.parametrize(("name", "lam"), [("celebahq256", 0.1), ("ffhq64", 0.5), ("afhqv2_64", 0.2)])
def test_the_weight_is_that_of_the_released_code(name, lam):
    assert load(name).to_dict() == load(name, "sa_2").to_dict()
    assert load(name).loss.lam == lam


@pytest.mark.parametrize("name", ["ffhq64", "afhqv2_64", "lsun256"])
def test_datasets_that_are_not_downloaded_ask_for_their_images(name):
    config = load(name)
    with pytest.raises(UserError, match=r"^config\.data\.source is missing: \w+ is not downloaded; give a folder"):
        check_preparable(config)
    assert saturation_at_hand(config) is None


def test_every_dataset_has_a_config_file_and_a_crop_that_exists():
    found = {load(path.stem).data.name for path in CONFIGS.glob("*.py")}
    assert found == DATASETS.keys()
    assert {spec.crop for spec in DATASETS.values()} <= set(CROPS)
    for spec in DATASETS.values():
        assert len(spec.classes) == (2 ** len(spec.binary_attributes) if spec.binary_attributes else 0)
        # What is prepared may fail to download: the message names the files.
        assert bool(spec.builder) == bool(spec.manual_files)
