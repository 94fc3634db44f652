"""Which images a training step sees: a function of (seed, step) alone."""

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.common.images import to_unit


def run_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """The keys of a training run's data order, and of all other random numbers of its steps."""
    # With other generators the order of the data would depend on the length of the chunks.
    order_key, step_key = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    return order_key, step_key


def step_keys(step_key: jax.Array, step: int | jax.Array | np.ndarray) -> jax.Array:
    """Keys [3] of a step: of timesteps and noise, of dropout, of flips."""
    return jax.random.split(jax.random.fold_in(step_key, step), 3)


def batch_at(seed: int, step: int, images: np.ndarray, batch_size: int, random_flip: bool = False) -> jax.Array:
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
    return preprocess_batch(jnp.asarray(images[rows]), flip_key)


def batch_indices(key: jax.Array, start: int, steps: int, batch_size: int, size: int) -> jax.Array:
    """Rows of the batches of `steps` steps from `start` on: every epoch is one permutation of all rows.

    Batches follow one another without a gap, so that one may hold the end of an epoch and the start of the
    next. The result does not depend on how a run is cut into chunks.

    Args:
      key: key of the data order.
      start: first step, a Python integer.
      steps: number of steps.
      batch_size: rows per step.
      size: number of rows of the dataset.

    Returns:
      int32 [steps, batch_size].
    """
    first_epoch, offset = divmod(start * batch_size, size)
    epochs = -(-(offset + steps * batch_size) // size)
    # The number of permutations that `steps` steps can touch at most, so that one program serves every start.
    max_epochs = (steps * batch_size - 1) // size + 2
    assert epochs <= max_epochs
    return _gather_order(key, first_epoch, offset, steps, batch_size, size, max_epochs)


@jax.jit(static_argnums=(3, 4, 5, 6))
def _gather_order(key, first_epoch, offset, steps, batch_size, size, epochs):
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(first_epoch + jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys).reshape(-1)
    return order[offset + jnp.arange(steps * batch_size)].reshape(steps, batch_size)


def gather_batch(images: jax.Array, rows: jax.Array, flip_key: jax.Array | None = None) -> jax.Array:
    """The batch of these rows of the dataset, through `preprocess_batch`.

    Args:
      images: uint8 [N, H, W, C], on the devices.
      rows: int [B].
      flip_key: as for `preprocess_batch`.

    Returns:
      float32 [B, H, W, C] in [−1, 1].
    """
    return preprocess_batch(images[rows], flip_key)


def preprocess_batch(images: jax.Array, flip_key: jax.Array | None = None) -> jax.Array:
    """A batch of images scaled to [−1, 1] and, given a key, each flipped horizontally with probability ½.

    Args:
      images: uint8 [B, H, W, C].
      flip_key: key of the flips, or None for none.

    Returns:
      float32 [B, H, W, C] in [−1, 1].
    """
    x = to_unit(images)
    if flip_key is None:
        return x
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, x[:, :, ::-1], x)
