"""Boxes in images and the text that names them: referring expressions, phrases and classes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files import plain
from .files import (
    Left,
    check_split,
    field,
    optional,
    read_json,
    read_jsonl,
    some,
    unique,
    value,
    wrong,
)
from .kinds import (
    BOX,
    COUNT,
    FLAG,
    ID,
    LIST,
    NAME,
    NUMBER,
    PATH,
    SPANS,
    TEXT,
    WORDS,
    Entry,
    Id,
    shown,
)
from .stored import Picture

__all__ = [
    "Box",
    "Grounding",
    "Phrase",
    "Scenery",
    "clip",
    "read_coco_instances",
    "read_mdetr",
    "read_nlvr1_objects",
    "read_refer",
]

Box = tuple[float, float, float, float]
"""Left, top, width and height in pixels, as in COCO."""

Spans = tuple[tuple[int, int], ...]
"""Parts of a text, as (first character, end); the end is exclusive."""

LEAST = 1e-3
"""Shortest side of a box, in pixels: the IoU of two boxes without an area would be 0 / 0."""

NLVR1_SIZE = (400, 100)

FLICKR = "flickr"

CROWDS = "boxes of crowds"
FLAT = "boxes without an area"
OUTSIDE = "boxes outside their picture"
BEYOND = "parts of boxes beyond their picture"
STRAY = "boxes of images that the file does not list"
UNNAMED = "boxes that no words name"
BARE = "texts without a box"
BLANK = "expressions that are blank"


@dataclass(frozen=True)
class Phrase:
    """Part of a text, as (start, end) characters, and the boxes that this part names."""

    spans: Spans
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Grounding:
    """A text about an image of ``size`` (width, height), with its phrases and their boxes.

    ``caption`` says that the text is known to describe the picture, however few phrases it has.
    """

    id: Id
    image: Picture
    size: tuple[int, int]
    text: str
    phrases: tuple[Phrase, ...]
    caption: bool = False

    @property
    def refers(self) -> bool:
        """Whether the text is a referring expression: all of it means one object.

        It then has one phrase with one box. The phrase need not be all of the text: MDETR's files
        of RefCOCO mark the noun ("the lady" in "the lady with the blue shirt").
        """
        return not self.caption and len(self.phrases) == 1 == len(self.phrases[0].boxes)


@dataclass(frozen=True)
class Scenery:
    """An image of ``size`` (width, height) and its objects, with one label per box."""

    id: Id
    image: Picture
    size: tuple[int, int]
    boxes: tuple[Box, ...]
    labels: tuple[str, ...]


def read_mdetr(
    annotations: str | Path, images: str | Path, left: Left | None = None
) -> list[Grounding]:
    """The texts of an MDETR annotation file, such as ``finetune_refcoco_train.json``.

    The layout is COCO's with one ``caption`` per image and, for each box, the characters that name
    the box (``tokens_positive``). Texts whose ``dataset_name`` is "flickr", as in MDETR's files of
    Flickr30k Entities, are captions. ``left`` counts the entries left out: boxes without an area,
    outside their picture, of unlisted images or named by no words, and texts without a box. Raises
    DataError.
    """
    path, folder, left = Path(annotations), Path(images), Left() if left is None else left
    body = read_json(path)
    marked = [
        (
            entry,
            field(entry, "image_id", ID),
            field(entry, "tokens_positive", SPANS),
            field(entry, "bbox", BOX),
        )
        for entry in field(body, "annotations", LIST)
    ]
    listed = unique(field(body, "images", LIST))
    sizes = {key: _size(entry) for key, entry in listed.items()}
    texts = {key: field(entry, "caption", TEXT) for key, entry in listed.items()}
    boxes: dict[Id, dict[Spans, list[Box]]] = defaultdict(dict)
    for entry, key, spans, box in marked:
        if key not in listed:
            left[STRAY] += 1
        elif any(end > len(texts[key]) for _, end in spans):
            raise wrong(entry, f"image {shown(key)} names characters that its caption lacks")
        elif not any(texts[key][start:end].strip() for start, end in spans):
            left[UNNAMED] += 1
        elif clipped := clip(box, sizes[key], left):
            boxes[key].setdefault(spans, []).append(clipped)
    found = []
    for key, entry in listed.items():
        image = folder / field(entry, "file_name", PATH)
        phrases = tuple(Phrase(spans, tuple(own)) for spans, own in boxes.get(key, {}).items())
        if phrases:
            caption = optional(entry, "dataset_name", TEXT) == FLICKR
            found.append(Grounding(key, image, sizes[key], texts[key], phrases, caption))
        else:
            left[BARE] += 1
    return some(found, path, "text with a box", left)


def read_refer(
    refs: str | Path,
    instances: str | Path,
    images: str | Path,
    split: str,
    left: Left | None = None,
) -> list[Grounding]:
    """Expressions in the original layout of RefCOCO, RefCOCO+ and RefCOCOg.

    ``refs`` is their own file, ``instances`` is COCO's. Each sentence is one item and names one
    box as a whole. ``left`` counts the entries left out: blank expressions, and boxes without an
    area or outside their picture. The published ``refs(unc).p`` is a pickle, which is never read
    here: convert it to JSON once, in an environment you trust. Raises DataError.
    """
    path, boxes_path, folder = Path(refs), Path(instances), Path(images)
    left = Left() if left is None else left
    if path.suffix in (".p", ".pkl", ".pickle"):
        raise DataError(
            f"{plain(path)} is a pickle, which can run code when it is read: convert it to JSON "
            "once, with python -c \"import json, pickle; json.dump(pickle.load(open('refs.p', "
            "'rb')), open('refs.json', 'w'))\""
        )
    body = read_json(boxes_path)
    listed = unique(field(body, "images", LIST))
    boxes = unique(field(body, "annotations", LIST))
    found = []
    for entry in value(read_json(path), LIST):
        if field(entry, "split", WORDS) != split:
            continue
        image_id, box_id = field(entry, "image_id", ID), field(entry, "ann_id", ID)
        if image_id not in listed or box_id not in boxes:
            raise wrong(
                entry, f"{boxes_path} lacks its image {shown(image_id)} or its box {shown(box_id)}"
            )
        if optional(boxes[box_id], "image_id", ID) not in (image_id, None):
            raise wrong(entry, f"its box {shown(box_id)} in {boxes_path} is of another image")
        size = _size(listed[image_id])
        image = folder / field(listed[image_id], "file_name", PATH)
        box = clip(field(boxes[box_id], "bbox", BOX), size, left)
        for sentence in field(entry, "sentences", LIST):
            key, text = field(sentence, "sent_id", ID), optional(sentence, "sent", TEXT)
            text = field(sentence, "raw", TEXT) if text is None else text
            if not text.strip():
                left[BLANK] += 1
            elif box:
                phrase = Phrase(((0, len(text)),), (box,))
                found.append(Grounding(key, image, size, text, (phrase,)))
    return some(found, path, f"expression of the split {split!r}", left)


def read_coco_instances(
    instances: str | Path, images: str | Path, left: Left | None = None
) -> list[Scenery]:
    """The images of COCO's ``instances_*.json``, including images without a box.

    Boxes that reach beyond their picture are clipped to it. ``left`` counts the boxes left out:
    those of crowds, without an area, outside their picture, and of unlisted images. The
    ``segmentation`` entries are not read. Raises DataError.
    """
    path, folder, left = Path(instances), Path(images), Left() if left is None else left
    body = read_json(path)
    names = {
        key: field(entry, "name", WORDS)
        for key, entry in unique(field(body, "categories", LIST)).items()
    }
    listed = unique(field(body, "images", LIST))
    sizes = {key: _size(entry) for key, entry in listed.items()}
    boxes: dict[Id, list[tuple[Box, str]]] = defaultdict(list)
    for entry in field(body, "annotations", LIST):
        key, category = field(entry, "image_id", ID), field(entry, "category_id", ID)
        box = field(entry, "bbox", BOX)
        if category not in names:
            raise wrong(entry, f"the category {shown(category)} is not in the list of categories")
        if optional(entry, "iscrowd", FLAG):
            left[CROWDS] += 1
        elif key not in listed:
            left[STRAY] += 1
        elif clipped := clip(box, sizes[key], left):
            boxes[key].append((clipped, names[category]))
    found = [
        _scenery(key, folder / field(entry, "file_name", PATH), sizes[key], boxes[key])
        for key, entry in listed.items()
    ]
    return some(found, path, "image", left)


def read_nlvr1_objects(folder: str | Path, split: str, left: Left | None = None) -> list[Scenery]:
    """The pictures of NLVR v1 with the objects that its ``structured_rep`` lists.

    Each picture shows three grey boxes of 100 pixels side by side, 50 pixels apart. Classes are
    named like ``yellow square``. Every tenth picture is in the test split. ``left`` counts the
    objects left out: those without an area or outside the picture. Raises DataError.
    """
    test = check_split(split) == "test"
    folder, left = Path(folder), Left() if left is None else left
    found: list[Scenery] = []
    for part in ("dev", "hidden"):
        for entry in read_jsonl(folder / part / f"{part}.json"):
            key = field(entry, "identifier", NAME)
            groups = field(entry, "structured_rep", LIST)
            things = []
            for place, group in enumerate(groups):
                for thing in value(group, LIST):
                    (x, y, side), name = _nlvr1_thing(thing)
                    box = clip((x + 150.0 * place, y, side, side), NLVR1_SIZE, left)
                    things += [(box, name)] if box else []
            image = folder / part / "images" / f"{part}-{key}-0.png"
            found.append(_scenery(len(found), image, NLVR1_SIZE, things))
    wanted = [s for number, s in enumerate(found) if (number % 10 == 0) == test]
    return some(wanted, folder, "picture", left)


def _nlvr1_thing(thing: Entry) -> tuple[tuple[float, float, float], str]:
    """(left, top, side) of an object within its grey box, in pixels, and its class."""
    colour, shape = field(thing, "color", WORDS).lower(), field(thing, "type", WORDS)
    x, y, side = (field(thing, name, NUMBER) for name in ("x_loc", "y_loc", "size"))
    return (x, y, side), f"{'blue' if colour == '#0099ff' else colour} {shape}"


def _scenery(
    key: Id, image: Picture, size: tuple[int, int], things: list[tuple[Box, str]]
) -> Scenery:
    return Scenery(key, image, size, tuple(b for b, _ in things), tuple(n for _, n in things))


def clip(box: Box, size: tuple[int, int], left: Left) -> Box | None:
    """The part of a box inside its picture; None, counted in ``left``, if nothing remains.

    A box that exceeds its picture by at most one pixel, as by rounding, is clipped uncounted.
    """
    x, y, width, height = box
    if width < LEAST or height < LEAST:
        left[FLAT] += 1
        return None
    over = max(-x, -y, x + width - size[0], y + height - size[1])
    if over <= 0:
        return box
    x, y, right, below = max(x, 0.0), max(y, 0.0), min(x + width, size[0]), min(y + height, size[1])
    if right - x < LEAST or below - y < LEAST:
        left[OUTSIDE] += 1
        return None
    left[BEYOND] += over > 1
    return x, y, right - x, below - y


def _size(entry: Entry) -> tuple[int, int]:
    return field(entry, "width", COUNT), field(entry, "height", COUNT)
