"""The loop of training around a toy network that compiles in a second: resume, faults, telemetry, parts."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ToyNetwork, full_disk, small_config

from s2dm_jax.common.errors import UserError, WriteError
from s2dm_jax.config.ema import extra_names, parse_choice
from s2dm_jax.data import device_feed
from s2dm_jax.data.batches import batch_at
from s2dm_jax.data.datasets import load_digits
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.training import loop, telemetry
from s2dm_jax.training.averages import Averages
from s2dm_jax.training.step import StepConfig, loss_by_timestep, update
from s2dm_jax.workdir import checkpoint
from s2dm_jax.workdir.ema import chosen_weights
from s2dm_jax.workdir.power_ema import read_snapshots
from s2dm_jax.workdir.state import build_optimizer, init_state, make_optimizer

NETWORK = ToyNetwork()
FEATURES = """
def means(images):
    return images.reshape(len(images), 8, 8)[:, ::2, ::4].reshape(len(images), 8).astype("float32")
"""


@pytest.fixture(scope="module", autouse=True)
def _features(tmp_path_factory):
    """Distances in a few pixels: training a classifier would take longer than the runs."""
    file = tmp_path_factory.mktemp("features") / "features.py"
    file.write_text(FEATURES)
    SETTINGS["eval.feature_extractor"] = f"{file}:means"


def train(config, workdir):
    loop.train(config, workdir, network=NETWORK)


SETTINGS = {
    "data.random_flip": False,
    "train.steps": 400,
    "train.log_every": 50,
    "train.sample_every": 400,
    "train.checkpoint_every": 100,
    "eval.num_images": 16,
}


def run_config(**changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return small_config(**{**SETTINGS, **changes})


def newest_state(workdir, config):
    optimizer = build_optimizer(config)
    like = init_state(NETWORK, optimizer, 0, ema_extra=extra_names(config.train))
    return checkpoint.restore_latest(checkpoint.open_checkpoints(workdir), like)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 400 steps without a break."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(run_config(), workdir)
    return workdir


def test_two_hundred_steps_twice_are_four_hundred_at_any_chunk_size(straight, tmp_path):
    expected = newest_state(straight, run_config())
    for log_every in (50, 40):
        workdir = tmp_path / str(log_every)
        train(run_config(train__steps=200, train__log_every=log_every), workdir)
        train(run_config(train__log_every=log_every), workdir)
        jax.tree.map(np.testing.assert_array_equal, newest_state(workdir, run_config()), expected)


def test_resume_within_warm_up_is_exact_with_every_kind_of_ema(tmp_path, monkeypatch):
    for name in ("evaluate", "_save_samples"):
        monkeypatch.setattr(loop.TrainingLoop, name, lambda self: None)
    options = {"train__warmup_steps": 25, "train__lr_schedule": "cosine", "train__weight_decay": 0.1}
    options |= {"train__steps": 40, "train__decay_steps": 36, "train__checkpoint_every": 20}
    options |= {"loss__skip": 0, "loss__K": 1, "loss__lam": 0.0}
    options |= {"train__ema_halflife_images": 1e3, "train__ema_decays": (0.9,), "train__ema_sigma_rel": (0.05, 0.2)}
    options |= {"train__ema_snapshot_every": 7}
    config, workdir = run_config(train__log_every=10, **options), tmp_path / "run"
    train(config, workdir)
    expected = newest_state(workdir, config)
    # Of the last of ten steps: the rate after as many updates as came before.
    rates = [line["learning_rate"] for line in lines(workdir)]
    decayed = [1e-3 * (1 + np.cos(np.pi * 4 / 11)) / 2, 0.0]
    np.testing.assert_allclose(rates, [1e-3 * 9 / 25, 1e-3 * 19 / 25, *decayed], rtol=1e-5, atol=1e-10)
    # Nor do the snapshots and their steps depend on the chunks.
    snapshots = {path: path.read_bytes() for path in (workdir / "ema_snapshots").iterdir()}
    assert sorted(path.name for path in snapshots) == [f"step_{step:07d}.npz" for step in (7, 14, 21, 28, 35)]
    shutil.rmtree(workdir / "checkpoints" / "40")
    for path in (workdir / "ema_snapshots").glob("*[23]?.npz"):
        path.write_bytes(b"")
    train(run_config(train__log_every=5, **options), workdir)
    assert [line["step"] for line in lines(workdir)] == [10, 20, 25, 30, 35, 40]
    jax.tree.map(np.testing.assert_array_equal, newest_state(workdir, config), expected)
    assert expected.ema_extra.keys() == {"0.9", "sigma_rel=0.05", "sigma_rel=0.2"}
    assert {path: path.read_bytes() for path in (workdir / "ema_snapshots").iterdir()} == snapshots
    chosen = chosen_weights(config, NETWORK, expected, workdir, parse_choice("0.9"))
    assert "1.48 % of the initial weights (decay=0.9); images are sampled from the EMA corrected" in chosen[1]


def numbers(workdir):
    """What was logged, without the times."""
    return [{name: line[name] for name in line if name.startswith(("step", "loss", "grad"))} for line in lines(workdir)]


def test_pieces_of_any_length_are_one_program_and_change_no_number(straight, tmp_path, monkeypatch, caplog):
    lengths = itertools.cycle([1, 7, 50, 3, 60])
    monkeypatch.setattr(loop.TrainingLoop, "_steps_in_time", lambda self: next(lengths))
    changes = {"train__sample_every": 70, "train__checkpoint_every": 40, "sample__num_images": 16}
    with jax.log_compiles():
        train(run_config(train__steps=130, **changes), tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records]
    assert sum(message.startswith("Compiling jit(chunk)") for message in messages) == 1
    # That of the samples is the evaluation's.
    assert sum(message.startswith("Compiling jit(_run_compiled)") for message in messages) == 1
    assert [path.stem for path in sorted((tmp_path / "run" / "samples").iterdir())] == ["step_0000100", "step_0000130"]
    train(run_config(**changes), tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal,
        newest_state(tmp_path / "run", run_config()),
        newest_state(straight, run_config()),
    )
    found, expected = numbers(tmp_path / "run"), numbers(straight)
    assert [line["step"] for line in found] == [50, 100, 130, *range(150, 401, 50)]
    assert found[:2] + found[4:] == expected[:2] + expected[3:]


def test_a_signal_in_a_slow_chunk_stops_after_the_steps_under_way_and_loses_nothing(straight, tmp_path, monkeypatch):
    pieces, compile_program = [], loop.TrainingLoop._compile

    def compile_slowly(self):
        program = compile_program(self)

        def slow(state, *inputs):
            begin, end = (int(row) for row in inputs[-1])
            pieces.append(end - begin)
            time.sleep(0.02 * pieces[-1])
            if len(pieces) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return program(state, *inputs)

        return slow

    monkeypatch.setattr(loop.TrainingLoop, "_compile", compile_slowly)
    monkeypatch.setattr(loop, "_PIECE_SECONDS", 0.1)
    monkeypatch.setattr(loop, "_QUEUED_SECONDS", 0.05)
    with pytest.raises(SystemExit) as stop:
        train(run_config(train__log_every=400), tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(pieces) == 4
    assert max(pieces) <= 5, "pieces of 0.1 s where a step takes 0.02 s"
    assert [line["step"] for line in lines(tmp_path / "run")] == [sum(pieces)]
    monkeypatch.undo()
    train(run_config(), tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal,
        newest_state(tmp_path / "run", run_config()),
        newest_state(straight, run_config()),
    )
    assert numbers(tmp_path / "run")[2:] == numbers(straight)[1:]


def test_the_rate_is_right_where_a_call_returns_after_its_steps(tmp_path, monkeypatch):
    compile_program = loop.TrainingLoop._compile

    def compile_blocking(self):
        program = compile_program(self)

        def blocking(*inputs):
            time.sleep(0.1)
            return jax.block_until_ready(program(*inputs))

        return blocking

    monkeypatch.setattr(loop.TrainingLoop, "_compile", compile_blocking)
    for name in ("evaluate", "_save_samples"):
        monkeypatch.setattr(loop.TrainingLoop, name, lambda self: None)
    train(run_config(train__steps=40, train__log_every=10, train__checkpoint_every=20), tmp_path / "run")
    assert len(rates := [line["seconds_per_step"] for line in lines(tmp_path / "run")]) == 4
    assert min(rates) >= 0.0099


@pytest.mark.parametrize("flip", [False, True])
def test_batch_at_is_what_a_step_of_the_run_saw(flip, tmp_path, monkeypatch):
    weights = np.random.default_rng(0).standard_normal((8, 8, 1)).astype(np.float32)

    def projection(eps_fn, schedule, objective, x0, draws):
        value = (x0 * weights).sum((1, 2, 3))
        return value, {"simple": value}

    monkeypatch.setattr(objectives, "loss", projection)
    config = run_config(train__steps=3, train__log_every=1, data__random_flip=flip, train__sample_every=3)
    train(config, tmp_path / "run")
    images = load_digits().train
    for step, line in enumerate(lines(tmp_path / "run")):
        x0 = batch_at(config.train.seed, step, images, config.train.batch_size, flip)
        np.testing.assert_allclose(line["loss"], (x0 * weights).sum((1, 2, 3)).mean(), rtol=1e-4)


def test_a_damaged_checkpoint_costs_steps_but_no_exactness(straight, tmp_path, capsys):
    expected = newest_state(straight, run_config())
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    (workdir / "results.json").unlink()
    (workdir / "checkpoints" / "400" / "state" / "manifest.ocdbt").write_bytes(b"")
    train(run_config(), workdir)
    printed = capsys.readouterr()
    assert "the checkpoint of step 400 is damaged" in printed.err
    assert "from step 300 of 400" in printed.out
    jax.tree.map(np.testing.assert_array_equal, newest_state(workdir, run_config()), expected)
    assert (workdir / "damaged_checkpoints" / "400").is_dir()


def poison(monkeypatch, steps):
    """Makes the noise of some steps infinite."""
    draw = objectives.sample_noise

    def bad_draw(objective, key, T, shape):
        draws = draw(objective, key, T, shape)
        is_bad = jnp.isin(jax.random.key_data(key)[0], jnp.asarray(keys))
        return draws._replace(noise=jnp.where(is_bad, jnp.inf, draws.noise))

    step_key = jax.random.split(jax.random.key(0))[1]
    keys = [jax.random.key_data(jax.random.split(jax.random.fold_in(step_key, step), 3)[0])[0] for step in steps]
    monkeypatch.setattr(objectives, "sample_noise", bad_draw)


def test_stop_keeps_the_last_good_checkpoint_and_skip_goes_on_from_it(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, [130, 170])
    ema = {"train__ema_sigma_rel": (0.1,)}
    with pytest.raises(UserError, match=r"not finite from step 130 on, seen in steps 100 to 149; the last good che"):
        train(run_config(train__steps=200, **ema), tmp_path / "run")
    assert int(newest_state(tmp_path / "run", run_config(**ema)).step) == 100
    train(run_config(train__steps=200, train__on_nonfinite="skip", **ema), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "skipped 1 steps whose loss or gradient is not finite (130)" in printed
    state = newest_state(tmp_path / "run", run_config(**ema))
    assert int(state.step) == 200
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # Adam counts its own steps: two were left out.
    assert int(state.opt_state[1][0].count) == 198
    assert [(one.step, one.updates) for one in read_snapshots(tmp_path / "run", 200)] == [(100, 100), (200, 198)]
    assert [line.get("skipped_steps") for line in lines(tmp_path / "run")[2:]] == [1, 1]


def test_no_data_come_from_the_host_while_steps_run(tmp_path, monkeypatch):
    monkeypatch.setattr(device_feed, "shard_batch", lambda x, axis: np.asarray(x))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(run_config(), tmp_path / "run")


def test_what_a_run_logs(straight):
    assert [line["step"] for line in lines(straight)] == list(range(50, 401, 50))
    last = lines(straight)[-1]
    expected = {
        "loss",
        "loss_simple",
        "loss_skip",
        "loss_sequence",
        "grad_norm",
        "seconds_per_step",
        "images_per_second",
        "eta_seconds",
    }
    assert expected | {"tflops_per_second", "peak_memory_gb"} < last.keys()
    assert "mfu" not in last, "a CPU's peak is not known"
    groups = {name for name in last if "/" in name}
    assert groups == {f"loss_simple_by_t/{i}00-{i}99" for i in range(10)}
    assert last["eta_seconds"] == 0


def test_a_chunk_without_a_finite_step_has_no_means():
    metrics = {"loss": np.full(3, np.nan), "by_timestep": np.full((3, 2, 10), np.nan)}
    assert telemetry.aggregate_metrics(metrics, np.zeros(3, bool), 1000) == {"skipped_steps": 3}


def test_loss_by_timestep_adds_up():
    T, t = 25, jnp.asarray([0, 2, 3, 24, 24])
    sums, counts = loss_by_timestep(jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0]), t, T)
    # Ten groups of 25 timesteps begin at 0, 3 (2.5 rounded up), …, 23.
    np.testing.assert_array_equal(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 2])
    np.testing.assert_array_equal(sums, [3, 4, 0, 0, 0, 0, 0, 0, 0, 24])


def test_profile_traces_some_steps(tmp_path):
    train(run_config(train__steps=150, train__profile_steps=60), tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    objective, optimizer = objectives.paper(skip=10, K=2, lam=1.0), make_optimizer(1e-3, 1.0)
    made_of = StepConfig(NETWORK, linear_schedule(), objective, optimizer, Averages(0.99))
    state = init_state(NETWORK, optimizer, 0)
    x0 = np.random.default_rng(1).uniform(-1, 1, (12, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def step_in_parts():
        draws = objectives.sample_noise(objective, jax.random.key(2), 1000, x0.shape)
        in_parts = [dataclasses.replace(made_of, grad_accum_steps=parts) for parts in (1, 3)]
        return [update(each, state, x0, draws, None) for each in in_parts]

    (one, metrics), (parts, metrics_of_parts) = step_in_parts()
    for a, b in ((metrics, metrics_of_parts), (one.opt_state, parts.opt_state)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), a, b)


@pytest.fixture
def no_data(monkeypatch):
    """Preparing a dataset may take hours: what is wrong is said before."""
    monkeypatch.setattr("s2dm_jax.training.setup.load_dataset", lambda config: pytest.fail("the dataset was prepared"))


def test_batch_that_does_not_go_into_parts_and_devices(tmp_path, monkeypatch, no_data):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"batch_size=8 must be a multiple of 16, the 4 devices times"):
        train(run_config(train__grad_accum_steps=4), tmp_path / "run")


def test_each_checkpoint_is_judged_by_the_steps_since_the_one_before(tmp_path):
    train(run_config(train__keep_best="loss", train__max_to_keep=4), tmp_path / "run")
    logged = lines(tmp_path / "run")
    for i in range(0, len(logged), 2):
        path = tmp_path / "run" / "checkpoints" / str(logged[i + 1]["step"]) / "metrics" / "metrics"
        mean = (logged[i]["loss"] + logged[i + 1]["loss"]) / 2
        np.testing.assert_allclose(json.loads(path.read_text())["loss"], mean)


def test_only_metrics_of_the_run_can_choose_a_checkpoint(tmp_path, no_data):
    sentence = "config.train.keep_best='loss_skip' is not a metric of this run; choose one of nothing, loss, loss_s"
    with pytest.raises(UserError, match=re.escape(sentence)):
        train(run_config(train__keep_best="loss_skip", loss__skip=0), tmp_path / "run")


class StopsAt(telemetry.Progress):
    """Sends this process a signal when it shows the last step."""

    def update(self, step, loss, computed=None):
        if step == 400:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().update(step, loss, computed)


def test_a_signal_at_the_end_keeps_the_training_and_puts_off_the_evaluation(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loop, "Progress", StopsAt)
    with pytest.raises(SystemExit) as stop:
        train(run_config(), tmp_path / "run")
    assert stop.value.code == 128 + signal.SIGTERM
    printed = capfd.readouterr()
    assert (
        f"stopped at step 400 of 400, saved in {tmp_path / 'run'}; run the same command to evaluate it" in printed.out
    )
    assert re.search(
        r"^stopping after the current steps(, which takes about \d s)?; interrupt again to stop at once$", printed.err
    )
    assert int(newest_state(tmp_path / "run", run_config()).step) == 400
    assert not (tmp_path / "run" / "results.json").exists()


NUMBERS = {f"loss/{i}": 1.0 for i in range(10_000)}
PIXELS = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics.jsonl", lambda writer: writer.scalars(1, NUMBERS)),
        ("tensorboard", lambda writer: writer.image(1, "noise", PIXELS)),
    ],
)
def test_telemetry_on_a_full_disk_names_its_file_and_does_not_wait(tmp_path, name, write):
    writer = telemetry.MetricWriter(tmp_path, 0)
    with full_disk(100_000), pytest.raises(OSError, match="File too large") as error:
        write(writer)
    assert error.value.filename == str(tmp_path / name)


def test_telemetry_that_is_removed_meanwhile_is_made_anew_and_a_removed_folder_is_noticed(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    writer = telemetry.MetricWriter(workdir, 0)
    writer.scalars(1, {"loss": 1.0})
    (workdir / "metrics.jsonl").unlink()
    shutil.rmtree(workdir / "tensorboard")
    writer.scalars(2, {"loss": 0.5})
    writer.close()
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [2]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    shutil.rmtree(workdir)
    with pytest.raises(WriteError, match="No such file"):
        writer.scalars(3, {"loss": 0.1})


def test_a_trace_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch, capsys):
    def refuse():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", refuse)
    profile = telemetry.Profile(tmp_path, 0, 1)
    profile.before_chunk(2)
    profile.after_chunk(4, jnp.zeros(()))
    profile.close()
    assert capsys.readouterr().err.count("no trace could be written to") == 1
