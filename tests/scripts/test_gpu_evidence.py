"""The stage `evidence` of scripts/benchmarks/gpu.py: equal times, what a run leaves for the next one, rescaling."""

import itertools
import tarfile
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from gpu_stages import evidence, evidence_plan, evidence_train, evidence_weights
from gpu_stages.evidence_images import synthetic_archive
from gpu_stages.evidence_plan import SIZES, State, equal_shares
from gpu_stages.evidence_weights import Left, Trained
from gpu_stages.parts import Settings, Skip
from helpers import ToyNetwork, assert_close

from s2dm_jax.common.images import to_uint8
from s2dm_jax.config.build import build_network
from s2dm_jax.data.batches import batch_at, run_keys
from s2dm_jax.data.device_feed import make_feed
from s2dm_jax.inference.sampler import configure_sampler

NEW = {"ddpm": 0.0, "s2_10": 0.0, "s2_50": 0.0, "sa_2": 0.0}
COSTS = dict.fromkeys(NEW, 5.0)


def settings_of(folder, *, tiny=True, images=None, seconds=60.0):
    return Settings("cpu", tiny, folder, folder, folder, images, time.time() + seconds)


def trained_of(step=0, seconds=0.0, network=None, **record):
    params = (network or ToyNetwork()).init(step)
    ema = jax.tree.map(lambda leaf: leaf / 2, params)
    return Trained(params, ema, {"step": step, "seconds": seconds, "sessions": [], "losses": [], "rows": [], **record})


@pytest.mark.parametrize(
    ("trained", "seconds", "shares"),
    [
        (NEW, 100.0, dict.fromkeys(NEW, 20.0)),
        # Below 8 s each for all four, the first three share what sa_2 would have cost.
        (NEW, 48.0, {"ddpm": 11.0, "s2_10": 11.0, "s2_50": 11.0}),
        (NEW, 12.9, {}),
        # Those that an earlier run did not reach come first, and catch up as far as they can.
        ({"ddpm": 30.0, "s2_10": 30.0, "s2_50": 0.0, "sa_2": 0.0}, 50.0, {"s2_50": 20.0, "sa_2": 20.0}),
        # With more time all end at 45 s.
        (
            {"ddpm": 30.0, "s2_10": 20.0, "s2_50": 0.0, "sa_2": 0.0},
            150.0,
            {"ddpm": 15.0, "s2_10": 25.0, "s2_50": 45.0, "sa_2": 45.0},
        ),
    ],
)
def test_shares_make_the_total_times_equal(trained, seconds, shares):
    assert equal_shares(trained, COSTS, seconds, least=8.0, most=600.0) == shares


def test_a_share_is_cut_at_the_most():
    assert equal_shares(NEW, COSTS, 100.0, least=1.0, most=2.0) == dict.fromkeys(NEW, 2.0)


def share_of(name, folder, seconds, trained, *, level=None, compiled=True, rows=()):
    """`evidence._share` of a run on a GPU, in which sampling a batch takes 0.1 s at every NFE."""
    evidence_plan.write_state(folder, State({"10": 0.1, "20": 0.1, "50": 0.1}, level))
    run = SimpleNamespace(
        size=SIZES["gpu"],
        compiler=SimpleNamespace(is_compiled=lambda _: compiled),
        left=SimpleNamespace(objectives={each: trained_of(seconds=s, rows=rows) for each, s in trained.items()}),
    )
    return evidence._share(name, settings_of(folder, seconds=seconds), run)


def test_the_time_of_a_run_goes_to_what_was_trained_least(tmp_path):
    trained = {"ddpm": 40.0, "s2_10": 40.0}
    with pytest.raises(Skip, match=r"trained for 40 s so far; no time left for more, which goes to s2_50, sa_2"):
        share_of("ddpm", tmp_path, 60, trained)
    # 20 batches at three NFE of 0.1 s, a fifth longer: 7.2 s for each, as much for each of two factors, 4 s at the end.
    assert share_of("s2_50", tmp_path, 50, trained) == pytest.approx((50 - 4 - 4 * 7.2) / 2, abs=0.1)
    # Training comes first where there is no time for the factors, or where an objective of the run had as long.
    assert share_of("s2_50", tmp_path, 36, trained) == pytest.approx((36 - 4 - 2 * 7.2) / 2, abs=0.1)
    assert share_of("s2_50", tmp_path, 50, trained, level=15.0) == 15.0
    # Nothing is reserved for factors that are measured, or have no network.
    measured = [{"skip_scale": skip, "nfe": nfe} for skip in (10, 50) for nfe in (10, 20, 50)]
    assert share_of("s2_50", tmp_path, 50, trained, rows=measured) == pytest.approx((50 - 4 - 2 * 7.2) / 2, abs=0.1)
    assert share_of("s2_50", tmp_path, 50, {}) == pytest.approx((50 - 4 - 2 * 7.2) / 2, abs=0.1)
    # Programs that are still to be compiled take their time as well.
    assert share_of("s2_50", tmp_path, 140, trained, compiled=False) == pytest.approx(13.6, abs=0.1)


