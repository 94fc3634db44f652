"""Evaluation: what is counted, compared and cached; a set against itself; the same on every run."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FunctionNetwork

from s2dm_jax.common.errors import UserError
from s2dm_jax.config.defaults import default_config
from s2dm_jax.config.evaluation_plan import EvalPoint
from s2dm_jax.config.fields import INCEPTION_RESIZES
from s2dm_jax.config.metrics import METRICS, Column, Metric
from s2dm_jax.config.validate import check_config, check_evaluation_files
from s2dm_jax.data.datasets import Dataset
from s2dm_jax.diffusion.objectives import skip_scale
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.evaluation import evaluate as evaluation
from s2dm_jax.evaluation import features as feature_functions
from s2dm_jax.evaluation import metrics
from s2dm_jax.evaluation.checks import check_evaluation
from s2dm_jax.evaluation.features import FeaturesUnavailable, build_features, check_features
from s2dm_jax.evaluation.metrics import feature_statistics, frechet_distance
from s2dm_jax.evaluation.reference import image_batches, load_reference
from s2dm_jax.evaluation.statistics_file import read_statistics
from s2dm_jax.inference.model import Model
from s2dm_jax.inference.sampler import resolve_sampler
from s2dm_jax.models.unet import UNet
from s2dm_jax.samplers.timesteps import split_timestep_spec
from s2dm_jax.workdir.results import results_cells

NETWORK = UNet(8, 1, 1, 32, (1,), 1, ())
FUNCTION = """
import jax.numpy as jnp

def means(images):
    x = images.astype(jnp.float32) / 255
    return jnp.concatenate([x.mean((2, 3)), x.mean((1, 3))], axis=1)

def wrong(images):
    return images.mean()

def broken(images):
    raise RuntimeError("no such thing\\nsecond line")
