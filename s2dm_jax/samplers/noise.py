"""The noise that sampling starts from and adds: image i depends on (seed, i) alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from s2dm_jax.diffusion.types import NoiseFn

# Streams of a sampling seed. Training folds its step number into its seed: these are numbers that no run reaches, so
# that sampling with the training's seed does not draw the training's noise again.
_X_T_STREAM = np.uint32(2**32 - 1)
_STEP_STREAM = np.uint32(2**32 - 2)


def seed_key(seed: int | jax.Array) -> jax.Array:
    """The key of a sampling seed, of the same generator whatever JAX_DEFAULT_PRNG_IMPL says."""
    return jax.random.key(seed, impl="threefry2x32")


def initial_noise(
    seed: int | jax.Array, indices: jax.Array | np.ndarray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """x_T of the images with these indices [B]: standard normal [B, H, W, C], for a `shape` (H, W, C)."""
    stream = jax.random.fold_in(seed_key(seed), _X_T_STREAM)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(stream, i), shape, dtype))(indices)


def image_keys(seed: int | jax.Array, indices: jax.Array | np.ndarray) -> jax.Array:
    """Keys [B] for `per_image_noise`, independent of x_T's noise."""
    stream = jax.random.fold_in(seed_key(seed), _STEP_STREAM)
    return jax.vmap(lambda i: jax.random.fold_in(stream, i))(indices)


def per_image_noise(keys: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> NoiseFn:
    """A `noise_fn`, step index j → [B, H, W, C]: the noise of image i depends on (keys[i], j) alone.

    `keys` is a key array [B], `shape` one image's (H, W, C).
    """

    def noise_fn(step):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, dtype))(keys)

    return noise_fn


def slerp(x_a: jax.Array, x_b: jax.Array, weight: float | jax.Array) -> jax.Array:
    """Spherical interpolation between noise images (DDIM, eq. 67), each pair along its own great circle.

    Args:
      x_a, x_b: [..., H, W, C]; the straight line joins two that are parallel or opposite.
      weight: 0 gives x_a, 1 gives x_b; a scalar, or any shape that broadcasts with the axes before H.
    """
    image = (-3, -2, -1)
    weight = jnp.expand_dims(jnp.asarray(weight, x_a.dtype), image)  # [..., 1, 1, 1]

    def inner(a, b):
        return jnp.sum(a * b, axis=image, keepdims=True)

    cosine = inner(x_a, x_b) / jnp.sqrt(inner(x_a, x_a) * inner(x_b, x_b))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))  # [..., 1, 1, 1]
    # Where the sine is 0 the circle is not defined, and the quotient would be 0/0.
    parallel = jnp.sin(angle) < 1e-6
    sine = jnp.where(parallel, 1, jnp.sin(angle))
    share_a = jnp.where(parallel, 1 - weight, jnp.sin((1 - weight) * angle) / sine)
    share_b = jnp.where(parallel, weight, jnp.sin(weight * angle) / sine)
    return share_a * x_a + share_b * x_b
