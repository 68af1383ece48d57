"""Pictures with one class each, and pictures with a class for every pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files import plain, reason
from .files import Left, some
from .images import IGNORE, SUFFIXES, is_left_over, open_mask, size_of
from .stored import Picture

__all__ = [
    "IGNORE",
    "LabelledImage",
    "MaskedImage",
    "open_mask",
    "pictures_in",
    "read_ade20k",
    "read_image_folder",
]

MASKS = (".png", ".tif", ".tiff", ".bmp")
"""Suffixes of mask files: formats that keep every value exactly."""

NO_PICTURE = "files that are no pictures"
NO_CLASS = "files outside the folders of classes"
EMPTY = "folders of classes without a picture"
NO_IMAGE = "masks without an image"


@dataclass(frozen=True)
class LabelledImage:
    """An image and the name of its class."""

    image: Picture
    label: str


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask, a picture of the same size with one class number per pixel."""

    image: Picture
    mask: Picture


def read_image_folder(folder: str | Path, left: Left | None = None) -> list[LabelledImage]:
    """The images of a folder with one subfolder per class, as in ImageNet's ``train`` and ``val``.

    The images are sorted by path; those in deeper folders belong to the class above them. ``left``
    counts the entries left out: files that are no pictures by their names, files beside the
    class folders, and class folders without a picture. Hidden files and the files that systems
    leave behind (``.ipynb_checkpoints``, ``__MACOSX``, ``Thumbs.db``) are skipped. Raises
    DataError.
    """
    root, left = Path(folder), Left() if left is None else left
    found: list[LabelledImage] = []
    for place in _inside(root):
        if not place.is_dir():
            left[NO_CLASS] += 1
            continue
        pictures = [LabelledImage(path, place.name) for path in pictures_in(place, left)]
        left[EMPTY] += not pictures
        found += pictures
    return some(found, root, "images in subfolders named after their classes", left)


def read_ade20k(
    images: str | Path, masks: str | Path, left: Left | None = None
) -> list[MaskedImage]:
    """The images of one folder, each with the mask of the same name in another folder.

    ``left`` counts the files left out: those that are no pictures by their names, and masks without
    an image. Raises DataError, also for an image without a mask and for a mask whose size differs
    from that of its image.
    """
    folder, labels, left = Path(images), Path(masks), Left() if left is None else left
    known = {
        path.stem: path for path in pictures_in(labels, Left()) if path.suffix.lower() in MASKS
    }
    pictures = list(pictures_in(folder, left))
    lacking = [path for path in pictures if path.stem not in known]
    if lacking:
        mask = labels / f"{lacking[0].stem}.png"
        others = f", nor have {len(lacking) - 1} others theirs" if lacking[1:] else ""
        raise DataError(f"the image {plain(lacking[0])} has no mask {plain(mask)}{others}")
    found = [MaskedImage(path, known[path.stem]) for path in pictures]
    left[NO_IMAGE] += len(known.keys() - {path.stem for path in pictures})
    for item in found:
        if size_of(item.image) != size_of(item.mask):
            open_mask(item.mask, size_of(item.image))  # raises the error that names both sizes
    return some(found, folder, "images", left)


def pictures_in(folder: Path, left: Left, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every picture below ``folder``, judged by its name, in the order of paths."""
    above = above or (folder.resolve(),)
    for path in _inside(folder):
        if path.is_dir():
            real = path.resolve()
            if real not in above:  # else a link upwards, which would never end
                yield from pictures_in(path, left, (*above, real))
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            yield path
        else:
            left[NO_PICTURE] += 1


def _inside(folder: Path) -> list[Path]:
    """The entries of a folder, sorted, without the leftovers of systems. Raises DataError."""
    try:
        return sorted(path for path in folder.iterdir() if not is_left_over(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"there is no folder {plain(folder)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the folder {plain(folder)}: {reason(error)}") from None
