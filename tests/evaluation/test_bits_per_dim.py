"""Bits per dimension of a network on images: calls, batches, variances; in an evaluation, and from the command line."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, FunctionNetwork, ToyNetwork, save_run, small_config

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.evaluation_plan import EvalPoint
from s2dm_jax.config.validate import check_config
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.diffusion.schedule import NoiseSchedule, linear_schedule
from s2dm_jax.evaluation import bound as bound_module
from s2dm_jax.evaluation import evaluate as evaluation
from s2dm_jax.evaluation.bits_per_dim import BoundInputs, measure_bounds, variance_of
from s2dm_jax.evaluation.bound import Chain, variational_bound
from s2dm_jax.evaluation.checks import check_evaluation
from s2dm_jax.evaluation.html_report import report_page
from s2dm_jax.inference.model import Model
from s2dm_jax.models import variance_head
from s2dm_jax.models.improved_unet import ImprovedUNet
from s2dm_jax.models.variance_head import Head
from s2dm_jax.samplers.analytic import cov_x0

VARIANCE = 0.0625
# The first timestep's noise spans 25 grey levels.
SCHEDULE = NoiseSchedule(np.append(0.04, np.full(99, -np.expm1(-8 / 99))))
COV = VARIANCE * (1 - SCHEDULE.alpha_bar) / (SCHEDULE.alpha_bar * VARIANCE + 1 - SCHEDULE.alpha_bar)
IMAGES = (
    np.random.default_rng(0).normal(127.5, 127.5 * VARIANCE**0.5, (50, 8, 8, 1)).round().clip(0, 255).astype(np.uint8)
)
LABELS = np.arange(25) % 2
DATA = Dataset(IMAGES[:25], LABELS, IMAGES[25:], LABELS, 2, "50 noises")
CALLS = []


def exact(params, x, t):
    """The exact network of pixels with that variance around 0, counted."""
    jax.debug.callback(lambda t: CALLS.append(int(t[0])), t)
    factor = np.sqrt(1 - SCHEDULE.alpha_bar) / (SCHEDULE.alpha_bar * VARIANCE + 1 - SCHEDULE.alpha_bar)
    return jnp.asarray(factor, x.dtype)[t.astype(int)].reshape(-1, 1, 1, 1) * x


EXACT = FunctionNetwork(exact)


@dataclasses.dataclass(frozen=True)
class WithVariance(FunctionNetwork):
    """The same network with a second output, the learned variance: its parameter."""

    learned_variance: bool = True

    def eps_variance_fn(self, params, schedule):
        return lambda x, t: (self.function(params, x, t), jnp.full_like(x, params))


def bounds(*variances, timesteps, network=EXACT, params=None, **options):
    options = {"batch_size": 50, **options}
    chain = Chain(network, SCHEDULE, variances, clip_x0=False)
    found = variational_bound(chain, params, IMAGES, timesteps, **options)
    return found if len(variances) > 1 else found[variances[0]]


def test_gaussian_images_have_their_entropy_in_s_calls_of_the_network_for_each_batch():
    """For any timesteps; a step has the same term in every chain that has it, in batches of any size or order."""
    entropy = np.log2(127.5) + np.log2(2 * np.pi * np.e * VARIANCE) / 2
    optimal, few = {"inputs": {"analytic": COV}}, [0, 50, 51, 99]
    CALLS.clear()
    whole = bounds("analytic", timesteps=np.arange(100), **optimal)
    jax.effects_barrier()
    assert sorted(CALLS) == list(range(100))
    CALLS.clear()
    batches = {"timesteps": few, "batch_size": 16, "indices": np.arange(50)[::-1], **optimal}
    found = bounds("analytic", **batches)
    jax.effects_barrier()
    assert sorted(CALLS) == sorted(few * 4)
    for each in (whole, found):
        assert each.prior + each.terms.sum() == pytest.approx(each.bits_per_dim, rel=1e-6)
        assert abs(each.bits_per_dim - entropy) < 3 * each.standard_error < 0.1
    assert (len(found.terms), found.prior) == (4, pytest.approx(whole.prior))
    np.testing.assert_allclose(found.terms[[0, 2]], whole.terms[[0, 51]], rtol=1e-5)
    assert bounds("analytic", seed=1, **batches).bits_per_dim != found.bits_per_dim


@pytest.mark.slow
def test_a_learned_variance_is_between_those_that_are_fixed():
    timesteps = [0, 1, 30, 99]
    small, large = bounds("small", "large", timesteps=timesteps).values()
    assert large.terms[0] == small.terms[0]
    assert (large.terms[1:] != small.terms[1:]).all()
    for v, same in ((-1.0, small), (1.0, large)):
        learned = bounds("learned", timesteps=timesteps, network=WithVariance(exact), params=np.float32(v))
        np.testing.assert_allclose(learned.terms[1:], same.terms[1:], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_a_variance_head_that_gives_one_number_is_analytic_dpm(monkeypatch, kind):
    def apply(network, params, head, schedule, x, t):
        eps = exact(params, x, t)
        return eps, head + (eps**2 if kind == "sn" else jnp.zeros_like(x))

    monkeypatch.setattr(bound_module.variance_head, "apply", apply)
    timesteps, residual = [0, 1, 30, 99], np.float32(0.3)
    cov = cov_x0(SCHEDULE, np.full(100, 1 - residual))
    analytic = bounds("analytic", timesteps=timesteps, inputs={"analytic": cov})
    found = bounds(kind, timesteps=timesteps, network=FunctionNetwork(exact, dtype=kind), inputs={kind: residual})
    np.testing.assert_allclose(found.terms, analytic.terms, rtol=1e-4)


@pytest.mark.slow
def test_clipping_and_scaling_act():
    """x̂_0 far outside the range is clipped; a factor on the output is another network's output."""
    loud = FunctionNetwork(lambda params, x, t: 3 * x)
    chain = Chain(loud, SCHEDULE, ("large",))
    clipped, free = (
        variational_bound(chain._replace(clip_x0=clip), {}, IMAGES, [0, 99], batch_size=50)["large"].bits_per_dim
        for clip in (True, False)
    )
    assert clipped < free / 10
    scaled = bounds("large", timesteps=[0, 99], network=FunctionNetwork(lambda p, x, t: x), scale=np.full(100, 3.0))
    assert scaled.bits_per_dim == pytest.approx(free, rel=1e-5)