def test_later_objectives_get_no_more_than_the_first_of_the_run(tmp_path):
    assert share_of("sa_2", tmp_path, 100, {"ddpm": 21.5}, level=21.5) == 21.5
    with pytest.raises(Skip, match=r"like the others"):
        share_of("sa_2", tmp_path, 100, {"sa_2": 21.0}, level=21.5)
    with pytest.raises(Skip, match=r"no time left for more$"):
        share_of("sa_2", tmp_path, 9, {}, level=21.5)


def test_the_file_gives_back_what_was_trained(tmp_path):
    classifier = {"head_w": np.float32([[1 / 3]])}
    left = Left("digest", classifier, {"ddpm": trained_of(7, 1.5, rows=[{"nfe": 10}]), "sa_2": trained_of(9)})
    evidence_weights.write(tmp_path, left)
    read, note = evidence_weights.read(tmp_path, "digest")
    assert note == ""
    # Distances of several runs are comparable only in exactly the same features.
    np.testing.assert_array_equal(read.classifier["head_w"], classifier["head_w"])
    assert list(read.objectives) == ["ddpm", "sa_2"]
    for name, trained in read.objectives.items():
        assert trained.record == left.objectives[name].record
        for tree in ("params", "ema_params"):
            expected = getattr(left.objectives[name], tree)
            jax.tree.map(lambda a, b: assert_close(a, b, 1e-3), getattr(trained, tree), expected)
    assert read.objectives["ddpm"].params["out"]["kernel"].dtype == np.float32


def test_a_file_of_something_else_is_ignored_with_a_note(tmp_path):
    assert evidence_weights.read(tmp_path, "digest") == (None, "")
    evidence_weights.write(tmp_path, Left("digest", {}, {"ddpm": trained_of(7)}))
    read, note = evidence_weights.read(tmp_path, "another")
    assert read is None
    assert note.startswith("evidence_weights.npz is of another network")
    path = tmp_path / evidence_weights.FILE
    path.write_bytes(path.read_bytes()[:300])
    read, note = evidence_weights.read(tmp_path, "digest")
    assert read is None
    assert "damaged" in note


def test_a_file_of_something_else_stays(tmp_path):
    evidence_weights.set_aside(tmp_path)
    evidence_weights.write(tmp_path, Left("digest", {}, {}))
    evidence_weights.set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evidence_weights.1.npz"]


def test_the_digest_depends_on_network_objectives_and_images_alone(tmp_path):
    from gpu_stages.evidence_data import digest_of

    size, data = SIZES["tiny"], SimpleNamespace(digest="of the images")
    digest = digest_of(size, tmp_path / "a.tar", data)
    assert digest == digest_of(size._replace(chunk=7), tmp_path / "b.tar", data)
    changes = [{"fields": {**size.fields, "train.lr": 1e-4}}, {"objectives": ("ddpm", "s2_50")}]
    others = [digest_of(size._replace(**change), tmp_path / "a.tar", data) for change in changes]
    others.append(digest_of(size, tmp_path / "a.tar", SimpleNamespace(digest="others")))
    assert len({digest, *others}) == 4


def test_all_objectives_fit_into_16_mb(tmp_path):
    size = SIZES["gpu"]
    network = build_network(evidence_train.config_of(size, "ddpm", tmp_path / "images.tar"))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), network.param_shapes())
    # More than a classifier of 32 × 32 pixels has.
    classifier = {"weights": np.zeros(250_000)}
    trained = Trained(params, params, trained_of(losses=[[0, 0.0, 0.0]] * 100).record)
    evidence_weights.write(tmp_path, Left("digest", classifier, dict.fromkeys(size.objectives, trained)))
    assert len(size.objectives) == 4
    assert (tmp_path / evidence_weights.FILE).stat().st_size < 16e6


