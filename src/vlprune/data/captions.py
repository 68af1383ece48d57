"""Images with captions: COCO captions JSON, and the Karpathy split JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .files import field, read_json

__all__ = ["CaptionedImage", "read_captioned", "read_coco_captions", "read_karpathy"]


@dataclass(frozen=True)
class CaptionedImage:
    """An image and everything said about it."""

    image: Path
    captions: tuple[str, ...]


def read_coco_captions(captions: str | Path, images: str | Path) -> list[CaptionedImage]:
    """The images of a ``captions_*.json`` file that have captions, in the file's order.

    ``images`` is the folder that ``file_name`` is relative to.
    """
    path, folder = Path(captions), Path(images)
    body = read_json(path)
    texts: dict[int, list[str]] = defaultdict(list)
    for number, entry in enumerate(field(body, "annotations", path, 0)):
        texts[field(entry, "image_id", path, number)].append(field(entry, "caption", path, number))
    found = [
        CaptionedImage(
            folder / field(entry, "file_name", path, number),
            tuple(texts[field(entry, "id", path, number)]),
        )
        for number, entry in enumerate(field(body, "images", path, 0))
        if texts.get(entry.get("id"))
    ]
    return _some(found, path)


def read_karpathy(split_file: str | Path, images: str | Path, split: str) -> list[CaptionedImage]:
    """The images of one split of ``dataset_coco.json`` or ``dataset_flickr30k.json``.

    ``split`` is ``"train"``, ``"val"`` or ``"test"``; ``"train"`` includes ``"restval"``,
    as is usual. ``filepath`` may be absent, as in the Flickr30K file.
    """
    path, folder = Path(split_file), Path(images)
    wanted = {"train", "restval"} if split == "train" else {split}
    found = []
    for number, entry in enumerate(field(read_json(path), "images", path, 0)):
        if field(entry, "split", path, number) not in wanted:
            continue
        sentences = field(entry, "sentences", path, number)
        found.append(
            CaptionedImage(
                folder / entry.get("filepath", "") / field(entry, "filename", path, number),
                tuple(field(sentence, "raw", path, number) for sentence in sentences),
            )
        )
    return _some(found, path, f" in the split {split!r}")


def read_captioned(form: str, part: Mapping[str, str]) -> list[CaptionedImage]:
    """One split in the format ``karpathy`` or ``coco-captions``, from the paths in ``part``."""
    if form == "karpathy":
        return read_karpathy(part["split_file"], part["images"], part["split"])
    return read_coco_captions(part["captions"], part["images"])


def _some(found: list[CaptionedImage], path: Path, where: str = "") -> list[CaptionedImage]:
    if not found:
        raise DataError(f"{path} holds no captioned image{where}")
    return found
