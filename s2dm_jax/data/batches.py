"""Which images a training step sees: a function of (seed, step) alone."""

import jax
import jax.numpy as jnp
import numpy as np


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a training run's data order, and of all else that its steps draw."""
    # Of other generators the order of the data would depend on the chunks' length.
    order_key, step_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    return order_key, step_key


def step_keys(step_key: jax.Array, step: int | jax.Array | np.ndarray) -> jax.Array:
    """Keys [3] of a step: of levels and noise, of dropout, of flips."""
    return jax.random.split(jax.random.fold_in(step_key, step), 3)


def batch_at(
    seed: int, step: int, images: np.ndarray, batch_size: int, random_flip: bool = False
) -> jax.Array:
    """The images that a step of a training run sees: a function of (seed, step) alone.

    Args:
      seed: the run's `config.train.seed`.
      step: from 0.
      images: uint8 [N, H, W, C], the training split.
      batch_size, random_flip: as the run's config has them.

    Returns:
      float32 [B, H, W, C] in [−1, 1].
    """
    order_key, step_key = run_keys(seed)
    rows = np.asarray(batch_indices(order_key, step, 1, batch_size, len(images)))[0]
    flip_key = step_keys(step_key, step)[2] if random_flip else None
    return gather_batch(None, jnp.asarray(images[rows]), flip_key)


def batch_indices(key: jax.Array, start: int, steps: int, batch_size: int, size: int) -> jax.Array:
    """Rows of the batches of `steps` steps from `start` on: every epoch is one permutation of all rows.

    Batches follow one another without a gap, so that one may hold the end of an epoch and the start of the
    next. The result does not depend on how a run is cut into chunks.

    Args:
      key: key of the data order.
      start: first step, a Python integer.
      steps: number of steps.
      batch_size: rows per step.
      size: number of rows of the data set.

    Returns:
      int32 [steps, batch_size].
    """
    first_epoch, offset = divmod(start * batch_size, size)
    epochs = -(-(offset + steps * batch_size) // size)
    # The number of permutations that `steps` steps can touch at most, so that one program serves every start.
    epochs_at_most = (steps * batch_size - 1) // size + 2
    assert epochs <= epochs_at_most
    return _gather_order(key, first_epoch, offset, steps, batch_size, size, epochs_at_most)


@jax.jit(static_argnums=(3, 4, 5, 6))
def _gather_order(key, first_epoch, offset, steps, batch_size, size, epochs):
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(first_epoch + jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys).reshape(-1)
    return order[offset + jnp.arange(steps * batch_size)].reshape(steps, batch_size)


def gather_batch(images: jax.Array | None, rows: jax.Array, flip_key: jax.Array | None = None) -> jax.Array:
    """Gathers rows of uint8 images and scales them to [−1, 1], flipping half of them if given a key.

    Args:
      images: uint8 [N, H, W, C]; None where the host has gathered the rows.
      rows: int [B]; or the images themselves, uint8 [B, H, W, C].
      flip_key: key of the horizontal flips, or None for no flips.

    Returns:
      float32 [B, H, W, C].
    """
    batch = rows if images is None else images[rows]
    x = batch.astype(jnp.float32) / 127.5 - 1
    if flip_key is None:
        return x
    flipped = jax.random.bernoulli(flip_key, shape=(len(rows), 1, 1, 1))
    return jnp.where(flipped, x[:, :, ::-1], x)