def test_training_continues_with_the_steps_that_follow(tmp_path, monkeypatch):
    size = SIZES["tiny"]
    config, network = evidence_train.config_of(size, "ddpm", tmp_path / "images.tar"), ToyNetwork()
    before = trained_of(step=12)
    state = evidence_train.new_state_of(config, network, before)
    assert int(state.step) == 12
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema_params), (before.params, before.ema_params))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))

    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    feed = make_feed(images, run_keys(config.train.seed)[0], config.train.batch_size, 100, 1.0)
    seen = []

    def chunk(state, images, batches, key):
        assert images is None
        seen.extend(np.asarray(batches))
        return state._replace(step=state.step + len(batches)), {"loss_simple": np.full(len(batches), 3.0)}

    # Every reading of the clock is 1 s later: a chunk takes 1 s, and the third reaches 2.5 s.
    monkeypatch.setattr(evidence_train, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    session = evidence_train.train(chunk, feed, None, state, 4, 2.5)
    assert int(session.state.step) == 24
    assert session.seconds == 3
    assert session.losses == [(16, 1, 3.0), (20, 2, 3.0), (24, 3, 3.0)]
    for step, batch in zip(range(12, 24), seen, strict=True):
        expected = batch_at(config.train.seed, step, images, config.train.batch_size)
        np.testing.assert_array_equal(batch, to_uint8(expected))


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    state = SimpleNamespace(step=0)
    feed = SimpleNamespace(images=None, batches=lambda step, steps: None)
    with pytest.raises(FloatingPointError, match="up to 4 is nan"):
        evidence_train.train(lambda *_: (state, {"loss_simple": np.array([1.0, np.nan])}), feed, None, state, 4, 1.0)


def test_one_program_samples_with_every_scale(tmp_path):
    compiler = evidence_train.Compiler(SIZES["tiny"], tmp_path / "images.tar")
    compiler.network = ToyNetwork()
    params, indices = compiler.network.init(3), np.arange(SIZES["tiny"].eval_batch, dtype=np.int32)
    samples = []
    for skip in (0, 10, 500):
        scale = evidence_train.scale_of(compiler.schedule, skip)
        samples.append(np.asarray(compiler.get(4)(params, scale, indices), int))
        sampler, timesteps = configure_sampler(compiler.network, compiler.schedule, nfe=4, skip_scale=skip)
        expected = np.asarray(sampler(params, timesteps, evidence_train.SEED, indices), int)
        assert np.abs(samples[-1] - expected).max() <= 1
    assert list(compiler.seconds()) == [4]
    assert np.abs(samples[0] - samples[2]).max() > 1


def test_the_comparison_names_scales_times_and_what_is_missing():
    def record(seconds, device, *rows):
        found = [{"skip_scale": skip, "nfe": nfe, "frechet_distance": value} for skip, nfe, value in rows]
        return {"seconds": seconds, "sessions": [{"device": device}], "rows": found}

    records = {
        "s2_10": record(36.4, "H100", (0, 10, 20.0)),
        "ddpm": record(30.0, "H200", (0, 10, 22.0), (0, 20, 21.0), (10, 10, 20.5)),
    }
    line = evidence_plan.comparison_line(records, {"floor": 1.0, "ceiling": 99.0}, (10, 20))
    assert line == (
        "Fréchet distance at 10 / 20 evaluations: ddpm (30 s) 22.00 / 21.00; ddpm rescaled (skip 10) 20.50 / –; "
        "s2_10 (36 s) 20.00 / –; real images 1.00, noise 99.00"
    )
    assert evidence_plan.notes_of(records) == [
        "not trained for equal times",
        "trained on H100 and H200, whose seconds are not comparable",
    ]
    missing = [("s2_10", 0, 20), ("ddpm", 10, 20), ("ddpm", 50, 10), ("ddpm", 50, 20)]
    assert evidence_plan.missing_distances(records, (10, 20)) == missing


def test_without_images_or_time_a_part_says_so(tmp_path):
    for part in evidence.PARTS.values():
        with pytest.raises(Skip, match="--images"):
            part.run(settings_of(tmp_path, tiny=False))
    with pytest.raises(Skip, match="nothing is trained"):
        evidence.PARTS["distances"].run(settings_of(tmp_path, images=tmp_path / "images.tar"))
    with pytest.raises(Skip, match="no time left"):
        evidence.PARTS["ddpm"].run(settings_of(tmp_path, images=tmp_path / "images.tar", seconds=0.0))


def test_the_rehearsal_has_two_classes_in_two_splits(tmp_path):
    with tarfile.open(synthetic_archive(tmp_path)) as archive:
        folders = {name.rpartition("/")[0] for name in archive.getnames()}
    assert folders == {"train/stripes", "train/disc", "test/stripes", "test/disc"}