@pytest.mark.parametrize(
    ("variances", "options", "sentence"),
    [
        (("small",), {"timesteps": [3, 3]}, "not in ascending order"),
        (("small",), {"indices": [3]}, "images must be at least 2 for a standard error, got 1"),
        (("median",), {}, "names 'median'; there are small, large, learned, analytic, sn, npr"),
        (("analytic",), {}, "inputs must have 'analytic'"),
        (("learned",), {}, "needs a network that predicts it"),
        (("sn", "learned"), {"inputs": {"sn": {}}}, "several outputs of the network"),
        (("npr",), {"inputs": {"npr": {}}, "scale": np.ones(100)}, "scale cannot be combined with"),
    ],
)
def test_bad_requests(variances, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        bounds(*variances, **{"timesteps": [3, 4], **options})


@pytest.mark.parametrize(
    ("sampler", "options", "variance"),
    [
        ("ddpm", {}, "large"),
        ("ddpm", {"variance": "learned"}, "learned"),
        ("ddim", {"eta": None}, ""),
        ("ddim", {"eta": 0.5}, ""),
        ("ddim", {"eta": 1.0}, "small"),
        ("ddim", {"eta": 1.0, "clip_x0": True, "raw_eps": True}, ""),
        ("f_pndm", {}, ""),
        ("analytic", {}, "analytic"),
        ("npr", {"mean": "ddpm"}, "npr"),
        ("sn", {"mean": "ddim"}, ""),
    ],
)
def test_which_samplers_have_a_bound(sampler, options, variance):
    assert variance_of(sampler, options) == variance


@pytest.fixture
def config(tmp_path):
    (tmp_path / "own.py").write_text("def means(x): return x.mean((2, 3)) / 255.0\n")
    features = {"eval.feature_extractor": f"{tmp_path / 'own.py'}:means", "eval.timestep_spacing": "linspace"}
    return small_config(**{"diffusion.T": 20, "diffusion.beta_end": 0.5, "eval.nfe": (3,), **features})


def test_an_evaluation_has_rows_the_whole_chain_a_plot_and_measures_once(config, tmp_path, monkeypatch, capsys):
    network = ToyNetwork()
    model = Model(config, network, linear_schedule(20, beta_end=0.5), network.init(0), 7)
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: model)
    monkeypatch.setattr(evaluation, "load_dataset", lambda _: DATA)
    # The samples are real images.
    sampled = lambda params, timesteps, seed, indices: jnp.asarray(IMAGES)[indices]  # noqa: E731
    monkeypatch.setattr(Model, "sampler", lambda *_, nfe, **__: (sampled, np.arange(nfe)))
    config.eval.update(samplers="ddim,ddpm", metrics="bits_per_dim")
    (tmp_path / "run").mkdir()
    check_evaluated(lambda: evaluation.evaluate_run(config, tmp_path / "run"), ["large"], tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_command_line(config, tmp_path, command_line, monkeypatch, capsys):
    save_run(tmp_path / "run", config, seed=0, ema_factor=1)
    command = ["--mode=evaluate", f"--workdir={tmp_path / 'run'}", "--config.eval.metrics=bits_per_dim"]
    command.append("--config.eval.samplers=ddim,ddpm,analytic")
    check_evaluated(lambda: command_line(*command), ["large", "analytic"], tmp_path, monkeypatch, capsys)
    monkeypatch.undo()
    page = report_page([str(tmp_path / "run")])
    assert "<p class=small>Bits per dimension of 8 held-out images, all 20 timesteps.</p>" in page


def check_evaluated(run, variances, tmp_path, monkeypatch, capsys):
    """Rows, whole chain, table, files and plot; a second time nothing is measured, and matplotlib is not needed."""
    run()
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    ddim, *rows = results["rows"][1:-1]
    assert "bits_per_dim" not in ddim
    reason = "ddim, linspace, NFE 3: no bits_per_dim: it is that of DDPM's Gaussian steps"
    assert any(note.startswith(reason) for note in results["provenance"]["notes"])
    for row, variance in zip(rows, variances, strict=True):
        assert (row["bound"]["variance"], row["bound"]["timesteps"]) == (variance, [0, 9, 19])
        assert row["bound"]["prior"] + sum(row["bound"]["terms"]) == pytest.approx(row["bits_per_dim"], rel=1e-6)
        assert f"| {row['bits_per_dim']:.3f} ± {row['bits_per_dim_se']:.3f} |" in printed
    whole = results["bits_per_dim"]
    assert (whole["timesteps"], list(whole["variances"])) == (20, ["small", *variances])
    for bound in whole["variances"].values():
        assert len(bound["terms"]) == 20
        assert bound["bits_per_dim"] == pytest.approx(whole["prior"] + sum(bound["terms"]), rel=1e-6)
        assert f"| {bound['bits_per_dim']:.3f} ± {bound['bits_per_dim_se']:.3f} " in printed
    assert results["provenance"]["bits_per_dim"]["images"] == "8 held-out images"
    page = (tmp_path / "run" / "results.md").read_text()
    assert "Bits per dimension of 8 held-out images, all 20 timesteps:" in page
    (plot,) = (tmp_path / "run" / "evaluations").glob("*.png")
    assert f"terms of the bound: {plot}" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    plot.unlink()
    monkeypatch.setattr("s2dm_jax.evaluation.bits_per_dim.variational_bound", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run()
    assert "no plot of the terms, which needs matplotlib: pip install 's2dm_jax[plot]'" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert not plot.exists()


def test_a_single_held_out_image_is_refused_before_the_training():
    config = small_config(
        **{"eval.metrics": "bits_per_dim", "eval.feature_extractor": "classifier", "eval.reference": "train"}
    )
    check_config(config)
    data = DATA._replace(held_out=IMAGES[:1], held_out_labels=LABELS[:1])
    with pytest.raises(UserError, match="names bits_per_dim, which needs 2 held-out images; there are 1"):
        check_evaluation(config, data)


@pytest.mark.slow
def test_the_variances_of_real_networks_are_rows_and_columns(tmp_path):
    """The learned variance of an ImprovedUNet, and a variance head of a UNet: in their rows and over all timesteps."""
    learned = ImprovedUNet(8, 1, 1, 32, (1,), 1, (), learned_variance=True)
    schedule, no_scale = linear_schedule(20, beta_end=0.5), {"skip_scale": 0}
    depends_on = {"seed": 0, "num_images": 8, "images": "", "schedule": {}}
    head = Head("npr", variance_head.init_params(TINY, 0))
    for network, its_head, sampler, options in (
        (learned, None, "ddpm", {"variance": "learned"}),
        (TINY, head, "npr", {}),
    ):
        params = network.init(0)
        inputs = BoundInputs(network, schedule, params, None, its_head, IMAGES, depends_on, no_scale, 8)
        rows = [{"name": sampler, "notes": []} for _ in range(2)]
        points = [EvalPoint(sampler, nfe, "uniform", options) for nfe in (2, 20)]
        whole = measure_bounds(points, rows, inputs, [tmp_path / sampler])
        name = options.get("variance", sampler)
        assert list(whole["variances"]) == ["small", "large", name]
        # All timesteps, clipped as the sampler does.
        assert rows[1]["bits_per_dim"] == pytest.approx(whole["variances"][name]["bits_per_dim"], rel=1e-6)
        np.testing.assert_allclose(rows[1]["bound"]["terms"], whole["variances"][name]["terms"], rtol=1e-5)
        assert [row["bound"]["variance"] for row in rows] == [name] * 2
        assert whole["variances"][name]["bits_per_dim"] != whole["variances"]["small"]["bits_per_dim"]
        assert [row["notes"] for row in rows] == [[], []]
