"""Loss scaling: exact gradients, overflows, growth, resume; training in float16 against float32."""

import dataclasses
import functools
import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TINY, ToyNetwork, small_config

from s2dm_jax.common.errors import UserError
from s2dm_jax.diffusion import objectives
from s2dm_jax.diffusion.schedule import linear_schedule
from s2dm_jax.inference.model import load
from s2dm_jax.models import variance_head
from s2dm_jax.training import loop, telemetry
from s2dm_jax.training.averages import Averages
from s2dm_jax.training.failures import check_loss_scale, usual_cure
from s2dm_jax.training.loss_scale import next_loss_scale
from s2dm_jax.training.step import StepConfig, make_train_chunk, update, update_variance_head
from s2dm_jax.weights.read import read_weights
from s2dm_jax.weights.write import infer_config, write_weights
from s2dm_jax.workdir import checkpoint, state
from s2dm_jax.workdir.state import LossScale, TrainState, build_optimizer, init_state, make_optimizer, new_state

NETWORK, SCHEDULE = ToyNetwork(), linear_schedule()
OBJECTIVE, OPTIMIZER = objectives.paper(), make_optimizer(1e-3, 1.0)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (8, 8, 8, 1)).astype(np.float32)


def loss_scale(scale, finite_steps=0):
    return LossScale(jnp.float32(scale), jnp.int32(finite_steps))


def step(scale=None, *, images=IMAGES, **options):
    """The state before and after a step with this dynamic loss scale, and the step's metrics; operation by operation,
    since a compiler rounds what it fuses otherwise.
    """
    made_of = StepConfig(NETWORK, SCHEDULE, OBJECTIVE, OPTIMIZER, Averages(0.9), **options)
    before = init_state(NETWORK, OPTIMIZER, 0, scale)
    draws = objectives.sample_noise(OBJECTIVE, jax.random.key(2), SCHEDULE.T, images.shape)
    return before, *update(made_of, before, images, draws, None)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_power_of_two_leaves_the_step_as_it_is_to_the_bit(parts):
    _, plain, metrics = step(grad_accum_steps=parts)
    for scale, fixed in ((None, 1024.0), (loss_scale(2.0**20, 5), 1.0)):
        _, after, scaled_metrics = step(scale, loss_scale=fixed, grad_accum_steps=parts)
        assert_equal(after._replace(loss_scale=None), plain)
        assert scaled_metrics.pop("loss_scale", 2.0**20) == 2.0**20
        assert_equal(scaled_metrics, metrics)
    assert_equal(after.loss_scale, loss_scale(2.0**20, 6))


def test_an_overflow_changes_nothing_but_the_step_and_the_scale():
    before, after, metrics = step(loss_scale(2.0**127, 3))
    assert_equal(after, before._replace(step=np.int32(1), loss_scale=loss_scale(2.0**126)))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    # The scale is not to blame for a loss that is not finite itself.
    before, after, metrics = step(loss_scale(1024.0, 3), images=IMAGES * np.nan)
    assert not np.isfinite(metrics["loss"])
    assert_equal(after, before._replace(step=np.int32(1)))


