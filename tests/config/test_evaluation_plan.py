"""The evaluation plan: (sampler, NFE) points from a config, and what is refused."""

import pytest

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.evaluation_plan import EvalPoint, plan_evaluation
from s2dm_jax.config.metrics import parse_metrics
from s2dm_jax.config.validate import check_config, check_evaluation_files
from s2dm_jax.samplers.specs import SAMPLERS, nfe_of


def plan(**changes):
    return plan_evaluation(1000, {**default_config().eval.to_dict(), **changes})


def test_the_default_is_ddim_at_three_budgets():
    points, skipped = plan()
    assert points == [EvalPoint("ddim", nfe, "quadratic", {}) for nfe in (10, 20, 50)]
    assert not skipped
    assert [point.name for point in points] == ["ddim, quadratic"] * 3


def test_every_sampler_can_be_evaluated_by_its_name():
    points, _ = plan(samplers=",".join(SAMPLERS), nfe=(21, 999))
    assert {point.sampler for point in points} == set(SAMPLERS)
    for point in points:
        assert nfe_of(point.sampler, len(point.timesteps(1000))) == point.nfe


def test_options_go_to_the_samplers_that_have_them():
    points, _ = plan(
        samplers="ddim,deis,unipc",
        nfe=(10,),
        eta=1.0,
        order=3,
        variant="bh1",
        clip_x0=False,
        timestep_spacing="linspace",
    )
    assert [point.options for point in points] == [
        {"clip_x0": False, "eta": 1.0},
        {"clip_x0": False, "order": 3},
        {"clip_x0": False, "order": 3, "variant": "bh1"},
    ]
    assert points[0].name == "ddim, linspace, clip_x0 False, eta 1.0"
    assert points[0].timesteps(1000)[-1] == 999


def test_an_nfe_that_a_sampler_cannot_run_with_is_skipped_with_a_reason():
    points, skipped = plan(samplers="ddim, pndm", nfe=(10, 1000, 1009))
    assert [(point.sampler, point.nfe) for point in points] == [
        ("ddim", 10),
        ("ddim", 1000),
        ("f_pndm", 1000),
        ("f_pndm", 1009),
    ]
    assert [reason.split(":")[0] for reason in skipped] == ["skipped ddim at NFE 1009", "skipped f_pndm at NFE 10"]


def test_a_sampler_or_an_nfe_without_any_point_leaves_gaps():
    points, skipped = plan(samplers="ddim,heun", nfe=(10, 1001))
    assert [(point.sampler, point.nfe) for point in points] == [("ddim", 10), ("heun", 1001)]
    assert [reason.split(":")[0] for reason in skipped] == ["skipped ddim at NFE 1001", "skipped heun at NFE 10"]
    points, skipped = plan(samplers="ddim,f_pndm", nfe=(5, 10))
    assert len(points) == len(skipped) == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"samplers": "ddim,plms"}, "samplers='ddim,plms' names 'plms'; choose among ddim, ddpm"),
        ({"samplers": "ddim,ddim"}, "must name at least one sampler, each only once"),
        ({"samplers": " , "}, "must name at least one sampler"),
        ({"samplers": "f_pndm", "nfe": (5, 10)}, "nfe=5 is too few for f_pndm"),
        ({"nfe": (1001,)}, "nfe=1001 is not possible"),
        ({"samplers": "unipc", "eta": 0.5}, "eta=0.5 is not an option of unipc, only of ddim"),
        ({"timestep_spacing": "cosine"}, "timestep_spacing='cosine' is not one of auto, uniform"),
        ({"timestep_spacing": "optimal"}, "timestep_spacing='optimal' is only for analytic, not for samplers='ddim'"),
        ({"order": 9, "samplers": "ddim,deis"}, "order=9 is not allowed"),
    ],
)
def test_bad_plans(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(**change)


def test_metrics_come_in_one_order_and_fid_always():
    assert parse_metrics("precision_recall, kid") == ["fid", "kid", "precision_recall"]
    assert parse_metrics("") == ["fid"]
    with pytest.raises(ValueError, match="metrics='fid,cmmd' names 'cmmd'; choose among fid, kid, inception_score"):
        parse_metrics("fid,cmmd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"feature_extractor": "vgg"},
            r"config\.eval\.feature_extractor='vgg' is not valid; choose one of auto, inception",
        ),
        (
            {"feature_extractor": "a.py:f", "metrics": "inception_score"},
            "names inception_score, which needs class probabilities",
        ),
        ({"metrics": "kid", "num_images": 19}, r"config\.eval\.num_images=19 is too few for kid, which needs 20"),
        ({"metrics": "precision_recall", "reference": "a.npz"}, "needs the reference's images"),
        ({"inception_sha256": "6726825d"}, "is not a SHA-256: it must be 64 hexadecimal digits"),
        ({"eta": 1.5}, r"config\.eval\.eta=1\.5 is out of range"),
        ({"samplers": "plms"}, r"config\.eval\.samplers='plms' names 'plms'"),
        ({"nfe": (1001,)}, r"config\.eval\.nfe=1001 is not possible"),
        (
            {"samplers": "ddim,sn"},
            r"config\.eval\.samplers='ddim,sn' needs a variance head, which this run does not have",
        ),
    ],
)
def test_bad_fields_of_a_config(change, sentence):
    config = default_config()
    config.model.attn_resolutions = ()
    config.eval.update(change)
    with pytest.raises(UserError, match=sentence):
        check_config(config)


@pytest.mark.parametrize(("field", "value"), [("feature_extractor", "gone.py:f"), ("reference", "gone.npz")])
def test_files_that_are_gone_only_matter_to_an_evaluation(field, value):
    config = default_config()
    config.model.attn_resolutions = ()
    config.eval[field] = value
    check_config(config)
    with pytest.raises(UserError, match=rf"config\.eval\.{field}='{value}' .*exist"):
        check_evaluation_files(config)
