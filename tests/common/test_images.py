import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from s2dm_jax.common.images import image_grid, save_png, to_uint8, to_unit


def test_to_uint8_rounds_half_up_and_clips():
    x = jnp.array([-9.0, -1.0, -1.0 + 0.99 / 255, -1.0 + 1.01 / 255, 0.0, 1.0, 9.0, jnp.inf, -jnp.inf])
    bytes_ = jax.jit(to_uint8)(x)
    assert bytes_.dtype == jnp.uint8
    assert bytes_.tolist() == [0, 0, 0, 1, 128, 255, 255, 255, 0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_to_uint8_inverts_scaling_of_every_byte(dtype):
    values = jnp.arange(256)
    assert to_uint8((values / 127.5 - 1).astype(dtype)).tolist() == values.tolist()


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_to_unit_scales_every_byte_where_it_is(kind):
    images = kind(np.arange(256, dtype=np.uint8).reshape(4, 4, 4, 4))
    x = to_unit(images)
    assert type(x) is type(images)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.ravel(), np.linspace(-1, 1, 256), rtol=0, atol=2e-7)
    np.testing.assert_array_equal(to_uint8(jnp.asarray(x)), images)


def test_to_uint8_refuses_integers():
    with pytest.raises(ValueError, match=r"x must be floating, in \[-1, 1\], got uint8"):
        to_uint8(jnp.zeros(3, jnp.uint8))


def test_grid_of_three_in_two_columns():
    images = np.array([[[[1], [2]]], [[[3], [4]]], [[[5], [6]]]], np.uint8)
    g = 128
    expected = [
        [g, g, g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, 1, 1, 2, 2, g, g, 3, 3, 4, 4, g, g],
        [g, g, 1, 1, 2, 2, g, g, 3, 3, 4, 4, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, 5, 5, 6, 6, g, g, g, g, g, g, g, g],
        [g, g, 5, 5, 6, 6, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g, g, g],
        [g, g, g, g, g, g, g, g, g, g, g, g, g, g],
    ]
    grid = image_grid(images, columns=2, scale=2)
    assert grid.dtype == np.uint8
    assert grid[:, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((9, 8, 8, 1), (3 * 34 + 2, 3 * 34 + 2, 1)),
        ((5, 8, 16, 3), (2 * 34 + 2, 3 * 66 + 2, 3)),
        ((1, 33, 40, 3), (37, 44, 3)),
        ((2, 31, 31, 1), (66, 130, 1)),
    ],
)
def test_grid_default_layout(shape, expected):
    assert image_grid(np.zeros(shape, np.uint8)).shape == expected


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (np.zeros((2, 8, 8, 1)), {}, r"images must be uint8 \[N,H,W,C\], not empty, got float64 \[2, 8, 8, 1\]"),
        (np.zeros((8, 8, 1), np.uint8), {}, r"got uint8 \[8, 8, 1\]"),
        (np.zeros((0, 8, 8, 1), np.uint8), {}, r"got uint8 \[0, 8, 8, 1\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), {"columns": 0}, "columns must be at least 1, got 0"),
        (np.zeros((2, 8, 8, 1), np.uint8), {"scale": -1}, "scale must be at least 1, got -1"),
    ],
)
def test_bad_grid(images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **kwargs)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_reads_back_and_leaves_nothing_else(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        save_png(path, image)
        assert reader.read() == b"old"
    with Image.open(path) as read:
        assert (read.format, read.mode) == ("PNG", {1: "L", 3: "RGB"}[channels])
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)
    assert list(tmp_path.iterdir()) == [path]


def test_png_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def fail(self, file, format):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(path, np.zeros((2, 2, 1), np.uint8))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)])
def test_bad_png(tmp_path, image):
    with pytest.raises(ValueError, match=r"image must be uint8 \[H,W,C\] with 1 or 3 channels, got "):
        save_png(tmp_path / "grid.png", image)
    assert not list(tmp_path.iterdir())