def test_the_scale_doubles_after_as_many_steps_without_an_overflow():
    scale, found = loss_scale(4.0), []
    for overflow in (False, False, False, True, False, False, True, True, False, False, False, False):
        scale = next_loss_scale(scale, jnp.asarray(overflow), 3)
        found.append((float(scale.scale), int(scale.finite_steps)))
    expected = [(4, 1), (4, 2), (8, 0), (4, 0), (4, 1), (4, 2), (2, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert found == expected
    # It stays a number.
    assert float(next_loss_scale(loss_scale(2.0**127), jnp.asarray(False), 1).scale) == 2.0**127


def test_an_overflow_halves_the_scale_where_steps_are_skipped_too():
    config = small_config(**{"train.on_nonfinite": "skip", "train.loss_scale": "dynamic"})
    before = init_state(NETWORK, OPTIMIZER, 0, loss_scale(2.0**127, 3))
    rows = np.full((1, *IMAGES.shape), 77, np.uint8)
    after, _ = jax.jit(make_train_chunk(config, NETWORK, OPTIMIZER))(before, None, rows, jax.random.key(0))
    assert_equal(after, before._replace(step=np.int32(1), loss_scale=loss_scale(2.0**126)))


def run_config(**changes):
    options = {"train.loss_scale": "dynamic", "train.loss_scale_growth_interval": 4, "train.warmup_steps": 25}
    options |= {"train.steps": 40, "train.log_every": 10, "train.checkpoint_every": 20, "train.ema_start": "first_step"}
    return small_config(**{**options, **{name.replace("__", "."): value for name, value in changes.items()}})


def test_resume_is_exact_through_overflows_at_any_chunk_size(tmp_path, monkeypatch):
    for name in ("evaluate", "_save_samples"):
        monkeypatch.setattr(loop.TrainingLoop, name, lambda self: None)
    # So large that the first steps overflow, and again others after each growth.
    monkeypatch.setattr(state, "_INITIAL_LOSS_SCALE", 2.0**127)

    def trained(name, **changes):
        loop.train(run_config(**changes), tmp_path / name, network=NETWORK)
        like = init_state(NETWORK, build_optimizer(run_config()), 0, loss_scale(1.0))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return checkpoint.restore_latest(checkpoint.open_checkpoints(tmp_path / name), like), lines

    expected, lines = trained("run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "40")
    found, others = trained("run", train__log_every=8)
    assert [line["step"] for line in others] == [10, 20, 24, 32, 40]
    assert_equal(found, expected)
    overflows = [line["overflow_steps"] for line in lines]
    assert sum(overflows) == sum(line["overflow_steps"] for line in others)
    assert overflows[0] > 1
    assert sum(overflows[1:]) > 1
    assert int(state.num_updates(expected.opt_state)) == 40 - sum(overflows)
    assert lines[-1]["loss_scale"] == float(expected.loss_scale.scale)
    # The schedule counts updates.
    rates = [line["learning_rate"] * 25 / 1e-3 for line in lines[:2]]
    np.testing.assert_allclose(rates, [9 - overflows[0], 19 - sum(overflows[:2])], atol=1.01)
    assert load(tmp_path / "run", network=NETWORK).step == 40


class StateBefore(NamedTuple):
    """The state of versions without loss scaling."""

    step: Any
    params: Any
    ema_params: Any
    opt_state: Any


def test_checkpoints_without_a_loss_scale_are_those_of_before(tmp_path):
    now = init_state(NETWORK, OPTIMIZER, 0)
    stored = {}
    for name, saved in (("before", StateBefore(*now[:4])), ("now", now)):
        manager = checkpoint.open_checkpoints(tmp_path / name)
        checkpoint.save(manager, 1, saved)
        checkpoint.finish(manager)
        stored[name] = (tmp_path / name / "checkpoints" / "1" / "state" / "_METADATA").read_bytes()
        restored = checkpoint.restore_latest(manager, now)
        assert type(restored) is TrainState
        assert_equal(restored, now)
    assert stored["now"] == stored["before"]
    # A run with the option is none without it.
    with pytest.raises(UserError, match="it is damaged or of another network"):
        checkpoint.restore_latest(manager, now._replace(loss_scale=loss_scale(1.0)))


def test_a_scale_that_falls_without_end_stops_the_run_in_a_sentence(tmp_path, monkeypatch):
    check_loss_scale({"loss": np.ones(2)}, 40, 20)
    check_loss_scale({"loss_scale": np.array([2.0, 1.0])}, 40, 20)
    with pytest.raises(UserError, match=r"not finite at step 41 with a loss scale of 1: .*checkpoint is step 20; a lo"):
        check_loss_scale({"loss_scale": np.array([1.0, 0.5, 0.25])}, 40, 20)
    for dtype, scale, mends in (("auto", "none", False), ("float16", "none", True), ("auto", "8", True)):
        cure = usual_cure(small_config(**{"model.dtype": dtype, "train.loss_scale": scale}))
        assert cure.startswith("config.train.loss_scale=dynamic, or a lower") == mends
    # In a run: a gradient that is infinite whatever the scale.
    monkeypatch.setattr("s2dm_jax.training.step.scale_loss", lambda loss, factor: loss * factor * jnp.inf)
    with pytest.raises(UserError, match=r"not finite at step 16 with a loss scale of 1: .*no checkpoint was saved yet"):
        loop.train(run_config(train__checkpoint_every=40, train__sample_every=40), tmp_path / "run", network=NETWORK)


def test_the_best_checkpoint_is_none_of_overflows_alone(tmp_path):
    manager = checkpoint.open_checkpoints(tmp_path, best="grad_norm")
    for step, metrics in enumerate(({"loss": 1.0}, {"loss": 1.0, "grad_norm": 2.0}, {"loss": 1.0}, {"loss": 1.0})):
        checkpoint.save(manager, step, init_state(NETWORK, OPTIMIZER, 0), {}, metrics)
    checkpoint.finish(manager)
    assert manager.all_steps() == [1, 3]


def test_metrics_of_overflows():
    by_timestep = np.ones((3, 2, 10))
    metrics = {"loss": np.array([1.0, 3.0, np.nan]), "grad_norm": np.array([np.inf, 5.0, np.nan])}
    metrics |= {"loss_scale": np.array([4.0, 4.0, 2.0]), "by_timestep": by_timestep}
    np.testing.assert_array_equal(telemetry.overflows(metrics), [True, False, False])
    found = telemetry.aggregate_metrics(metrics, np.array([False, True, False]), 10)
    found = {name: value for name, value in found.items() if "/" not in name}
    assert found == {"loss": 2.0, "grad_norm": 5.0, "loss_scale": 2.0, "overflow_steps": 1, "skipped_steps": 1}
    # A chunk of one step that overflows.
    first = {name: values[:1] for name, values in metrics.items()}
    found = telemetry.aggregate_metrics(first, np.array([False]), 10)
    assert (found["loss"], found["overflow_steps"], "grad_norm" in found) == (1.0, 1, False)


@dataclasses.dataclass(frozen=True)
class HalfNetwork(ToyNetwork):
    """The toy network with activations in float16."""

    dtype: str = "float16"

    def apply(self, params, x, t, dropout_key=None):
        params, x, t = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), (params, x, t))
        return super().apply(params, x, t).astype(jnp.float32)


def test_training_in_float16_is_near_that_in_float32_once_the_loss_is_scaled():
    objective, optimizer = objectives.released(skip=10), optax.sgd(0.1)
    draws = objectives.sample_noise(objective, jax.random.key(2), SCHEDULE.T, IMAGES.shape)
    start = init_state(NETWORK, optimizer, 0)

    def trained(network, scale):
        """The weights after five updates, and the number of steps they took."""
        made_of = StepConfig(network, SCHEDULE, objective, optimizer, Averages(0.9))
        one_step = jax.jit(functools.partial(update, made_of))
        now, updates = start._replace(loss_scale=loss_scale(scale)), 0
        while updates < 5:
            now, metrics = one_step(now, IMAGES, draws, None)
            updates += bool(np.isfinite(metrics["grad_norm"]))
        assert {leaf.dtype for leaf in jax.tree.leaves((now.params, now.ema_params))} == {jnp.dtype("float32")}
        return now.params, int(now.step)

    def distance(a, b):
        return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))

    expected, _ = trained(NETWORK, 1.0)
    moved = distance(expected, start.params)
    for scale, least_steps, low, high in ((1024.0, 5, 0.0, 0.01), (2.0**30, 10, 0.0, 0.01), (2.0**-20, 5, 0.2, 2.0)):
        found, steps = trained(HalfNetwork(), scale)
        assert steps >= least_steps
        assert low < distance(found, expected) / moved < high


