"""Boxes in images, and the words that name them: referring expressions, phrases and classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import field, read_json, read_jsonl

__all__ = [
    "Box",
    "Grounding",
    "Phrase",
    "Scenery",
    "read_coco_instances",
    "read_mdetr",
    "read_nlvr1_objects",
    "read_refer",
]

Box = tuple[float, float, float, float]
"""Left, top, width and height in pixels, as in COCO."""


@dataclass(frozen=True)
class Phrase:
    """A part of a text, as (start, end) characters, and the boxes it names."""

    spans: tuple[tuple[int, int], ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Grounding:
    """A text about an image of ``size`` (width, height), and what its phrases name."""

    id: int | str
    image: Path
    size: tuple[int, int]
    text: str
    phrases: tuple[Phrase, ...]


@dataclass(frozen=True)
class Scenery:
    """An image of ``size`` (width, height) with every object of the known classes."""

    id: int
    image: Path
    size: tuple[int, int]
    boxes: tuple[Box, ...]
    labels: tuple[str, ...]


def read_mdetr(annotations: str | Path, images: str | Path) -> list[Grounding]:
    """MDETR's annotation files: COCO's layout with a ``caption`` an image and, for each box, the
    characters that name it (``tokens_positive``), as in ``finetune_refcoco_train.json``.
    """
    path, folder = Path(annotations), Path(images)
    body = read_json(path)
    boxes: dict[Any, dict[tuple[tuple[int, int], ...], list[Box]]] = defaultdict(dict)
    for number, entry in enumerate(field(body, "annotations", path, 0)):
        given = field(entry, "tokens_positive", path, number)
        spans = tuple((int(start), int(end)) for start, end in given)
        image_id = field(entry, "image_id", path, number)
        boxes[image_id].setdefault(spans, []).append(_box(entry, path, number))
    found = []
    for number, entry in enumerate(field(body, "images", path, 0)):
        key = field(entry, "id", path, number)
        text = str(field(entry, "caption", path, number))
        phrases = tuple(Phrase(spans, tuple(b)) for spans, b in boxes.get(key, {}).items())
        for phrase in phrases:
            if any(end > len(text) or start >= end for start, end in phrase.spans):
                raise DataError(f"{path}: image {key} names characters that its caption lacks")
        if phrases:
            image = folder / str(field(entry, "file_name", path, number))
            found.append(Grounding(key, image, _size(entry, path, number), text, phrases))
    return _some(found, path, "text with a box")


def read_refer(
    refs: str | Path, instances: str | Path, images: str | Path, split: str
) -> list[Grounding]:
    """The original layout of RefCOCO, RefCOCO+ and RefCOCOg: ``refs`` and COCO's ``instances``.

    One item a sentence; the whole sentence names one box. The published ``refs(unc).p`` is a
    pickle, which is never read here: convert it once, in a place you trust, to JSON.
    """
    path, boxes_path, folder = Path(refs), Path(instances), Path(images)
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError(
            f"{path} is a pickle, which can run code when it is read: convert it to JSON once, "
            "with python -c \"import json, pickle; json.dump(pickle.load(open('refs.p', 'rb')), "
            "open('refs.json', 'w'))\""
        )
    body = read_json(boxes_path)
    places = {
        field(entry, "id", boxes_path, number): (
            folder / str(field(entry, "file_name", boxes_path, number)),
            _size(entry, boxes_path, number),
        )
        for number, entry in enumerate(field(body, "images", boxes_path, 0))
    }
    boxes = {
        field(entry, "id", boxes_path, number): _box(entry, boxes_path, number)
        for number, entry in enumerate(field(body, "annotations", boxes_path, 0))
    }
    found = []
    for number, entry in enumerate(read_json(path)):
        if field(entry, "split", path, number) != split:
            continue
        image_id = field(entry, "image_id", path, number)
        box_id = field(entry, "ann_id", path, number)
        if image_id not in places or box_id not in boxes:
            raise DataError(f"{boxes_path} lacks image {image_id} or box {box_id} of {path}")
        image, size = places[image_id]
        for sentence in field(entry, "sentences", path, number):
            text = str(sentence.get("sent", sentence.get("raw", "")))
            phrase = Phrase(((0, len(text)),), (boxes[box_id],))
            found.append(Grounding(sentence["sent_id"], image, size, text, (phrase,)))
    return _some(found, path, f"expression of the split {split!r}")


def read_coco_instances(instances: str | Path, images: str | Path) -> list[Scenery]:
    """COCO's ``instances_*.json``. Crowds are left out; images without a box stay."""
    path, folder = Path(instances), Path(images)
    body = read_json(path)
    names = {
        field(entry, "id", path, number): str(field(entry, "name", path, number))
        for number, entry in enumerate(field(body, "categories", path, 0))
    }
    boxes: dict[Any, list[tuple[Box, str]]] = defaultdict(list)
    for number, entry in enumerate(field(body, "annotations", path, 0)):
        category = field(entry, "category_id", path, number)
        if category not in names:
            raise DataError(f"{path}: entry {number} has the unknown category {category}")
        if not entry.get("iscrowd"):
            image_id = field(entry, "image_id", path, number)
            boxes[image_id].append((_box(entry, path, number), names[category]))
    found = []
    for number, entry in enumerate(field(body, "images", path, 0)):
        key = int(field(entry, "id", path, number))
        image = folder / str(field(entry, "file_name", path, number))
        found.append(_scenery(key, image, _size(entry, path, number), boxes[key]))
    return _some(found, path, "image")


