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
      batch_size, random_flip: as in the run's config.

    Returns:
      float32 [B, H, W, C] in [−1, 1].
    """
    order_key, step_key = run_keys(seed)
    rows = np.asarray(batch_indices(order_key, step, 1, batch_size, len(images)))[0]
    flip_key = step_keys(step_key, step)[2] if random_flip else None
    return preprocess_batch(jnp.asarray(images[rows]), flip_key)


def batch_indices(key: jax.Array, start: int, steps: int, batch_size: int, size: int) -> jax.Array:
    """Rows int32 [steps, batch_size] of the batches from step `start` on: every epoch permutes all `size` rows.

    Batches follow one another without a gap: one may hold the end of an epoch and the start of the next. The result
    does not depend on how a run is cut into chunks.
    """
    first_epoch, offset = divmod(start * batch_size, size)  # Python integers: their product may exceed 32 bits.
    # The most permutations that `steps` steps can touch, so that one program serves every start.
    max_epochs = (steps * batch_size - 1) // size + 2
    return _gather_order(key, first_epoch, offset, steps, batch_size, size, max_epochs)


@jax.jit(static_argnums=(3, 4, 5, 6))
def _gather_order(key, first_epoch, offset, steps, batch_size, size, epochs):
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(first_epoch + jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys).reshape(-1)  # [epochs · size]
    return order[offset + jnp.arange(steps * batch_size)].reshape(steps, batch_size)


def preprocess_batch(images: jax.Array, flip_key: jax.Array | None = None) -> jax.Array:
    """Images uint8 [B, H, W, C] as float32 in [−1, 1]; given a key, each is flipped horizontally with probability ½."""
    x = to_unit(images)
    if flip_key is None:
        return x
    flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, x[:, :, ::-1], x)
