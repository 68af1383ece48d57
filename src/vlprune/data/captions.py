"""Images with captions, from COCO captions JSON or the Karpathy split JSON."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import overload

from .datasets.rows import Part
from .files import Left, field, optional, read_json, some, unique
from .kinds import FOLDER, ID, LIST, PATH, TEXT_OR_NULL, WORDS, Id
from .stored import Picture

__all__ = [
    "CaptionedImage",
    "EachCaption",
    "read_captioned",
    "read_coco_captions",
    "read_karpathy",
]

EMPTY = "captions that are null or blank"
STRAY = "captions of images that the file does not list"
BARE = "images without a caption"


@dataclass(frozen=True)
class CaptionedImage:
    """An image and all its captions."""

    image: Picture
    captions: tuple[str, ...]


class EachCaption(Sequence[CaptionedImage]):
    """Images with one caption each: as many items for an image as it has captions, in order."""

    def __init__(self, images: Sequence[CaptionedImage]) -> None:
        self.images = images
        self._starts = array("q", accumulate((len(i.captions) for i in images), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def groups(self) -> list[range]:
        """The numbers of the items of each image."""
        return [range(start, end) for start, end in pairwise(self._starts)]

    @overload
    def __getitem__(self, number: int) -> CaptionedImage: ...

    @overload
    def __getitem__(self, number: slice) -> Part[CaptionedImage]: ...

    def __getitem__(self, number: int | slice) -> CaptionedImage | Part[CaptionedImage]:
        if isinstance(number, slice):
            return Part(self, range(len(self))[number])
        number = range(len(self))[number]  # raises IndexError, which ends loops over a sequence
        image = bisect_right(self._starts, number) - 1
        item = self.images[image]
        return CaptionedImage(item.image, (item.captions[number - self._starts[image]],))

    def __iter__(self) -> Iterator[CaptionedImage]:
        for item in self.images:  # a table reads many rows at a time
            yield from (CaptionedImage(item.image, (caption,)) for caption in item.captions)


def read_coco_captions(
    captions: str | Path, images: str | Path, left: Left | None = None
) -> list[CaptionedImage]:
    """The images of a ``captions_*.json`` file that have captions, in the file's order.

    ``images`` is the folder that ``file_name`` is relative to. ``left`` counts the entries left
    out: null and blank captions, captions of unlisted images, and images without a caption. Raises
    DataError.
    """
    path, folder, left = Path(captions), Path(images), Left() if left is None else left
    body = read_json(path)
    listed = unique(field(body, "images", LIST))
    texts: dict[Id, list[str]] = defaultdict(list)
    for entry in field(body, "annotations", LIST):
        key, text = field(entry, "image_id", ID), field(entry, "caption", TEXT_OR_NULL)
        if key not in listed:
            left[STRAY] += 1
        elif not text.strip():
            left[EMPTY] += 1
        else:
            texts[key].append(text)
    found = []
    for key, entry in listed.items():
        place = folder / field(entry, "file_name", PATH)
        if key in texts:
            found.append(CaptionedImage(place, tuple(texts[key])))
        else:
            left[BARE] += 1
    return some(found, path, "captioned image", left)


def read_karpathy(
    split_file: str | Path, images: str | Path, split: str, left: Left | None = None
) -> list[CaptionedImage]:
    """The images of one split of ``dataset_coco.json`` or ``dataset_flickr30k.json``.

    ``split`` is ``"train"``, ``"val"`` or ``"test"``; ``"train"`` includes ``"restval"``,
    as is usual. ``filepath`` may be absent, as in the Flickr30K file. ``left`` counts the entries
    left out: null and blank captions, and images without a caption. Raises DataError.
    """
    path, folder, left = Path(split_file), Path(images), Left() if left is None else left
    wanted = {"train", "restval"} if split == "train" else {split}
    found = []
    for entry in field(read_json(path), "images", LIST):
        if field(entry, "split", WORDS) not in wanted:
            continue
        said = [field(one, "raw", TEXT_OR_NULL) for one in field(entry, "sentences", LIST)]
        texts = tuple(text for text in said if text.strip())
        left[EMPTY] += len(said) - len(texts)
        below = optional(entry, "filepath", FOLDER) or ""
        place = folder / below / field(entry, "filename", PATH)
        if texts:
            found.append(CaptionedImage(place, texts))
        else:
            left[BARE] += 1
    return some(found, path, f"captioned image in the split {split!r}", left)


def read_captioned(
    form: str, part: Mapping[str, str], left: Left | None = None
) -> list[CaptionedImage]:
    """One split in the format ``karpathy``, else ``coco-captions``, from the paths in ``part``.

    ``left`` counts the entries left out. Raises DataError.
    """
    if form == "karpathy":
        return read_karpathy(part["split_file"], part["images"], part["split"], left)
    return read_coco_captions(part["captions"], part["images"], left)
