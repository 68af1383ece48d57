"""True or false statements about pairs of images, from NLVR2 and NLVR v1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .files import Left, check_split, field, inside, optional, read_jsonl, some, wrong
from .kinds import NAME, TEXT, TRUTH, Entry, shown
from .stored import Picture

__all__ = ["Statement", "read_nlvr1", "read_nlvr2"]

BLANK = "statements that are blank"


@dataclass(frozen=True)
class Statement:
    """A sentence, the two images it is about, and whether it is true."""

    id: str
    text: str
    images: tuple[Picture, Picture]
    truth: bool


def read_nlvr2(
    statements: str | Path, images: str | Path, left: Left | None = None
) -> list[Statement]:
    """The lines of an NLVR2 split file (``train.json``, ``dev.json``, ``test1.json``).

    The images of ``dev-1-2-3`` are ``dev-1-2-img0.png`` and ``-img1.png`` in ``images``, or in
    the subfolder that the line's ``directory`` names, as in the training split. ``left`` counts
    blank statements, which are left out. Raises DataError.
    """
    path, folder, left = Path(statements), Path(images), Left() if left is None else left
    found = []
    for entry in read_jsonl(path):
        key = field(entry, "identifier", NAME)
        stem = key.rpartition("-")[0]
        if not stem:
            raise wrong(entry, f"the identifier {shown(key)} must end with '-' and a number")
        directory = optional(entry, "directory", NAME)
        place = inside(folder, directory) if directory else folder
        pair = (place / f"{stem}-img0.png", place / f"{stem}-img1.png")
        found += _statement(entry, key, (pair[0], pair[1]), left)
    return some(found, path, "statement", left)


def read_nlvr1(folder: str | Path, split: str, left: Left | None = None) -> list[Statement]:
    """NLVR v1 with its ``dev`` and ``hidden`` folders taken together.

    Every tenth distinct sentence is in the test split, the others in the training split, so the
    splits share no sentence. A picture of NLVR v1 shows three boxes; the same picture stands for
    both images. ``left`` counts blank statements of both splits, which are left out. Raises
    DataError.
    """
    test = check_split(split) == "test"
    folder, left = Path(folder), Left() if left is None else left
    found: list[Statement] = []
    for part in ("dev", "hidden"):
        for entry in read_jsonl(folder / part / f"{part}.json"):
            key = field(entry, "identifier", NAME)
            image = folder / part / "images" / f"{part}-{key}-0.png"
            found += _statement(entry, f"{part}-{key}", (image, image), left)
    order = {text: n for n, text in enumerate(dict.fromkeys(s.text for s in found))}
    wanted = [s for s in found if (order[s.text] % 10 == 0) == test]
    return some(wanted, folder, "statement", left)


def _statement(
    entry: Entry, key: str, images: tuple[Picture, Picture], left: Left
) -> list[Statement]:
    """The statement of a line, in a list; an empty list if it is blank."""
    text, truth = field(entry, "sentence", TEXT), field(entry, "label", TRUTH)
    if not text.strip():
        left[BLANK] += 1
        return []
    return [Statement(key, text, images, truth)]
