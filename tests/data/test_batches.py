"""Which images training sees, in which order, and how they are scaled and flipped."""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits as sklearn_digits

from s2dm_jax.data.batches import batch_at, batch_indices, preprocess_batch, run_keys
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


def test_order_past_32_bits_of_images_is_a_new_permutation_of_every_epoch():
    key, size = jax.random.key(0), 1000
    # 125 steps of 8 images are an epoch; image number 2³² is in the middle of epoch 4,294,967.
    epoch = 2**32 // size
    steps = np.asarray(batch_indices(key, 125 * epoch, 250, 8, size))
    rows = steps.reshape(2, size)
    for permutation in rows:
        np.testing.assert_array_equal(np.sort(permutation), np.arange(size))
    assert not np.array_equal(rows[0], rows[1])
    # A counter that wrapped would repeat the order of an early epoch.
    early = batch_indices(key, 0, 375, 8, size).reshape(3, size)
    assert all(not np.array_equal(permutation, other) for permutation in rows for other in early)
    for start in (1, 60, 124, 125):
        np.testing.assert_array_equal(batch_indices(key, 125 * epoch + start, 3, 8, size), steps[start : start + 3])


def test_scaling_reaches_both_ends_and_flips_half_of_the_images():
    images = np.zeros((4, 1, 2, 1), np.uint8)
    images[:, :, 1] = 255
    np.testing.assert_array_equal(preprocess_batch(jnp.asarray(images))[:, 0, :, 0], [[-1, 1]] * 4)
    x = preprocess_batch(jnp.asarray(images.repeat(500, axis=0)), jax.random.key(0))
    assert set(map(tuple, np.asarray(x)[:, 0, :, 0])) == {(-1, 1), (1, -1)}
    assert abs(float(jnp.mean(x[:, 0, 0, 0]))) < 0.1


def test_a_batch_is_the_same_gathered_on_the_device_or_on_the_host():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), np.uint8)
    rows, key = np.array([3, 3, 19, 0]), jax.random.key(1)
    for flip_key in (None, key):
        on_device = preprocess_batch(jnp.asarray(images)[jnp.asarray(rows)], flip_key)
        np.testing.assert_array_equal(on_device, preprocess_batch(jnp.asarray(images[rows]), flip_key))
    expected = images[np.asarray(batch_indices(run_keys(3)[0], 7, 1, 4, 20))[0]]
    np.testing.assert_array_equal(batch_at(3, 7, images, 4), preprocess_batch(jnp.asarray(expected)))
