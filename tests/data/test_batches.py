"""Which images training sees, in which order, and how they are scaled and flipped."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits as sklearn_digits

from s2dm_jax.data.batches import batch_indices, gather_batch
from s2dm_jax.data.datasets import load_digits


def test_digits_are_split_once_without_overlap_and_keep_their_grey_levels():
    data = load_digits()
    assert data.train.shape == (1297, 8, 8, 1)
    assert data.held_out.shape == (500, 8, 8, 1)
    assert data.train.dtype == np.uint8
    assert len(np.unique(data.train)) == 17
    both = np.concatenate([data.train, data.held_out]).reshape(1797, -1)
    source = np.round(sklearn_digits().data / 16 * 255)
    assert sorted(map(tuple, both)) == sorted(map(tuple, source))
    np.testing.assert_array_equal(load_digits().held_out, data.held_out)


def test_every_epoch_shows_every_row_once_in_another_order():
    rows = np.asarray(batch_indices(jax.random.key(0), 0, 30, 8, 60)).ravel()
    epochs = rows.reshape(4, 60)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(60))
    assert not np.array_equal(epochs[0], epochs[1])


def test_order_depends_on_the_step_and_not_on_the_chunk():
    key = jax.random.key(3)
    whole = np.asarray(batch_indices(key, 0, 24, 7, 10))
    for length in (1, 4, 12):
        parts = [batch_indices(key, first, length, 7, 10) for first in range(0, 24, length)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(whole, batch_indices(jax.random.key(4), 0, 24, 7, 10))


def test_order_is_defined_past_32_bits_of_images():
    rows = batch_indices(jax.random.key(0), 2**31 // 64 + 5, 3, 128, 1000)
    assert rows.shape == (3, 128)
    assert 0 <= int(rows.min()) <= int(rows.max()) < 1000


def test_scaling_reaches_both_ends_and_flips_half_of_the_images():
    images = np.zeros((4, 1, 2, 1), np.uint8)
    images[:, :, 1] = 255
    x = gather_batch(jnp.asarray(images), jnp.arange(4))
    np.testing.assert_array_equal(x[:, 0, :, 0], [[-1, 1]] * 4)
    rows = jnp.zeros(2000, jnp.int32)
    x = gather_batch(jnp.asarray(images), rows, jax.random.key(0))
    assert set(map(tuple, np.asarray(x)[:, 0, :, 0])) == {(-1, 1), (1, -1)}
    assert abs(float(jnp.mean(x[:, 0, 0, 0]))) < 0.1
