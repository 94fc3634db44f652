"""What an evaluation is to measure: methods × budgets from a config, and what is refused."""

import pytest

from s2dm_jax.cells import Cell, metrics_in, plan_cells
from s2dm_jax.check import check_config, check_evaluation_files
from s2dm_jax.config import UserError, default_config
from s2dm_jax.methods import FACTS, num_evaluations


def cells(**changes):
    return plan_cells(1000, {**default_config().eval.to_dict(), **changes})


def test_the_default_is_ddim_at_three_budgets():
    found, gaps = cells()
    assert found == [Cell("ddim", nfe, "uniform", {}) for nfe in (10, 20, 50)]
    assert not gaps
    assert [cell.name for cell in found] == ["ddim"] * 3


def test_every_sampler_can_be_evaluated_by_its_name():
    found, _ = cells(methods=",".join(FACTS), nfe=(20, 1000))
    assert {cell.method for cell in found} == set(FACTS)
    for cell in found:
        assert num_evaluations(cell.method, len(cell.timesteps(1000))) == cell.nfe


def test_options_go_to_the_methods_that_have_them():
    found, _ = cells(methods="ddim,deis,unipc", nfe=(10,), eta=1.0, order=2, clip_x0=False, grid="linspace")
    assert [cell.options for cell in found] == [{"clip_x0": False, "eta": 1.0}, {"order": 2}, {}]
    assert found[0].name == "ddim, grid linspace, clip_x0 False, eta 1.0"
    assert found[0].timesteps(1000)[-1] == 999


def test_budgets_beyond_a_method_leave_gaps_that_are_told():
    found, gaps = cells(methods="ddim, pndm", nfe=(10, 1000, 1009))
    assert [(cell.method, cell.nfe) for cell in found] == [
        ("ddim", 10),
        ("ddim", 1000),
        ("f_pndm", 1000),
        ("f_pndm", 1009),
    ]
    assert [gap.split(":")[0] for gap in gaps] == ["no ddim at 1009", "no f_pndm at 10"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": "ddim,plms"}, "methods='ddim,plms' names 'plms'; there are ddim, ddpm"),
        ({"methods": "ddim,ddim"}, "must name at least one method, none of them twice"),
        ({"methods": " , "}, "must name at least one method"),
        ({"methods": "f_pndm", "nfe": (10, 20)}, "nfe=10 is too few for f_pndm"),
        ({"nfe": (10, 1001)}, "nfe=1001 cannot be had"),
        ({"methods": "unipc", "eta": 0.5}, "eta=0.5 is no option of unipc, only of ddim"),
        ({"grid": "cosine"}, "grid='cosine' is not known; choose one of uniform"),
        ({"grid": "optimal"}, "grid='optimal' is only for analytic, not for methods='ddim'"),
        ({"order": 9, "methods": "deis"}, "order=9 is not allowed"),
    ],
)
def test_bad_plans(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        cells(**change)


def test_metrics_come_in_one_order_and_fid_always():
    assert metrics_in("pr, kid") == ["fid", "kid", "pr"]
    assert metrics_in("") == ["fid"]
    with pytest.raises(
        ValueError, match="metrics='fid,cmmd' names 'cmmd'; there are fid, kid, is, pr, fid_inf"
    ):
        metrics_in("fid,cmmd")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": "vgg"}, r"config\.eval\.features='vgg' is not known; choose one of auto, inception"),
        ({"features": "a.py:f", "metrics": "is"}, "names is, which needs class probabilities"),
        (
            {"metrics": "kid", "num_images": 19},
            r"config\.eval\.num_images=19 is too few for kid, which needs 20",
        ),
        ({"metrics": "pr", "reference": "a.npz"}, "needs the reference's images"),
        ({"inception_sha256": "6726825d"}, "is no SHA-256: it must be 64 hexadecimal digits"),
        ({"eta": 1.5}, r"config\.eval\.eta=1\.5 is out of range"),
        ({"methods": "plms"}, r"config\.eval\.methods='plms' names 'plms'"),
        ({"nfe": (10, 1001)}, r"config\.eval\.nfe=1001 cannot be had"),
        (
            {"methods": "ddim,sn"},
            r"config\.eval\.methods='ddim,sn' needs a second head, which this run has not",
        ),
    ],
)
def test_bad_fields_of_a_config(change, sentence):
    config = default_config()
    config.model.attn_resolutions = ()
    config.eval.update(change)
    with pytest.raises(UserError, match=sentence):
        check_config(config)


@pytest.mark.parametrize(("field", "value"), [("features", "gone.py:f"), ("reference", "gone.npz")])
def test_files_that_are_gone_only_matter_to_an_evaluation(field, value):
    config = default_config()
    config.model.attn_resolutions = ()
    config.eval[field] = value
    check_config(config)
    with pytest.raises(UserError, match=rf"config\.eval\.{field}='{value}' .*there"):
        check_evaluation_files(config)