"""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 8, 8, 1), np.uint8)
    return Dataset(images[:200], np.arange(200) % 2, images[200:], np.arange(100) % 2, 2, "300 noises")


@pytest.fixture
def function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION)
    return str(path)


@pytest.fixture
def config(function):
    config = default_config()
    config.diffusion.update(T=20, beta_end=0.5)
    config.model.attn_resolutions = ()
    config.eval.update({"feature_extractor": f"{function}:means", "num_images": 50, "nfe": (2, 4), "batch_size": 16})
    return config


@pytest.fixture
def sampled(monkeypatch, data):
    """Replaces the samplers by real images, those held out, and lists the calls with their numbers of images."""
    calls = []

    def configure(_, sampler, *, nfe, **options):
        def sample(params, timesteps, seed, indices):
            calls.append((sampler, nfe, len(indices)))
            return jnp.asarray(data.held_out)[np.asarray(indices) % len(data.held_out)]

        return sample, np.arange(nfe)

    monkeypatch.setattr(Model, "sampler", configure)
    return calls


def run(config, data, workdir, params=None):
    check_config(config)
    model = Model(config, NETWORK, linear_schedule(20, beta_end=0.5), params or {"w": np.zeros(1)}, 7)
    return evaluation.evaluate(model, data, workdir)


def test_a_set_is_at_zero_from_itself_through_the_whole_pipeline(config, data, sampled, tmp_path):
    config.eval.update({"num_images": 100, "metrics": "fid,kid,precision_recall", "nfe": (2,)})
    floor, itself, noise = run(config, data, tmp_path)["rows"]
    assert itself["num_images"] == 100
    assert itself["frechet_distance"] < 1e-6
    assert (itself["precision"], itself["recall"]) == (1, 1)
    assert abs(itself["kid"]) < 4 * itself["kid_se"]
    assert floor["frechet_distance"] > 1e-3
    assert noise["frechet_distance"] > floor["frechet_distance"]
    assert (floor["normalized"], noise["normalized"]) == (0, 1)


@pytest.mark.parametrize("count", [37, 48, 50])
def test_exactly_the_requested_images_are_counted(config, data, sampled, tmp_path, count):
    config.eval.update({"num_images": count, "nfe": (2,)})
    results = run(config, data, tmp_path)
    assert [row["num_images"] for row in results["rows"]] == [count] * 3
    # Batches are filled up, and the surplus is dropped.
    assert sampled == [("ddim", 2, 16)] * -(-count // 16)
    expected = features_by_hand(data.held_out[:count]), features_by_hand(data.held_out)
    distance = frechet_distance(*feature_statistics(expected[0]), *feature_statistics(expected[1]))
    assert results["rows"][1]["frechet_distance"] == pytest.approx(distance, rel=1e-5)


def features_by_hand(images):
    x = images.astype(np.float64) / 255
    return np.concatenate([x.mean((2, 3)), x.mean((1, 3))], axis=1)


def test_nonsense_is_noted_and_leaves_a_gap_where_it_is_not_finite(config, data, tmp_path):
    """Images that are all black or white, and images of NaN, whose bytes and features are as good as any others."""
    config.eval.update({"num_images": 20, "nfe": (2,)})
    found = {}
    for name, factor in (("saturated", -1e5), ("nan", np.nan)):
        network = FunctionNetwork(lambda params, x, t, factor=factor: factor * x)
        model = Model(config, network, linear_schedule(20, beta_end=0.5), {"w": np.full(1, factor)}, 7)
        # The second time, from the cache.
        results, again = (evaluation.evaluate(model, data, tmp_path) for _ in range(2))
        assert results == again
        found[name] = results["rows"][1], results["provenance"]["notes"]
    row, notes = found["saturated"]
    assert (row["saturated"], row["not_finite"]) == (1.0, 0)
    assert "frechet_distance" in row
    assert notes[0].startswith(
        "ddim, uniform, NFE 2: 100.0 % of the images' values are 0 or 255, against 0.9 % of those of real images (ddim"
    )
    row, notes = found["nan"]
    assert not {"frechet_distance", "normalized"} & row.keys()
    assert notes[0].startswith(
        "ddim, uniform, NFE 2: 20 of 20 images have values that are not finite (ddim, timestep_spacing uniform, NFE 2"
    )


def test_a_metric_that_is_not_finite_is_a_gap(config, data, sampled, tmp_path, monkeypatch):
    monkeypatch.setattr("s2dm_jax.evaluation.metrics.frechet_distance", lambda *_: np.inf)
    results = run(config, data, tmp_path)
    assert not any("frechet_distance" in row for row in results["rows"])
    assert results["provenance"]["notes"] == [
        "no fid: it is not finite, because the features are too large or too small"
    ]


def test_an_interrupted_evaluation_resumes_at_the_missing_points(config, data, sampled, tmp_path, monkeypatch):
    config.eval.samplers = "ddim,dpmpp_2m"
    compute_metrics = evaluation.compute_metrics
    done = []

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return compute_metrics(*arguments)

    monkeypatch.setattr(evaluation, "compute_metrics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, data, tmp_path)
    assert {call[:2] for call in sampled} == {("ddim", 2), ("ddim", 4)}
    sampled.clear()
    monkeypatch.setattr(evaluation, "compute_metrics", compute_metrics)
    results = run(config, data, tmp_path)
    assert {call[:2] for call in sampled} == {("dpmpp_2m", 2), ("dpmpp_2m", 4)}
    names = [(row["name"], row["nfe"], row.get("steps")) for row in results["rows"][1:-1]]
    assert [(name.split(",")[0], *counts) for name, *counts in names] == [
        ("ddim", 2, 2),
        ("ddim", 4, 4),
        ("dpmpp_2m", 2, 2),
        ("dpmpp_2m", 4, 4),
    ]
    sampled.clear()
    assert run(config, data, tmp_path) == results
    assert not sampled


def test_other_weights_seeds_and_options_are_measured_anew(config, data, sampled, tmp_path):
    run(config, data, tmp_path)
    for change in (
        {"seed": 1},
        {"num_images": 51},
        {"eta": 0.5},
        {"timestep_spacing": "quadratic"},
        {"metrics": "kid"},
    ):
        sampled.clear()
        config.eval.update(change)
        run(config, data, tmp_path)
        assert sampled, change
    sampled.clear()
    run(config, data, tmp_path, {"w": np.ones(1)})
    assert sampled


def test_optimal_timesteps_are_among_what_a_row_depends_on(config):
    """They follow from the statistic by a method that may change: the same request may be another row."""
    model = Model(config, NETWORK, linear_schedule(20, beta_end=0.5), {}, 7, ms_eps=np.linspace(0.1, 0.99, 20))
    for spacing in ("uniform", "optimal"):
        point = EvalPoint("analytic", 4, spacing, {})
        depends_on, _ = evaluation._sampled(model, "", point, None, 16, [])
        timesteps = model.sampler("analytic", nfe=4, timestep_spacing=spacing)[1].tolist()
        assert depends_on.get("timesteps") == (timesteps if spacing == "optimal" else None)


def test_the_scaling_of_the_output_acts_and_makes_a_row_of_its_own(config, data, tmp_path, monkeypatch):
    """The sampler gets skip, tau and preset; a row measured with floor_images is measured anew, under its name."""
    scales = []
    configure = Model.sampler

    def sampler(model, name, **options):
        spec, own = split_timestep_spec(options)
        scales.append(resolve_sampler(model.schedule, name, spec, **own)[1])
        return configure(model, name, **options)

    monkeypatch.setattr(Model, "sampler", sampler)
    config.eval.update({"num_images": 16, "nfe": (2,)})
    params = NETWORK.init(0)
    names = []
    for change in (
        {},
        {"skip_scale_tau": 0.5},
        {"skip_scale": 10, "skip_scale_tau": 0.99},
        {"skip_scale_tau": 0.5},
        {"skip_scale_preset": "released"},
        {"skip_scale_tau": 0.99},
    ):
        config.eval.update(change)
        names.append(run(config, data, tmp_path, params)["rows"][1]["name"])
    assert names == [
        "ddim, uniform",
        "ddim, uniform",
        "ddim, uniform, skip_scale 10",
        "ddim, uniform, skip_scale 10, skip_scale_tau 0.5",
        "ddim, uniform, skip_scale 10, skip_scale_tau 0.5, skip_scale_preset released",
        "ddim, uniform, skip_scale 10, skip_scale_preset released",
    ]
    # Without a skip, tau changes nothing and nothing is measured again.
    plain, *scaled = scales
    assert plain is None
    for scale, options in zip(scaled, ((), (0.5,), (0.5, "released"), (0.99, "released")), strict=True):
        np.testing.assert_array_equal(scale, skip_scale(linear_schedule(20, beta_end=0.5), 10, *options))
    assert len(list((tmp_path / "evaluations" / "points").glob("ddim*.json"))) == 5


def test_two_runs_and_other_batch_sizes_give_the_same_bytes(config, data, tmp_path, monkeypatch, capsys):
    model = Model(config, NETWORK, linear_schedule(20, beta_end=0.5), NETWORK.init(0), 7)
    monkeypatch.setattr(evaluation, "load", lambda _, step, ema: model)
    monkeypatch.setattr(evaluation, "load_dataset", lambda _: data)
    config.eval.update({"nfe": (2,), "num_images": 24})
    texts = []
    for name, batch_size in (("a", 16), ("b", 16), ("c", 5)):
        (tmp_path / name).mkdir()
        config.eval.batch_size = batch_size
        evaluation.evaluate_run(config, tmp_path / name)
        texts.append((tmp_path / name / "results.json").read_text())
    assert texts[0] == texts[1]
    rows = [json.loads(text)["rows"] for text in texts]
    for one, other in zip(rows[0], rows[2], strict=True):
        assert one["frechet_distance"] == pytest.approx(other["frechet_distance"], rel=1e-6)
    files = sorted(path.name for path in (tmp_path / "a" / "evaluations").glob("*.*"))
    assert [name.split(".")[1] for name in files] == ["json", "md"]
    page = (tmp_path / "a" / "results.md").read_text()
    assert "| ddim" in page
    assert "- weights: EMA at step 7, sha256 " in page
    # Other weights have rows and files of their own.
    model = model._replace(ema="sigma_rel=0.1")
    evaluation.evaluate_run(config, tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["rows"][1]["name"] == f"{rows[0][1]['name']}, EMA sigma_rel=0.1"
    assert results["provenance"]["weights"].startswith("EMA sigma_rel=0.1 at step 7, sha256 ")
    assert (results["eval"]["ema"], len(list((tmp_path / "a" / "evaluations").glob("*.json")))) == ("sigma_rel=0.1", 2)
    assert "mine.py:means; not FID" in capsys.readouterr().out


def test_a_new_metric_is_a_record_and_a_function(config, data, sampled, tmp_path, monkeypatch):
    def spread(logits, features, reference_mean):
        assert logits.shape == (30, 0)
        return float(features.std()), float(np.abs(features.mean(0) - reference_mean).max())

    monkeypatch.setattr(metrics, "spread", spread, raising=False)
    record = Metric(
        function="spread",
        requires=("logits", "features", "reference_mean"),
        results=("spread", "largest_bias"),
        columns=(Column("spread of {distance}", "spread", "largest_bias", scale=10, digits=1),),
        min_images=25,
        max_images=30,
    )
    monkeypatch.setitem(METRICS, "own", record)
    config.eval.update({"metrics": "own", "nfe": (2,)})
    with pytest.raises(UserError, match=r"names own, which needs class probabilities: config\.eval\.feature"):
        check_config(config)
    monkeypatch.setitem(METRICS, "own", record._replace(requires=record.requires[1:]))
    monkeypatch.setattr(metrics, "spread", lambda *inputs: spread(np.zeros((30, 0)), *inputs))
    config.eval.num_images = 24
    with pytest.raises(UserError, match="num_images=24 is too few for own, which needs 25"):
        check_config(config)
    config.eval.num_images = 50
    results = run(config, data, tmp_path)
    # The sampled images are the held-out ones, in order, of which the metric gets the first 30.
    features = features_by_hand(data.held_out[:30])
    bias = np.abs(features.mean(0) - features_by_hand(data.held_out).mean(0)).max()
    row = results["rows"][1]
    assert row["spread"] == pytest.approx(features.std(), rel=1e-5)
    assert row["largest_bias"] == pytest.approx(bias, rel=1e-4)
    header, cells = results_cells(results)
    assert header[2:4] == ["Fréchet distance", "spread of Fréchet distance"]
    assert cells[1][3] == f"{10 * features.std():.1f} ± {10 * bias:.1f}"


def test_metrics_without_enough_images_for_their_features_are_refused(config, data, sampled, tmp_path):
    config.eval.update({"metrics": "fid_infinity", "num_images": 63})
    with pytest.raises(UserError, match="num_images=63 is too few for fid_infinity in 16 features, which ne"):
        run(config, data, tmp_path)
    assert not sampled


def test_too_few_images_and_skipped_points_are_noted(config, data, sampled, tmp_path):
    config.eval.update({"num_images": 12, "samplers": "ddim,pndm", "nfe": (4, 13)})
    results = run(config, data, tmp_path)
    assert [row["nfe"] for row in results["rows"]] == [None, 4, 13, 13, None]
    skipped, few = results["provenance"]["notes"]
    assert (
        skipped
        == "skipped f_pndm at NFE 4: nfe=4 is too few for f_pndm: its smallest number of steps makes 13 evaluations"
    )
    assert few.startswith("12 images are too few for a covariance of 16 features")
    assert all(np.isfinite(row["frechet_distance"]) for row in results["rows"])


def test_reference_is_the_configured_one(config, data, tmp_path):
    features = build_features(config, data)
    path = tmp_path / "statistics.npz"
    mean, cov = feature_statistics(features_by_hand(data.train))
    np.savez(path, mu=mean, sigma=cov)
    found = {}
    for name in ("auto", "held_out", "train", str(path)):
        config.eval.reference = name
        check_evaluation_files(config)
        found[name], floor_images = load_reference(config, data, features, ["fid"], 16)
        assert len(floor_images) == (100 if name == "train" else 200)
    assert found["auto"].provenance == found["held_out"].provenance
    np.testing.assert_allclose(found["train"].cov, cov, rtol=1e-4, atol=1e-8)
    np.testing.assert_array_equal(found[str(path)].cov, cov)
    assert found["held_out"].features is None
    with_features, _ = load_reference(config, data, features, ["fid"], 16)
    assert with_features.provenance["file"] == str(path)
    np.savez(path, mu=mean[:3], sigma=cov[:3, :3])
    with pytest.raises(UserError, match=r"holds 3 features, config\.eval\.feature_extractor=.*makes 16"):
        load_reference(config, data, features, ["fid"], 16)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"config\.eval\.reference=.* cannot be read"):
        load_reference(config, data, features, ["fid"], 16)


def test_features_do_not_depend_on_the_batches(config, data):
    features = build_features(config, data)
    together = np.concatenate(list(image_batches(data.train, features, 200)))
    parts = np.concatenate(list(image_batches(data.train, features, 7)))
    np.testing.assert_allclose(together, features_by_hand(data.train), rtol=1e-5)
    np.testing.assert_allclose(together, parts, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("wrong", r"must return floats \[B, D\] for uint8 \['B', 8, 8, 1\], got float32 \[\] for B = 2"),
        ("broken", r"failed with RuntimeError: no such thing$"),
        ("missing", r"failed with AttributeError"),
    ],
)
def test_an_unsuitable_function_is_reported_in_one_sentence(config, data, function, name, sentence):
    config.eval.feature_extractor = f"{function}:{name}"
    with pytest.raises(UserError, match=sentence):
        build_features(config, data)


def test_without_labels_there_is_no_classifier(config, data):
    config.eval.feature_extractor = "classifier"
    with pytest.raises(UserError, match="needs labels, which digits does not have: it must be inception or"):
        build_features(config, data._replace(num_classes=1))


def test_auto_falls_back_to_the_classifier_and_says_why(config, monkeypatch, capsys):
    def fail(*_):
        raise UserError("the weights cannot be fetched; get them")

    monkeypatch.setattr(feature_functions.inception_weights, "inception_params", fail)
    config.eval.feature_extractor = "auto"
    assert feature_functions.resolve_features(config, no_classifier="") == "classifier"
    assert not capsys.readouterr().out
    config.data.name = "cifar10"
    assert feature_functions.resolve_features(config, no_classifier="") == "classifier"
    assert "is not an FID: the weights cannot be fetched; get them" in capsys.readouterr().out
    with pytest.raises(
        FeaturesUnavailable, match="a classifier needs labels, which cifar10 does not have, and the weights ca"
    ):
        feature_functions.resolve_features(config, no_classifier="needs labels, which cifar10 does not have")
    monkeypatch.setattr(feature_functions.inception_weights, "inception_params", lambda *_: {})
    assert feature_functions.resolve_features(config, no_classifier="") == "inception"


def test_inception_of_ones_own_is_not_called_fid(config, data, monkeypatch):
    monkeypatch.setattr(feature_functions.inception_weights, "inception_params", lambda *_: {})
    config.eval.feature_extractor = "inception"
    standard = build_features(config, data)
    assert (standard.distance, standard.dimensions, standard.logits) == ("FID", 2048, 1008)
    config.eval.inception_sha256 = "AB" * 32
    own = build_features(config, data)
    assert own.distance == "Fréchet distance (own Inception)"
    assert "your own weights, sha256 abababababababab; not FID" in own.metric
    assert own.provenance["weights_sha256"] == "ab" * 32 != standard.provenance["weights_sha256"]


def test_inception_gets_images_of_the_configs_pipeline(config, data, monkeypatch):
    inception, weights = feature_functions.inception, feature_functions.inception_weights
    kernel = np.zeros((inception.NUM_FEATURES, inception.NUM_LOGITS), np.float32)
    monkeypatch.setattr(weights, "inception_params", lambda *_: {"fc.kernel": kernel})
    monkeypatch.setattr(inception, "stages", lambda _, x: {"2048": x.reshape(len(x), -1)[:, : inception.NUM_FEATURES]})
    config.eval.feature_extractor = "inception"
    # Of a size of its own, for what is compiled here stays in JAX's cache.
    image = np.random.default_rng(0).integers(0, 256, (1, 7, 9, 3), np.uint8)
    for resize, pipeline in (("auto", "tf1"), ("tf1", "tf1"), ("pytorch_fid", "pytorch_fid")):
        config.eval.inception_resize = resize
        pixels = build_features(config, data).apply(image)[0, : inception.NUM_FEATURES]
        expected = inception.PIPELINES[pipeline].prepare(image.astype(np.float32))
        np.testing.assert_allclose(pixels, expected.ravel()[: inception.NUM_FEATURES], rtol=1e-6)


def test_unavailable_features_are_reported_before_a_training(config, data, monkeypatch, function):
    def fail(*_):
        raise UserError("the weights cannot be fetched; get them")

    monkeypatch.setattr(feature_functions.inception_weights, "inception_params", fail)
    for features, sentence in (
        ("inception", "the weights cannot be fetched"),
        ("classifier", "needs labels"),
        (f"{function}:broken", "failed with RuntimeError"),
    ):
        config.eval.feature_extractor = features
        with pytest.raises(UserError, match=sentence):
            check_features(config, data._replace(num_classes=1))
    # What "auto" means is found out when it is needed: a training does not fail for it.
    config.eval.feature_extractor, config.data.name = "auto", "cifar10"
    check_features(config, data._replace(num_classes=1))


def test_inceptions_statistics_of_a_dataset_are_computed_once(config, data, tmp_path, monkeypatch):
    monkeypatch.setenv("S2DM_JAX_CACHE", str(tmp_path / "cache"))
    features = build_features(config, data)._replace(name="inception")
    first, floor_images = load_reference(config, data, features, ["fid"], 16)
    # With Inception the papers compare with the training images.
    assert len(floor_images) == len(data.held_out)
    mean, cov = feature_statistics(features_by_hand(data.train))
    np.testing.assert_allclose(first.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(first.cov, cov, rtol=1e-4, atol=1e-8)

    def never(images):
        raise AssertionError("computed again")

    again, _ = load_reference(config, data, features._replace(apply=never), ["fid"], 16)
    np.testing.assert_array_equal(again.cov, first.cov)
    (path,) = (tmp_path / "cache" / "statistics").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    damaged, _ = load_reference(config, data, features, ["fid"], 16)
    np.testing.assert_array_equal(damaged.cov, first.cov)
    other_images = data._replace(train=data.train[::-1])
    with pytest.raises(AssertionError, match="computed again"):
        load_reference(config, other_images, features._replace(apply=never), ["fid"], 16)


def test_statistics_and_points_of_one_pipeline_are_not_those_of_another(
    config, data, sampled, tmp_path, monkeypatch, capsys
):
    """Inception with another function in the place of its network, in both pipelines."""
    monkeypatch.setenv("S2DM_JAX_CACHE", str(tmp_path / "cache"))
    small = build_features(config, data)
    monkeypatch.setattr(feature_functions.inception_weights, "inception_params", lambda *_: {})
    monkeypatch.setattr(feature_functions.inception, "NUM_FEATURES", small.dimensions)
    scales = dict(zip(INCEPTION_RESIZES, (1, 2), strict=True))

    def in_place_of_inception(config, data):
        features = build_features(config, data)
        scale = scales[config.eval.inception_resize.replace("auto", "tf1")]
        return features._replace(apply=lambda images: scale * small.apply(images), logits=0)

    monkeypatch.setattr(evaluation, "build_features", in_place_of_inception)
    config.eval.update({"feature_extractor": "inception", "num_images": 100, "nfe": (2,)})
    found, folder = {}, tmp_path / "cache" / "statistics"
    for resize, again in (("auto", False), ("pytorch_fid", False), ("tf1", True), ("pytorch_fid", True)):
        config.eval.inception_resize = resize
        sampled.clear()
        results = run(config, data, tmp_path / "run")
        assert bool(sampled) != again
        resize = "tf1" if resize == "auto" else resize
        assert results["provenance"]["metric"].endswith(f"Inception, inception_resize {resize}, weights of 2015-12-05")
        assert results["rows"] == found.setdefault(resize, results)["rows"]
    one, other = (found[resize]["rows"][1]["frechet_distance"] for resize in INCEPTION_RESIZES)
    assert other == pytest.approx(4 * one)  # features of twice the size
    # As files of statistics, they are accepted in their own pipeline alone.
    paths = {str(np.load(path)["inception_resize"]): path for path in folder.iterdir()}
    assert paths.keys() == set(INCEPTION_RESIZES)
    for resize, path in paths.items():
        config.eval.reference = str(path)
        for chosen in ("auto", *INCEPTION_RESIZES):
            config.eval.inception_resize = chosen
            if resize == ("tf1" if chosen == "auto" else chosen):
                check_evaluation(config, data)
                row = run(config, data, tmp_path / "run")["rows"][1]
                assert row["frechet_distance"] == found[resize]["rows"][1]["frechet_distance"]
                continue
            for evaluate in (check_evaluation, functools.partial(run, workdir=tmp_path / "run")):
                with pytest.raises(UserError, match=f"holds statistics with inception_resize {resize}, which cannot"):
                    evaluate(config, data)
    # Without the record they are another program's.
    with np.load(paths["tf1"]) as arrays:
        np.savez(tmp_path / "foreign.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    config.eval.update({"reference": str(tmp_path / "foreign.npz"), "inception_resize": "auto"})
    with pytest.raises(UserError, match=r"foreign\.npz' does not record how its images were resized"):
        check_evaluation(config, data)
    config.eval.inception_resize = "tf1"
    check_evaluation(config, data)
    evaluation.show_results(tmp_path / "run", found["pytorch_fid"])
    caption = "FID in the 2,048 features of Inception, inception_resize pytorch_fid, weights of 2015-12-05."
    assert caption in capsys.readouterr().out.splitlines()
    page = (tmp_path / "run" / "results.md").read_text()
    assert caption in page.splitlines()
    assert "- features: resize: bilinear to 299 × 299 with half-pixel centres and x/127.5 − 1 as pytorch-fid" in page


def test_statistics_of_other_programs_need_their_pipeline_named(tmp_path, monkeypatch):
    monkeypatch.setenv("S2DM_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "statistics"
    folder.mkdir(parents=True)
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3)}
    foreign, unknown, cached = tmp_path / "foreign.npz", tmp_path / "clean.npz", folder / f"{'0a' * 8}.npz"
    np.savez(foreign, **arrays)
    np.savez(cached, **arrays)
    np.savez(unknown, **arrays, inception_resize="clean")
    features = [("inception", 3), ("classifier", 2)]
    with pytest.raises(UserError) as caught:
        read_statistics(str(foreign), features)
    message, field = str(caught.value), "--config.eval.inception_resize"
    assert message.startswith(f"config.eval.reference='{foreign}' does not record how its images were resized")
    assert f": give {field}=pytorch_fid for statistics of pytorch-fid (" in message
    assert "or tf1 for those of TensorFlow" in message
    for resize in INCEPTION_RESIZES:
        read_statistics(str(foreign), features, resize)
        with pytest.raises(UserError, match=r"records inception_resize='clean', .* must be one of tf1, pytorch_fid"):
            read_statistics(str(unknown), features, resize)
    # Of other features there is no pipeline; earlier versions cached statistics of tf1 without a record.
    read_statistics(str(foreign), [("mine.py:f", 3)])
    for resize in ("auto", "tf1"):
        read_statistics(str(cached), features, resize)
    with pytest.raises(UserError, match=r"inception_resize tf1, which cannot .* give --config\.eval.*=tf1"):
        read_statistics(str(cached), features, "pytorch_fid")


def test_what_a_metric_cannot_do_is_a_gap_with_its_reason(config, data):
    features = build_features(config, data)
    reference, _ = load_reference(config, data, features, ["fid"], 16)
    batches = list(image_batches(data.train, features, 50))
    row = evaluation.compute_metrics(batches, features, reference, ["fid", "kid"])
    assert row["frechet_distance"] > 0
    assert "kid" not in row
    assert any(note.startswith("no kid: features must hold at least 20 vectors") for note in row["notes"])
    batches[0] = np.full_like(batches[0], np.nan)
    row = evaluation.compute_metrics(batches, features, reference, ["fid", "kid"])
    assert "frechet_distance" not in row
    assert row["notes"] == ["the features of 50 images are not finite: no metrics"]


def test_features_that_are_constant_leave_a_table_with_gaps(config, data, tmp_path):
    (tmp_path / "constant.py").write_text("import jax.numpy as jnp\ndef f(x): return jnp.ones((len(x), 4))\n")
    config.eval.feature_extractor = f"{tmp_path / 'constant.py'}:f"
    features = build_features(config, data)
    reference, _ = load_reference(config, data, features, ["fid"], 16)
    row = evaluation.compute_metrics(list(image_batches(data.train, features, 50)), features, reference, ["fid"])
    rows = [{"name": name, "nfe": None, **row} for name in ("real (floor)", "noise (ceiling)")]
    cells = results_cells({"rows": rows, "provenance": {}})[1]
    assert [each[-1] for each in cells] == ["–", "–"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metrics": "fid_infinity", "num_images": 63}, "num_images=63 is too few for fid_infinity in 16 features"),
        ({"metrics": "kid", "reference": "held_out"}, "names kid, which needs 20 images of the reference held_out"),
        ({"reference": "other.npz"}, r"holds 3 features, config.eval.feature_extractor=.* makes 16"),
        ({"reference": "empty.npz"}, r"reference=.*empty.npz' cannot be read"),
        ({"reference": "text.npz"}, r"reference=.*text.npz' cannot be read \(it holds Python objects"),
        ({"reference": "single.npy"}, r"reference=.*single.npy' cannot be read \(it is a single array\)"),
        ({"reference": "keys.npz"}, r"reference=.*keys.npz' cannot be read \(it has no array mu\)"),
        (
            {"reference": "negative.npz"},
            r"cannot be read \(sigma is not a covariance matrix: it has negative eigenvalues\)",
        ),
        ({"reference": "complex.npz"}, r"cannot be read \(mu holds complex128, not real numbers\)"),
        ({"feature_extractor": "nan.py:f"}, r"features of real images that are not finite"),
        ({"feature_extractor": "nan.py:none"}, r"must return floats \[B, D\] .* got float32 \[2, 0\]"),
        ({"feature_extractor": "nan.py:many"}, r"gives 20,000 features, whose covariance does not fit"),
        # "auto" may be Inception or the classifier.
        (
            {"feature_extractor": "auto", "reference": "empty.npz"},
            r"empty.npz' cannot be read \(it is empty, cut short",
        ),
        (
            {"feature_extractor": "auto", "reference": "other.npz"},
            r"3 features, .*'inception' makes 2048 or .* makes 64",
        ),
        (
            {"feature_extractor": "auto", "metrics": "fid_infinity", "num_images": 255},
            r"in 64 features, which needs 256",
        ),
        ({"feature_extractor": "auto", "inception_weights": "gone.pth"}, r"inception_weights=gone.pth cannot be read"),
    ],
)
def test_what_an_evaluation_cannot_do_is_said_before_the_training(
    config, data, tmp_path, monkeypatch, changes, sentence
):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "keys.npz", mean=np.zeros(16))
    np.save(tmp_path / "single.npy", np.zeros(16))
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "negative.npz", mu=np.zeros(16), sigma=-np.eye(16))
    np.savez(tmp_path / "complex.npz", mu=np.zeros(16, complex), sigma=np.eye(16))
    (tmp_path / "nan.py").write_text(
        "import jax.numpy as jnp\ndef f(x): return jnp.full((len(x), 4), jnp.nan)\n"
        "def none(x): return jnp.zeros((len(x), 0))\ndef many(x): return jnp.zeros((len(x), 20_000))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S2DM_JAX_CACHE", str(tmp_path / "cache"))
    config.eval.update(changes)
    config.data.name = "cifar10" if config.eval.feature_extractor == "auto" else config.data.name
    data = data._replace(held_out=data.held_out[:10], held_out_labels=data.held_out_labels[:10])
    with pytest.raises(UserError, match=sentence):
        check_evaluation(config, data)


@pytest.mark.parametrize(
    ("train", "held_out", "small", "sentence"),
    [
        ([5, 5, 5, 5], [5], False, "needs labels, which it does not have"),
        ([5, 5, 5, 5], [6], False, "needs training images of two classes, and those of it are of one"),
        ([5, 6, 7, 8], [5], False, "needs two images of a class, and it has 4 images of 4 classes"),
        ([5, 5, 6, 6], [5], True, "needs images of 8×8 pixels, and those of it have 4×4"),
        ([5, 5, 6, 6], [5], False, ""),
    ],
)
def test_why_there_is_no_classifier(data, train, held_out, small, sentence):
    images, classes = data.train[:4], len({*train, *held_out})
    made = data._replace(
        train=images[:, :4, :4] if small else images, train_labels=np.array(train), num_classes=classes
    )
    assert feature_functions.why_no_classifier(made, "it") == sentence


def test_a_reference_of_one_image_is_an_error_before_and_a_gap_after(config, data, sampled, tmp_path):
    one = data._replace(held_out=data.held_out[:1], held_out_labels=data.held_out_labels[:1])
    with pytest.raises(UserError, match="reference='auto' is the split held_out, which has 1 image; at least 2"):
        check_evaluation(config, one)
    results = run(config, one, tmp_path)
    assert results["provenance"]["notes"] == ["no fid: the reference has 1 image"]
    config.eval.reference = "train"
    check_evaluation(config, one)
    results = run(config, one, tmp_path)
    assert results["provenance"]["notes"] == ["real (floor): 1 image(s) are too few: no metrics"]
    assert "frechet_distance" in results["rows"][1]


def test_a_reference_whose_features_are_not_finite_is_a_gap(config, data):
    features = build_features(config, data)

    def apply(images):
        return features.apply(images).at[0].set(np.nan)

    reference, _ = load_reference(config, data, features._replace(apply=apply), ["fid"], 200)
    row = evaluation.compute_metrics(image_batches(data.train, features, 50), features, reference, ["fid"])
    assert row["notes"] == ["no fid: the features of 1 images of the reference are not finite"]


def test_round_off_in_the_covariance_of_a_reference_is_taken_off(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(99, 6))
    cov = np.cov(vectors.T)
    np.savez(tmp_path / "rounded.npz", mu=np.zeros(6, np.float32), sigma=cov + np.triu(np.full((6, 6), 1e-7), 1))
    _, found = read_statistics(str(tmp_path / "rounded.npz"), [("own", 6)])
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, cov, atol=1e-6)
