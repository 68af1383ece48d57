"""Samples without labels, for calibration: pictures, pictures with texts, or texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files import plain
from .files import Left, field, listed, optional, read_jsonl, read_text, some
from .images import SUFFIXES, open_image
from .kinds import PATH, WORDS, Entry
from .kinds import TEXT as ANY_TEXT
from .pictures import pictures_in

__all__ = ["Sample", "check_pictures", "left_out", "read_samples"]

METADATA = "metadata.jsonl"
IMAGE, TEXT = ("image", "file_name"), ("text", "caption")
"""Keys of a row, in the order in which they are looked for."""
NO_PICTURE = "rows without an image"
NO_TEXT = "rows without a text"


@dataclass(frozen=True)
class Sample:
    """A picture, a text, or both."""

    image: Path | None = None
    text: str | None = None


def read_samples(place: str | Path, left: Left | None = None) -> list[Sample]:
    """The samples in a folder of pictures, in a ``.jsonl`` or in a ``.txt`` file.

    A folder is searched at any depth; where it holds ``metadata.jsonl``, as image folders on the
    Hub do, that file is read. A row of a ``.jsonl`` file is an object with ``image`` or
    ``file_name``, a path below the file's folder or an absolute one, and ``text`` or ``caption``;
    a ``.txt`` file has one text per line. Either all samples have a picture or none has, and the
    same holds for texts: ``left`` counts the rows left out. Raises DataError.
    """
    path, left = Path(place), Left() if left is None else left
    if not os.path.lexists(path):
        raise DataError(f"there is no folder or file {plain(path)} to calibrate on")
    if path.is_dir():
        if (path / METADATA).is_file():
            return _rows(path / METADATA, left)
        found = [Sample(image) for image in pictures_in(path, left)]
        return some(found, path, "pictures", left)
    if path.suffix.lower() == ".jsonl":
        return _rows(path, left)
    if path.suffix.lower() == ".txt":
        lines = read_text(path).split("\n")
        return some([Sample(text=line.strip()) for line in lines if line.strip()], path, "texts")
    kind = "a picture: give the folder around it" if path.suffix.lower() in SUFFIXES else "neither"
    raise DataError(f"{plain(path)} is {kind}; calibration reads a folder, a .jsonl or a .txt file")


def _rows(path: Path, left: Left) -> list[Sample]:
    """The rows of a file, or those that have what most of the others have."""
    rows = [_row(entry, path.parent) for entry in read_jsonl(path)]
    for name, reason in (("image", NO_PICTURE), ("text", NO_TEXT)):
        having = [row for row in rows if getattr(row, name) is not None]
        if 2 * len(having) >= len(rows):  # otherwise the few are taken without it
            left[reason] += len(rows) - len(having)
            rows = having
        else:
            rows = [Sample(**{**vars(row), name: None}) for row in rows]
    rows = [row for row in rows if row.image is not None or row.text is not None]
    return some(rows, path, f"rows with {' or '.join((*IMAGE, *TEXT))}", left)


def _row(entry: Entry, folder: Path) -> Sample:
    image = next((found for key in IMAGE if (found := _image(entry, key, folder))), None)
    texts = (optional(entry, key, ANY_TEXT) for key in TEXT)
    return Sample(image, next((text for text in texts if text and text.strip()), None))


def _image(entry: Entry, key: str, folder: Path) -> Path | None:
    """An absolute path is taken as it is: the user wrote this file, or was told what it names."""
    name = optional(entry, key, WORDS)
    if name is None:
        return None
    return Path(name) if Path(name).is_absolute() else folder / field(entry, key, PATH)


def check_pictures(samples: Sequence[Sample], most: int = 3) -> None:
    """Raise one DataError for all pictures that cannot be opened, naming the first ``most``."""
    problems = list(_problems(samples))
    if problems:
        more = f"; and {len(problems) - most} more" if len(problems) > most else ""
        raise DataError(
            f"{len(problems)} of {len(samples)} pictures cannot be read: "
            f"{'; '.join(problems[:most])}{more}"
        )


def _problems(samples: Sequence[Sample]) -> Iterator[str]:
    for sample in samples:
        try:
            if sample.image is not None:
                open_image(sample.image)
        except DataError as error:
            yield str(error)


def left_out(left: Left) -> str:
    """A sentence about the rows that are not used; empty if all are."""
    return f"left out of the calibration data: {listed(left)}" if +left else ""
