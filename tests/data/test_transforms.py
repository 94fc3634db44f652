"""Every kind of image file becomes what docs/data.md says, or an error."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from s2dm_jax.data.transforms import ImageTransform, crop_box, decode

PLAIN = ImageTransform(4, 3, "none", "bilinear")
GREY = PLAIN._replace(channels=1)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def uniform(mode, colour, size=(4, 4)):
    return Image.new(mode, size, colour)


def png_of_16_bits(colour_type, samples, transparent=(), *, bits=16):
    """A 4×4 PNG of 16-bit samples, one pixel repeated, written by hand: Pillow writes no colour ones.

    Of fewer `bits`, the samples are bytes of several pixels.
    """
    declared = [(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))] if transparent else []
    row = b"\0" + (struct.pack(f">{len(samples)}H", *samples) * 4 if bits == 16 else bytes(samples))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, colour_type, 0, 0, 0)),
        *declared,
        (b"IDAT", zlib.compress(row * 4)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def palette(transparency=None):
    image = uniform("P", 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    return encoded(image) if transparency is None else encoded(image, transparency=transparency)


KINDS = {
    "rgb": (encoded(uniform("RGB", (10, 20, 30))), (10, 20, 30)),
    "webp": (encoded(uniform("RGB", (10, 20, 30)), "WEBP", lossless=True), (10, 20, 30)),
    "grey": (encoded(uniform("L", 77)), (77, 77, 77)),
    "bits": (encoded(uniform("1", 1)), (255, 255, 255)),
    "palette": (palette(), (10, 20, 30)),
    "palette_transparent": (palette(transparency=1), (255, 255, 255)),
    "opaque": (encoded(uniform("RGBA", (0, 0, 0, 255))), (0, 0, 0)),
    "transparent": (encoded(uniform("RGBA", (0, 100, 200, 0))), (255, 255, 255)),
    "grey_alpha": (encoded(uniform("LA", (0, 51))), (204, 204, 204)),
    "16_bits_grey": (png_of_16_bits(0, [0x12FF]), (0x12, 0x12, 0x12)),
    "16_bits_white": (png_of_16_bits(0, [0xFFFF]), (255, 255, 255)),
    "16_bits_rgb": (png_of_16_bits(2, [0x12FF, 0x3400, 0xFFFF]), (0x12, 0x34, 0xFF)),
    "16_bits_transparent": (png_of_16_bits(6, [0, 0, 0, 0]), (255, 255, 255)),
    "16_bits_grey_declared": (png_of_16_bits(0, [0x12FF], [0x12FF]), (255, 255, 255)),
    "16_bits_grey_other": (png_of_16_bits(0, [0x12FF], [0x12FE]), (0x12, 0x12, 0x12)),
    "4_bits_grey_declared": (png_of_16_bits(0, [0x33, 0x33], [3], bits=4), (255, 255, 255)),
    "2_bits_grey_declared": (png_of_16_bits(0, [0x55], [1], bits=2), (255, 255, 255)),
    "2_bits_grey_other": (png_of_16_bits(0, [0x55], [2], bits=2), (85, 85, 85)),
    "16_bits_rgb_declared": (png_of_16_bits(2, [1, 0x3400, 0xFFFF], [1, 0x3400, 0xFFFF]), (255, 255, 255)),
    "16_bits_rgb_other": (png_of_16_bits(2, [0x0A00, 0, 0], [0x000A, 0, 0]), (0x0A, 0, 0)),
}


@pytest.mark.parametrize(("data", "pixel"), KINDS.values(), ids=KINDS)
def test_kinds_of_pixels(data, pixel):
    np.testing.assert_array_equal(decode(data, PLAIN), np.full((4, 4, 3), pixel, np.uint8))


def test_colour_becomes_grey_where_one_channel_is_wanted():
    image = decode(encoded(uniform("RGB", (255, 0, 0))), GREY)
    assert image.shape == (4, 4, 1)
    assert set(image.ravel()) == {round(255 * 0.299)}
    assert set(decode(encoded(uniform("L", 9)), GREY).ravel()) == {9}


def test_cmyk_jpeg_is_read_as_colour():
    pixel = decode(encoded(uniform("CMYK", (0, 255, 255, 0)), "JPEG"), PLAIN)[0, 0]
    assert pixel[0] > 200
    assert pixel[1:].max() < 60


def test_exif_turns_the_picture_upright():
    image = Image.fromarray(np.array([[[255, 0, 0]] * 4, [[0, 0, 255]] * 4], np.uint8).repeat(2, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down = encoded(image, exif=exif)
    assert tuple(decode(upside_down, PLAIN)[0, 0]) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data, PLAIN), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x01\0"])
def test_a_picture_with_damaged_exif_is_read(exif):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), exif=b"Exif\0\0" + exif), PLAIN), pixels)


def test_a_long_text_in_a_png_is_no_reason_to_refuse_it():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", "a" * 5_000_000, zip=True)
    text.add_text("workflow", "b" * 5_000_000, zip=True)
    assert tuple(decode(encoded(uniform("RGB", (1, 2, 3)), pnginfo=text), PLAIN)[0, 0]) == (1, 2, 3)


def test_crops():
    assert crop_box("ddim", 178, 218) == (25, 57, 153, 185)
    assert crop_box("center_crop_140", 178, 218) == (19, 39, 159, 179)
    assert crop_box("center", 178, 218) == (0, 20, 178, 198)
    assert crop_box("none", 178, 218) == (0, 0, 178, 218)
    with pytest.raises(ValueError, match="179×218 pixels, but the crop ddim needs"):
        crop_box("ddim", 179, 218)
    with pytest.raises(ValueError, match="139×218 pixels, but the crop center_crop_140 needs"):
        crop_box("center_crop_140", 139, 218)


def test_halving_is_the_antialiased_triangle_filter():
    """Against the filter written out: weights 1, 3, 3, 1 over eight, cut off and scaled up at the edges."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    actual = decode(encoded(Image.fromarray(pixels)), ImageTransform(8, 3, "none", "bilinear"))
    weights = np.zeros((8, 16))
    for i in range(8):
        for j, w in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < 16:
                weights[i, j] = w
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("ia,jb,abc->ijc", weights, weights, pixels)
    assert np.abs(actual - expected).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encoded(uniform("RGB", (1, 2, 3), (64, 64)))[:-40],
        encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")[:900],
        encoded(uniform("RGB", (1, 2, 3)), "BMP"),
        encoded(uniform("RGB", (1, 2, 3)), "GIF"),
    ],
)
def test_damaged_and_foreign_files_are_errors(data):
    with pytest.raises(Exception, match=r"."):
        decode(data, PLAIN)


def test_a_small_file_of_very_many_pixels_is_not_opened():
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(Image.DecompressionBombError):
        decode(bomb, PLAIN)


def test_a_limit_of_pixels_that_was_taken_away_is_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="4×4 pixels, more than 15"),
    ):
        decode(KINDS["rgb"][0], PLAIN)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(KINDS["rgb"][0], PLAIN).shape == (4, 4, 3)
