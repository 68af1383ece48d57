"""Pictures with a class, and pictures with a class for every pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files import plain, reason
from .files import Left, some
from .images import IGNORE, SUFFIXES, is_left_over, open_mask, size_of

__all__ = [
    "IGNORE",
    "LabelledImage",
    "MaskedImage",
    "open_mask",
    "read_ade20k",
    "read_image_folder",
]

MASKS = (".png", ".tif", ".tiff", ".bmp")
"""What the names of masks end with: formats that keep every value."""

NO_PICTURE = "files that are no pictures"
NO_CLASS = "files outside the folders of classes"
EMPTY = "folders of classes without a picture"
NO_IMAGE = "masks without an image"


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


def read_image_folder(folder: str | Path, left: Left | None = None) -> list[LabelledImage]:
    """One class a subfolder, as in ImageNet's ``train`` and ``val``; sorted by path.

    Folders inside that of a class belong to the class. ``left`` counts what is left out: files
    that are no pictures by their names, files beside the folders of classes, folders of classes
    without a picture. Hidden files and what systems leave behind (``.ipynb_checkpoints``,
    ``__MACOSX``, ``Thumbs.db``) are passed over. Raises DataError.
    """
    root, left = Path(folder), Left() if left is None else left
    found: list[LabelledImage] = []
    for place in _inside(root):
        if not place.is_dir():
            left[NO_CLASS] += 1
            continue
        pictures = [LabelledImage(path, place.name) for path in _pictures(place, left)]
        left[EMPTY] += not pictures
        found += pictures
    return some(found, root, "images in subfolders named after their classes", left)


def read_ade20k(
    images: str | Path, masks: str | Path, left: Left | None = None
) -> list[MaskedImage]:
    """The images of a folder with the masks of the same names (``.png``) in another.

    ``left`` counts what is left out: files that are no pictures by their names, masks without an
    image. Raises DataError, also for a mask of another size than its image.
    """
    folder, labels, left = Path(images), Path(masks), Left() if left is None else left
    known = {path.stem: path for path in _pictures(labels, Left()) if path.suffix.lower() in MASKS}
    pictures = list(_pictures(folder, left))
    lacking = [path for path in pictures if path.stem not in known]
    if lacking:
        mask = labels / f"{lacking[0].stem}.png"
        others = f", nor have {len(lacking) - 1} others theirs" if lacking[1:] else ""
        raise DataError(f"the image {plain(lacking[0])} has no mask {plain(mask)}{others}")
    found = [MaskedImage(path, known[path.stem]) for path in pictures]
    left[NO_IMAGE] += len(known.keys() - {path.stem for path in pictures})
    for item in found:
        if size_of(item.image) != size_of(item.mask):
            open_mask(item.mask, size_of(item.image))  # says so
    return some(found, folder, "images", left)


def _pictures(folder: Path, left: Left, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every picture below ``folder``, by names, in the order of paths."""
    above = above or (folder.resolve(),)
    for path in _inside(folder):
        if path.is_dir():
            real = path.resolve()
            if real not in above:  # else a link to a folder that it lies in
                yield from _pictures(path, left, (*above, real))
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            yield path
        else:
            left[NO_PICTURE] += 1


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without what is left over. Raises DataError."""
    try:
        return sorted(path for path in folder.iterdir() if not is_left_over(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"there is no folder {plain(folder)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the folder {plain(folder)}: {reason(error)}") from None
