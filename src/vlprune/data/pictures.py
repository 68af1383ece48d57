"""Pictures with a class, and pictures with a class for every pixel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError

__all__ = [
    "IGNORE",
    "LabelledImage",
    "MaskedImage",
    "open_mask",
    "read_ade20k",
    "read_image_folder",
]

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
IGNORE = 255
"""The class of pixels that do not count."""


@dataclass(frozen=True)
class LabelledImage:
    """An image and the name of its class."""

    image: Path
    label: str


@dataclass(frozen=True)
class MaskedImage:
    """An image and the picture of its classes."""

    image: Path
    mask: Path


def read_image_folder(folder: str | Path) -> list[LabelledImage]:
    """One class a subfolder, as in ImageNet's ``train`` and ``val``; sorted by path."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    found = [
        LabelledImage(path, place.name)
        for place in sorted(p for p in root.iterdir() if p.is_dir())
        for path in sorted(place.iterdir())
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise DataError(f"{root} holds no images in subfolders named after their classes")
    return found


def read_ade20k(images: str | Path, masks: str | Path) -> list[MaskedImage]:
    """The images of a folder with the masks of the same names (``.png``) in another."""
    folder, labels = Path(images), Path(masks)
    for path in (folder, labels):
        if not path.is_dir():
            raise DataError(f"there is no folder {path}")
    found = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        mask = labels / f"{path.stem}.png"
        if not mask.exists():
            raise DataError(f"the image {path} has no mask {mask}")
        found.append(MaskedImage(path, mask))
    if not found:
        raise DataError(f"{folder} holds no images")
    return found


def open_mask(path: Path) -> np.ndarray:
    """Classes of an ADE20K mask, (height, width), from 0; :data:`IGNORE` for its 0, "other"."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image, dtype=np.int64)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"the mask {path} cannot be decoded ({error})") from None
    if values.ndim != 2:
        raise DataError(f"the mask {path} has colours: it must hold one class number a pixel")
    return np.where(values == 0, IGNORE, values - 1)