@pytest.mark.slow
def test_a_variance_head_is_trained_in_float16():
    network = dataclasses.replace(TINY, dtype="float16")
    made_of = StepConfig(network, SCHEDULE, OBJECTIVE, OPTIMIZER, Averages(0.9), variance_head="npr")
    draws = objectives.sample_noise(OBJECTIVE, jax.random.key(2), SCHEDULE.T, IMAGES.shape)
    head = variance_head.init_params(network, 0)
    for scale, moves in ((2.0**100, False), (1024.0, True)):
        before = new_state(head, OPTIMIZER, loss_scale(scale))
        after, _ = jax.jit(functools.partial(update_variance_head, made_of, network.init(0)))(
            before, IMAGES, draws, None
        )
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after.params, head)), strict=True)) == moves
        assert float(after.loss_scale.scale) == (scale if moves else scale / 2)


@pytest.mark.slow
def test_a_run_in_float16_resumes_and_is_sampled(tmp_path):
    config = small_config(**{"model.dtype": "float16", "model.remat": True, "model.attn_resolutions": (8,)})
    loop.train(config, tmp_path / "straight")
    config.train.update({"steps": 3, "log_every": 1})
    loop.train(config, tmp_path / "run")
    config.train.steps = 4
    loop.train(config, tmp_path / "run")
    runs = [load(tmp_path / name) for name in ("straight", "run")]
    assert_equal(runs[0].ema_params, runs[1].ema_params)
    images = [run.sample(4, nfe=3) for run in runs]
    assert_equal(*images)
    full = runs[0]._replace(network=dataclasses.replace(runs[0].network, dtype="float32"))
    assert 0 < np.abs(full.sample(4, nfe=3).astype(int) - images[0]).max() < 10
    # The initial scale is too large for the gradient of a sum over pixels.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_scale"] < 65536
    # Weights to continue with, in float16.
    weights = read_weights(str(tmp_path / "run"))
    write_weights(str(tmp_path / "new"), "workdir", weights, infer_config(weights, given=config), source={})
    assert_equal(load(tmp_path / "new").ema_params, weights.ema_params)