def read_nlvr1_objects(folder: str | Path, split: str) -> list[Scenery]:
    """The pictures of NLVR v1 with the objects that its ``structured_rep`` lists.

    Three grey boxes of 100 pixels lie side by side, 50 apart. Classes are ``yellow square`` and
    the like. Every tenth picture tests.
    """
    folder = Path(folder)
    found: list[Scenery] = []
    for part in ("dev", "hidden"):
        path = folder / part / f"{part}.json"
        for number, entry in read_jsonl(path):
            key = str(field(entry, "identifier", path, number))
            things = [
                ((x + 150.0 * place, y, size, size), name)
                for place, group in enumerate(field(entry, "structured_rep", path, number))
                for x, y, size, name in _nlvr1_things(group)
            ]
            image = folder / part / "images" / f"{part}-{key}-0.png"
            found.append(_scenery(len(found), image, (400, 100), things))
    return _some([s for s in found if (s.id % 10 == 0) == (split == "test")], folder, "picture")


def _nlvr1_things(group: Iterable[Mapping[str, Any]]) -> Iterable[tuple[float, float, float, str]]:
    for thing in group:
        colour = {"#0099ff": "blue"}.get(thing["color"], str(thing["color"]).lower())
        size = float(thing["size"])
        yield float(thing["x_loc"]), float(thing["y_loc"]), size, f"{colour} {thing['type']}"


def _scenery(
    key: int, image: Path, size: tuple[int, int], things: list[tuple[Box, str]]
) -> Scenery:
    return Scenery(key, image, size, tuple(b for b, _ in things), tuple(n for _, n in things))


def _box(entry: Mapping[str, Any], path: Path, number: int) -> Box:
    box = field(entry, "bbox", path, number)
    if len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise DataError(f"{path}: the bbox of entry {number} is not [left, top, width, height]")
    left, top, width, height = (float(value) for value in box)
    return left, top, max(width, 1e-3), max(height, 1e-3)


def _size(entry: Mapping[str, Any], path: Path, number: int) -> tuple[int, int]:
    return int(field(entry, "width", path, number)), int(field(entry, "height", path, number))


def _some(found: list[Any], path: Path, what: str) -> list[Any]:
    if not found:
        raise DataError(f"{path} holds no {what}")
    return found
