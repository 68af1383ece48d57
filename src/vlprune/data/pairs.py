"""Statements about images that are true or false: NLVR2, and NLVR v1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .files import field, read_jsonl

__all__ = ["Statement", "read_nlvr1", "read_nlvr2"]


@dataclass(frozen=True)
class Statement:
    """A sentence, the two images it is about, and whether it is true."""

    id: str
    text: str
    images: tuple[Path, Path]
    truth: bool


def read_nlvr2(statements: str | Path, images: str | Path) -> list[Statement]:
    """The lines of an NLVR2 split file (``train.json``, ``dev.json``, ``test1.json``).

    The images of ``dev-1-2-3`` are ``dev-1-2-img0.png`` and ``-img1.png`` in ``images``, or in
    the subfolder that the line's ``directory`` names, as in the training split.
    """
    path, folder = Path(statements), Path(images)
    found = []
    for number, entry in read_jsonl(path):
        key = str(field(entry, "identifier", path, number))
        stem = key.rpartition("-")[0]
        place = folder / str(entry["directory"]) if "directory" in entry else folder
        if not place.is_dir():
            place = folder
        pair = (place / f"{stem}-img0.png", place / f"{stem}-img1.png")
        text = str(field(entry, "sentence", path, number))
        found.append(Statement(key, text, pair, _truth(entry, path, number)))
    return _some(found, path)


def read_nlvr1(folder: str | Path, split: str) -> list[Statement]:
    """NLVR v1 with its ``dev`` and ``hidden`` folders taken together.

    Every tenth different sentence tests, the others train (a sentence is never in both). A
    picture of NLVR v1 holds three boxes; the same picture stands for both images.
    """
    folder, found = Path(folder), []
    for part in ("dev", "hidden"):
        path = folder / part / f"{part}.json"
        for number, entry in read_jsonl(path):
            key = str(field(entry, "identifier", path, number))
            image = folder / part / "images" / f"{part}-{key}-0.png"
            text = str(field(entry, "sentence", path, number))
            statement = Statement(f"{part}-{key}", text, (image, image), False)
            truth = _truth(entry, path, number)
            found.append(Statement(statement.id, text, statement.images, truth))
    order = {text: n for n, text in enumerate(dict.fromkeys(s.text for s in found))}
    wanted = [s for s in found if (order[s.text] % 10 == 0) == (split == "test")]
    return _some(wanted, folder)


def _truth(entry: dict[str, object], path: Path, number: int) -> bool:
    label = str(field(entry, "label", path, number)).lower()
    if label not in ("true", "false"):
        raise DataError(f"{path}: the label of line {number} is {label!r}, not true or false")
    return label == "true"


def _some(found: list[Statement], path: Path) -> list[Statement]:
    if not found:
        raise DataError(f"{path} holds no statement")
    return found
