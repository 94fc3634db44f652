"""Adam, AdamW and the schedules of the learning rate against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small_config

from s2dm_jax.config import default_config
from s2dm_jax.workdir.ema import largest_update
from s2dm_jax.workdir.state import build_optimizer, learning_rate, num_updates


def test_defaults_are_the_papers_adam_to_the_bit():
    optimizer, expected = (
        build_optimizer(default_config()),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4)),
    )
    params = {"w": jnp.linspace(-1.0, 1.0, 7)}
    states, rng = [each.init(params) for each in (optimizer, expected)], np.random.default_rng(0)
    for _ in range(3):
        grads = {"w": rng.standard_normal(7, np.float32)}
        (found, states[0]), (wanted, states[1]) = (
            each.update(grads, state, params) for each, state in zip((optimizer, expected), states, strict=True)
        )
        # Also the tree is the same, so that older checkpoints are restored.
        jax.tree.map(np.testing.assert_array_equal, (found, states[0]), (wanted, states[1]))
    assert num_updates(states[0]) == 3


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("constant", None), ("linear", lambda f: 1 - f), ("cosine", lambda f: (1 + np.cos(np.pi * f)) / 2)],
)
def test_schedules_have_their_closed_forms(kind, shape, warmup):
    lr, end, last = 1e-3, 1e-5, 60
    config = small_config(**{"train.lr": lr, "train.lr_schedule": kind, "train.warmup_steps": warmup})
    config.train.steps = 100
    if shape:
        config.train.update(lr_end=end, decay_steps=last)
    rate = learning_rate(config)
    if not callable(rate):
        assert (rate, kind, warmup) == (lr, "constant", 0)
        return
    for n in (0, 1, 5, 9, 10, 11, 35, 59, 60, 61, 99):
        f = min(max(n - warmup, 0) / (last - warmup), 1.0)
        after = end + (lr - end) * shape(f) if shape else lr
        expected = lr * n / warmup if n < warmup else after
        np.testing.assert_allclose(jax.jit(rate)(np.int32(n)), expected, rtol=2e-6, atol=1e-9)
    if shape:
        # Without a field of its own, the decay ends with the training.
        config.train.decay_steps = 0
        assert float(learning_rate(config)(99)) > end * 1.01
        np.testing.assert_allclose(learning_rate(config)(100), end, rtol=1e-5)


def test_adamw_with_warm_up_makes_the_steps_of_its_formula():
    b1, b2, eps, decay, lr, warmup = 0.8, 0.95, 1e-3, 0.3, 0.1, 3
    names = ("adam_b1", "adam_b2", "adam_eps", "weight_decay", "lr", "warmup_steps")
    config = small_config(**{"train.steps": 5, "train.grad_clip": 0.0})
    config.train.update(dict(zip(names, (b1, b2, eps, decay, lr, warmup), strict=True)))
    optimizer, rng = build_optimizer(config), np.random.default_rng(0)
    params = rng.standard_normal(6, np.float32)
    state, expected, m, v = optimizer.init(params), params.astype(np.float64), np.zeros(6), np.zeros(6)
    for n in range(5):
        g = rng.standard_normal(6, np.float32)
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.square(g, dtype=np.float64)
        direction = (m / (1 - b1 ** (n + 1))) / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)
        expected = expected - lr * min(n / warmup, 1) * (direction + decay * expected)
        np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.9), (0.2, 0.1), (0.0, 0.99), (0.6, 0.5)])
def test_adams_updates_are_bounded(b1, b2):
    bound, largest = largest_update(b1, b2), 0.0
    for n in range(1, 300):
        # Equality in Cauchy and Schwarz: the worst gradients, the newest last.
        g = (b1 / b2) ** np.arange(n)[::-1]
        ages = np.arange(n)[::-1]
        m, v = (1 - b1) * (b1**ages @ g) / (1 - b1**n), (1 - b2) * (b2**ages @ g**2) / (1 - b2**n)
        largest = max(largest, m / np.sqrt(v))
    assert 0.5 * bound < largest <= bound * (1 + 1e-9)
    assert largest_update(0.9, 0.81) == np.inf
