"""Images: between bytes and [−1, 1], grids, PNG files."""

import math
import os
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from s2dm_jax.common.files import atomic_path

_READABLE_TILE = 32
_SEPARATOR = 2

# Mid grey shows against the black ground of digits and the white of photographs alike.
_SEPARATOR_VALUE = 128

Bytes = TypeVar("Bytes", jax.Array, np.ndarray)


def to_unit(images: Bytes) -> Bytes:
    """uint8 of any shape, on host or device, to float32 in [−1, 1] as in the published codes; `to_uint8` inverts it."""
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(x: jax.Array) -> jax.Array:
    """Floats of any shape, clipped to [−1, 1], to uint8, rounded half up like torchvision's save_image.

    Raises:
      ValueError: if x is not floating.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, in [-1, 1], got {x.dtype}")
    unit = (jnp.clip(x.astype(jnp.float32), -1.0, 1.0) + 1.0) * 0.5
    return jnp.floor(unit * 255.0 + 0.5).astype(jnp.uint8)


def is_saturated(images: Any) -> Any:
    """Which values of uint8 images, of numpy or jax and any shape, are 0 or 255, the ends of the range: bool."""
    return (images == 0) | (images == 255)


def image_grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> np.ndarray:
    """Images side by side, row by row, each magnified by repeating pixels, with grey lines between them.

    Args:
      images: uint8 [N, H, W, C], N ≥ 1.
      columns: images in a row; by default as many as make the grid about square.
      scale: how many times each pixel is repeated; by default the least that makes a tile 32 pixels or more.

    Returns:
      uint8 [H', W', C], H' = rows·(scale·H + 2) + 2, W' = columns·(scale·W + 2) + 2.

    Raises:
      ValueError: for another type or shape, or columns or scale below 1.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N,H,W,C], not empty, got {images.dtype} {list(images.shape)}")
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = math.ceil(_READABLE_TILE / min(height, width)) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    rows = math.ceil(count / columns)
    line = (_SEPARATOR, 0)
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    tiles = np.pad(tiles, ((0, rows * columns - count), line, line, (0, 0)), constant_values=_SEPARATOR_VALUE)
    _, height, width, _ = tiles.shape
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)  # [rows, H, columns, W, C]
    grid = grid.reshape(rows * height, columns * width, channels)
    return np.pad(grid, (line[::-1], line[::-1], (0, 0)), constant_values=_SEPARATOR_VALUE)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C], C = 1 (grey) or 3 (RGB), to a PNG file, through `atomic_path`.

    Raises:
      ValueError: for another type or shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"image must be uint8 [H,W,C] with 1 or 3 channels, got {image.dtype} {list(image.shape)}")
    # Waiting for the disk takes ten times as long as writing: minutes for 50,000 samples.
    with atomic_path(path, fsync=False) as temporary:
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(temporary, format="PNG")
