"""One image file to one uint8 array: formats, kinds of pixels, crop and resize."""

import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")

# A long text in a PNG, as some image generators write, is no reason to refuse the picture; MAX_TEXT_MEMORY still holds.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# How an image is turned upright, by the value of EXIF's orientation.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow multiplies grey pixels of few bits with, by its raw mode.
_STRETCHED = {"L;2": 85, "L;4": 17}

_CELEBA_SIZE = (178, 218)
# Left, top, right, bottom: 128×128 around column 89, row 121 (DDIM's code, datasets/__init__.py).
_DDIM_BOX = (25, 57, 153, 185)


class ImageTransform(NamedTuple):
    """The transform of every image of a dataset.

    Attributes:
      size: height and width of the result in pixels.
      channels: 1 (grey) or 3 (RGB) of the result.
      crop: one of `config.datasets.CROPS`.
      resize: Pillow's filter, antialiased: one of `config.datasets.RESIZE_FILTERS`.
    """

    size: int
    channels: int
    crop: str
    resize: str


def crop_box(crop: str, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of an image that a crop keeps: left, top, right, bottom.

    Args:
      crop: "none": all of it; "center": the largest square in the middle; "ddim": rows 57…185 and columns 25…153 of an
        aligned CelebA image (DDIM's code); "center_crop_140": 140×140 in the middle.
      width, height: of the image.

    Raises:
      ValueError: for an image that the crop does not fit.
    """
    if crop == "none":
        return 0, 0, width, height
    if crop == "ddim":
        if (width, height) != _CELEBA_SIZE:
            raise ValueError(f"{width}×{height} pixels, but the crop ddim needs CelebA's 178×218")
        return _DDIM_BOX
    side = min(width, height)
    if crop == "center_crop_140":
        if side < 140:
            raise ValueError(f"{width}×{height} pixels, but the crop center_crop_140 needs 140×140")
        side = 140
    left, top = round((width - side) / 2), round((height - side) / 2)
    return left, top, left + side, top + side


def to_array(image: Image.Image, transform: ImageTransform) -> np.ndarray:
    """The image as uint8 [size, size, channels]: rotated by its EXIF orientation, cropped and resized.

    16-bit values keep the high byte, palettes are resolved, transparency is composited on white, grey is replicated to
    three channels, colour becomes grey by ITU-R 601.

    Raises:
      ValueError: for 32-bit pixels, or an image that the crop does not fit.
    """
    image = _upright(*_eight_bits(image))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if transform.channels == 1 else "RGB")
    image = image.crop(crop_box(transform.crop, *image.size))
    image = image.resize((transform.size, transform.size), Image.Resampling[transform.resize.upper()])
    return np.asarray(image).reshape(transform.size, transform.size, transform.channels)


def _eight_bits(image: Image.Image) -> tuple[Image.Image, int]:
    """The image with the high bytes of 16-bit values, the value that a PNG declares transparent likewise, and its EXIF
    orientation.
    """
    # Gone once the pixels are read.
    raw_mode = "".join(str(tile.args) for tile in getattr(image, "tile", ()))
    orientation, transparent = _orientation(image), image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(transparent, int):
            opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
            image = Image.merge("LA", [image, Image.fromarray(opaque)])
    elif "16" in raw_mode and isinstance(transparent, tuple):
        # Pillow keeps the high bytes of the pixels, and the whole of the transparent value.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif isinstance(transparent, int):
        # Pillow stretches the pixels of 2 or 4 bits to 8, and not the transparent value.
        factor = next((factor for mode, factor in _STRETCHED.items() if mode in raw_mode), 1)
        image.info["transparency"] = transparent * factor
    return image, orientation


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Whatever Pillow raises for a damaged EXIF block: the picture itself does not need it.
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSITIONS[orientation]) if orientation in _TRANSPOSITIONS else image


def decode(data: bytes, transform: ImageTransform) -> np.ndarray:
    """`to_array` of the bytes of a PNG, JPEG or WebP file; of an animation, the first image.

    Raises:
      Exception: of Pillow's many kinds, for bytes that are not such an image, are cut short, or open into more pixels
        than `Image.MAX_IMAGE_PIXELS`.
    """
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        max_pixels = Image.MAX_IMAGE_PIXELS
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"{image.width}×{image.height} pixels, more than {max_pixels:,}")
        return to_array(image, transform)
