"""Pictures as viewers show them: upright, in 8 bits, with white behind transparent parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from ..files import opened, plain, reason
from .stored import Picture, StoredPicture

__all__ = ["IGNORE", "SUFFIXES", "is_left_over", "open_image", "open_mask", "size_of"]

SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
"""Suffixes of picture files, in lower case."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Decoders that may see a file; some others of Pillow start programs (EPS: Ghostscript)."""

IGNORE = 255
"""Class number of pixels that are left out of losses and metrics."""

NARROWEST = 200
"""Largest ratio of a picture's sides; resizing a narrower picture could take gigabytes."""

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns a picture upright, by its EXIF orientation."""

LEFT_OVER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


def is_left_over(path: Path) -> bool:
    """Whether a file or folder was left behind by a system or an editor and is not data."""
    return path.name.startswith(".") or path.name.lower() in LEFT_OVER


def open_image(path: Picture, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture as RGB, fully decoded, as a viewer shows it. Raises DataError.

    The EXIF orientation is applied, because labelling tools show pictures upright and boxes are
    drawn on the picture as shown. ``size`` is the (width, height) that boxes on the picture refer
    to. Only its aspect ratio must match, since pictures may have been made smaller: a picture that
    matches only as stored is not turned, and a picture that matches neither way is refused.

    An animation gives its first frame, and transparent parts become white. Grey levels of more
    than 8 bits are scaled, not cut off: 16 bits by 255 / 65535. Pictures of 32-bit integers or
    floats do not say which value is white, so white is the smallest of 1 (floats only), 255 and
    65535 that no pixel exceeds; negative or larger values are refused.
    """
    with _decoded(path, "image") as image:
        return _rgb(_upright(image, path, size), image.format, path)


def open_mask(path: Picture, size: tuple[int, int] | None = None) -> np.ndarray:
    """Classes of an ADE20K mask, (height, width), int64, from 0; :data:`IGNORE` where left out.

    Left out are pixels of value 0, "other" in ADE20K, and 255, "void" in most other sets. In a
    mask with a palette, the index of the palette entry is the value. ``size`` is the (width,
    height) that the mask must have, that of its picture. Raises DataError.
    """
    name = plain(path)
    with _decoded(path, "mask") as image:
        image = _upright(image, path)
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            what = "fractions" if image.mode == "F" else "colours"
            raise DataError(
                f"the mask {name} has {what} ({image.mode}): it must hold one class number per "
                "pixel, as a grey picture or one with a palette"
            )
        values = np.asarray(image).astype(np.int64)
    if size is not None and (values.shape[1], values.shape[0]) != size:
        raise DataError(
            f"the mask {name} is {values.shape[1]} x {values.shape[0]} pixels, its picture "
            f"{size[0]} x {size[1]}: they must have one size"
        )
    odd = values[(values < 0) | (values > IGNORE)]
    if odd.size:
        raise DataError(
            f"the mask {name} holds the value {odd[0]}: classes are numbered from 1 to "
            f"{IGNORE - 1}, 0 and {IGNORE} do not count"
        )
    return np.where((values == 0) | (values == IGNORE), IGNORE, values - 1)


def size_of(path: Picture) -> tuple[int, int]:
    """(width, height) that :func:`open_image` gives, mostly without decoding. Raises DataError."""
    with _decoded(path, "image", header=True) as image:
        # asked for the EXIF of such a PNG, Pillow decodes all of it in search of some
        if image.format == "PNG" and "exif" not in image.info:
            return image.size
        if image.format == "TIFF":
            image.load()
        sideways = _orientation(image) in (5, 6, 7, 8)
        return (image.height, image.width) if sideways else image.size


@contextmanager
def _decoded(path: Picture, what: str, header: bool = False) -> Iterator[Image.Image]:
    """The picture in a file or a data set. Raises DataError if it is missing, damaged or too large.

    On a damaged file decoders raise errors of any type, from struct.error to TypeError, so every
    exception is caught while they work.
    """
    name = f"the {what} {plain(path)}"
    if isinstance(path, Path) and not os.path.lexists(path):
        raise DataError(f"there is no {what} {plain(path)}")
    try:
        with _file(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large pictures and damaged EXIF
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.size, name)
                if not header:
                    image.load()
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(
            f"{name} claims more pixels than Pillow decodes: make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name} cannot be decoded (it is none of {', '.join(FORMATS)}): restore it, or remove "
            "its entries"
        ) from None
    except Exception as error:
        raise DataError(
            f"{name} cannot be decoded ({reason(error)}): restore it, or remove its entries"
        ) from None


def _file(picture: Picture) -> AbstractContextManager[BinaryIO]:
    return picture.open() if isinstance(picture, StoredPicture) else opened(picture, DataError)


def _check_size(size: tuple[int, int], name: str) -> None:
    if min(size) < 1:
        raise DataError(f"{name} has no pixels: restore it, or remove its entries")
    if max(size) > NARROWEST * min(size):
        raise DataError(
            f"{name} is {size[0]} x {size[1]} pixels: one side may be at most {NARROWEST} times "
            "the other"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if the EXIF is damaged, as viewers then turn nothing."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # as in _decoded
        return 1
    return found if isinstance(found, int) else 1


def _upright(image: Image.Image, path: Picture, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture turned as its EXIF says, unless only as stored does its shape match ``size``."""
    turn = TURNS.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    if size is None or _same_shape(upright.size, size):
        return upright
    if _same_shape(image.size, size):
        return image
    raise DataError(
        f"the image {plain(path)} is {upright.width} x {upright.height} pixels, and its boxes are "
        f"for a picture of {size[0]} x {size[1]}: give the size on which they were drawn"
    )


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other scaled and rounded to whole pixels."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def _rgb(image: Image.Image, form: str | None, path: Picture) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image, form, path).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, form: str | None, path: Picture) -> Image.Image:
    """A grey picture of more than 8 bits, reduced to 8 bits as :func:`open_image` describes."""
    levels = np.asarray(image).astype(np.float64)
    # older Pillow versions open PNG and PPM files of 16 bits in mode I
    if image.mode.startswith("I;16") or form in ("PNG", "PPM"):
        whites = [65535]
    else:
        whites = [255, 65535] if image.mode == "I" else [1, 255, 65535]
    # both comparisons fail for a NaN, so a picture with one is refused
    white = next((w for w in whites if levels.min() >= 0 and levels.max() <= w), None)
    if white is None:
        raise DataError(
            f"the image {plain(path)} has grey levels from {levels.min():g} to {levels.max():g}: "
            f"they must lie between 0 and {whites[-1]}"
        )
    return Image.fromarray(np.rint(levels * (255 / white)).astype(np.uint8))
