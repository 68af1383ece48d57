"""Scenes of coloured shapes, drawn, described and written in the formats the world uses.

Deterministic by seed. One call writes, for a train and a test split:

    images/{subtype}/COCO_{subtype}_{id:012d}.jpg
    annotations/captions_{subtype}.json         COCO captions
    annotations/instances_{subtype}.json        COCO boxes and polygons
    annotations/questions_{subtype}.json        VQAv2 questions
    annotations/answers_{subtype}.json          VQAv2 annotations, ten answers each
    annotations/refs_{subtype}.json             referring expressions, refer layout
    annotations/mdetr_{subtype}.json            the same in MDETR's layout
    annotations/captions_mdetr_{subtype}.json   captions whose every phrase has its box, the same
    annotations/gqa_{subtype}.json              questions in GQA's layout
    annotations/dataset_shapes.json             Karpathy split file for both splits
    ade20k/images/{training|validation}/{id:012d}.jpg        ADE20K layout: pictures,
    ade20k/annotations/{training|validation}/{id:012d}.png   one class a pixel (0: none)
    classes/{train|val}/{size}-{shape}/{id:012d}.jpg         one object each, ImageNet layout
    nlvr2/{train|dev}.json                      one statement about two images a line, NLVR2
    nlvr2/{train|dev}/{identifier}-img{0|1}.png their images

Subtypes are ``train2014`` and ``val2014``, so that readers of the real files need no change.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..errors import DataError
from ..files import plain, read_json, reason
from .images import is_left_over

__all__ = ["COLOURS", "SHAPES", "Scene", "Thing", "draw", "make_scene", "write_shapes"]

COLOURS = {
    "red": (222, 45, 38),
    "green": (49, 163, 84),
    "blue": (40, 90, 220),
    "yellow": (250, 214, 40),
    "purple": (136, 66, 178),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.14, "big": 0.21}  # radius, as a fraction of the image side
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Thing:
    """One object: what it is, and where, in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    def outline(self) -> list[tuple[float, float]]:
        """The polygon that is drawn."""
        if self.shape == "circle":
            turns = [(i / 24, 1.0) for i in range(24)]
        elif self.shape == "square":
            turns = [((i + 0.5) / 4, 1.15) for i in range(4)]
        else:
            turns = [((i + 0.25) / 3 - 1 / 3, 1.2) for i in range(3)]
        return [
            (
                self.x + self.radius * r * math.cos(2 * math.pi * t + self.angle),
                self.y + self.radius * r * math.sin(2 * math.pi * t + self.angle),
            )
            for t, r in turns
        ]

    @property
    def phrase(self) -> str:
        """What to call it, without an article."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    side: int
    background: int
    things: tuple[Thing, ...]


def make_scene(rng: random.Random, side: int = 64, most: int = 3) -> Scene:
    """A scene of one to ``most`` objects that do not overlap and differ from each other."""
    wanted = rng.randint(1, most)
    things: list[Thing] = []
    while len(things) < wanted:
        size = rng.choice(list(SIZES))
        radius = SIZES[size] * side * rng.uniform(0.92, 1.08)
        margin = radius * 1.3
        thing = Thing(
            rng.choice(SHAPES),
            rng.choice(list(COLOURS)),
            size,
            rng.uniform(margin, side - margin),
            rng.uniform(margin, side - margin),
            radius,
            rng.uniform(-0.2, 0.2),
        )
        apart = all(
            math.hypot(thing.x - t.x, thing.y - t.y) > 1.25 * (thing.radius + t.radius)
            and (thing.shape, thing.colour) != (t.shape, t.colour)
            for t in things
        )
        if apart:
            things.append(thing)
        elif rng.random() < 0.02:
            wanted = len(things) or 1
    return Scene(side, rng.randint(20, 90), tuple(things))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB image, drawn at four times the size and reduced."""
    scale = 4
    image = Image.new("RGB", (scene.side * scale,) * 2, (scene.background,) * 3)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        shade = rng.uniform(0.85, 1.0)
        colour = tuple(int(c * shade) for c in COLOURS[thing.colour])
        pen.polygon([(x * scale, y * scale) for x, y in thing.outline()], fill=colour)
    return image.resize((scene.side, scene.side), Image.Resampling.BOX)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions that name every object, in different orders."""
    result = []
    for _ in range(5):
        things = rng.sample(scene.things, len(scene.things))
        phrases = [
            f"a {t.phrase if rng.random() < 0.8 else f'{t.colour} {t.shape}'}" for t in things
        ]
        result.append(rng.choice(("", "a picture of ", "there is ")) + " and ".join(phrases))
    return result


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, answer type) triples, balanced between yes and no."""
    things = scene.things
    asked = [
        ("how many objects are there?", NUMBERS[len(things)], "number"),
    ]
    for thing in things:
        if sum(t.shape == thing.shape for t in things) == 1:
            asked.append((f"what color is the {thing.shape}?", thing.colour, "other"))
        if sum(t.colour == thing.colour for t in things) == 1:
            asked.append((f"what shape is the {thing.colour} object?", thing.shape, "other"))
    there = rng.choice(things)
    asked.append((f"is there a {there.colour} {there.shape}?", "yes", "yes/no"))
    absent = [
        (c, s)
        for c, s in itertools.product(COLOURS, SHAPES)
        if all((t.colour, t.shape) != (c, s) for t in things)
        and any(t.colour == c or t.shape == s for t in things)
    ]
    colour, shape = rng.choice(absent)
    asked.append((f"is there a {colour} {shape}?", "no", "yes/no"))
    return asked


def references(scene: Scene) -> list[tuple[int, str]]:
    """(object number, expression) for every object that one phrase singles out."""
    found: list[tuple[int, str]] = []
    for number, thing in enumerate(scene.things):
        others = [t for t in scene.things if t is not thing]
        if all(t.shape != thing.shape for t in others):
            found.append((number, f"the {thing.shape}"))
        if all(t.colour != thing.colour for t in others):
            found.append((number, f"the {thing.colour} object"))
        found.append((number, f"the {thing.phrase}"))
    return found


def statement(first: Scene, second: Scene, rng: random.Random) -> tuple[str, bool]:
    """A statement about two images, true or false with equal chance."""
    total = len(first.things) + len(second.things)
    truth = rng.random() < 0.5
    if rng.random() < 0.5:
        said = total if truth else rng.choice([n for n in range(2, 7) if n != total])
        return f"there are {said} objects in total", truth
    colours = {t.colour for scene in (first, second) for t in scene.things}
    pool = [c for c in COLOURS if (c in colours) == truth] or list(COLOURS)
    colour = rng.choice(pool)
    return f"at least one object is {colour}", colour in colours


def write_shapes(
    folder: str | Path,
    train: int = 2000,
    test: int = 400,
    seed: int = 0,
    side: int = 64,
    most: int = 3,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """The folder, holding ``train`` + ``test`` scenes in all formats listed above.

    Same arguments, same bytes; a folder that is complete is left alone, and one that was left
    half-way is completed. Where ``folder`` holds scenes of other arguments, a folder inside it is
    returned. ``progress`` is called with 1 after each scene. Raises DataError for a folder that
    holds anything else: nothing is written over but what was written here.
    """
    if train < 2 or test < 2:
        raise DataError("write_shapes needs at least two scenes in each split")
    made = {"version": 4, "train": train, "test": test, "seed": seed, "side": side, "most": most}
    root = Path(folder)
    found = _made_before(root)
    if found is not None and found | {"complete": True} != made | {"complete": True}:
        root = root / "-".join(["scenes", *map(str, made.values())])
        found = _made_before(root)
    if found == made:
        return root
    try:
        _write(root, made, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise DataError(f"cannot write scenes into {plain(root)}: {reason(error)}") from None
    return root


NOTE = "shapes.json"


def _made_before(root: Path) -> dict[str, Any] | None:
    """What was written into ``root``, or begun; None for a new or empty folder.

    Raises DataError for a folder that holds anything else.
    """
    advice = "give data.folder a new or an empty folder"
    try:
        there = [path for path in root.iterdir() if not is_left_over(path)]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"data.folder={plain(root)}: {reason(error)}: {advice}") from None
    if not there:
        return None
    try:
        found = read_json(root / NOTE, DataError)
    except DataError:
        found = None
    if isinstance(found, dict) and found.keys() >= {"version", "train", "test", "seed", "side"}:
        return found
    raise DataError(
        f"data.folder={plain(root)} holds files that vlprune did not write, and data.format=shapes "
        f"generates scenes there: to read those files, set data.format to theirs; else {advice}"
    )


def _write(root: Path, made: dict[str, Any], progress: Callable[[int], None] | None) -> None:
    """All scenes in all formats."""
    train, test, seed, side, most = (made[k] for k in ("train", "test", "seed", "side", "most"))
    root.mkdir(parents=True, exist_ok=True)
    _dump(root / NOTE, made | {"complete": False})
    karpathy: list[dict[str, Any]] = []
    for subtype, split, mask_split, pair_split, class_split, count, first in (
        ("train2014", "train", "training", "train", "train", train, 0),
        ("val2014", "test", "validation", "dev", "val", test, train),
    ):
        _write_split(
            root,
            subtype,
            split,
            mask_split,
            pair_split,
            class_split,
            range(first, first + count),
            seed,
            side,
            most,
            karpathy,
            progress,
        )
    _dump(root / "annotations" / "dataset_shapes.json", {"dataset": "shapes", "images": karpathy})
    _dump(root / NOTE, made)


def _write_split(
    root: Path,
    subtype: str,
    split: str,
    mask_split: str,
    pair_split: str,
    class_split: str,
    ids: range,
    seed: int,
    side: int,
    most: int,
    karpathy: list[dict[str, Any]],
    progress: Callable[[int], None] | None,
) -> None:
    """One split in every format."""
    images, scenes = root / "images" / subtype, root / "ade20k" / "images" / mask_split
    masks, classes = root / "ade20k" / "annotations" / mask_split, root / "classes" / class_split
    pairs, notes = root / "nlvr2", root / "annotations"
    for made in (images, scenes, masks, pairs / pair_split, notes):
        made.mkdir(parents=True, exist_ok=True)
    kinds = list(itertools.product(SIZES, SHAPES))
    for size, shape in kinds:
        (classes / f"{size}-{shape}").mkdir(parents=True, exist_ok=True)
    listed, texts, boxes, asked, answered, refs, lines = [], [], [], [], [], [], []
    sentence_ids, before = itertools.count(), None
    named, told, gqa = _MdetrFile(), _MdetrFile(), {}
    for image_id in ids:
        rng = random.Random(f"{seed}/{image_id}")
        scene = make_scene(rng, side, most)
        name = f"COCO_{subtype}_{image_id:012d}.jpg"
        image = draw(scene, rng)
        image.save(images / name, quality=95)
        image.save(scenes / f"{image_id:012d}.jpg", quality=95)
        _mask(scene).save(masks / f"{image_id:012d}.png")
        alone = random.Random(f"{seed}/{image_id}/alone")
        size, shape = kinds[image_id % len(kinds)]
        single = make_scene(alone, side, 1)
        thing = replace(single.things[0], shape=shape, size=size, radius=SIZES[size] * side)
        draw(replace(single, things=(thing,)), alone).save(
            classes / f"{size}-{shape}" / f"{image_id:012d}.jpg", quality=95
        )
        listed.append({"id": image_id, "file_name": name, "width": side, "height": side})
        said = captions(scene, rng)
        texts += [
            {"id": image_id * 10 + i, "image_id": image_id, "caption": c}
            for i, c in enumerate(said)
        ]
        karpathy.append(_karpathy_entry(image_id, name, subtype, split, said))
        own = [_instance(thing, image_id, n) for n, thing in enumerate(scene.things)]
        boxes += own
        for number, (question, answer, kind) in enumerate(questions(scene, rng)):
            key = image_id * 100 + number
            asked.append({"image_id": image_id, "question": question, "question_id": key})
            gqa[str(key)] = _gqa_entry(name, question, answer, kind)
            answered.append(_vqa_annotation(key, image_id, question, answer, kind))
        for number, text in references(scene):
            refs.append(_reference(image_id, number, text, split, next(sentence_ids)))
            named.add(listed[-1], text, [(number, 0, len(text))], own)
        told.add(listed[-1], *_told(scene, random.Random(f"{seed}/{image_id}/told")), own)
        if before is not None and image_id % 2 == 1:
            sentence, truth = statement(before[0], scene, rng)
            lines.append(
                {
                    "identifier": f"{pair_split}-{image_id}-0-0",
                    "sentence": sentence,
                    "label": str(truth),
                }
            )
            for number, picture in enumerate((before[1], image)):
                picture.save(pairs / pair_split / f"{pair_split}-{image_id}-0-img{number}.png")
        before = (scene, image)
        if progress:
            progress(1)
    categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
    _dump(notes / f"captions_{subtype}.json", {"images": listed, "annotations": texts})
    _dump(
        notes / f"instances_{subtype}.json",
        {"images": listed, "annotations": boxes, "categories": categories},
    )
    _dump(notes / f"questions_{subtype}.json", {"data_subtype": subtype, "questions": asked})
    _dump(notes / f"answers_{subtype}.json", {"data_subtype": subtype, "annotations": answered})
    _dump(notes / f"refs_{subtype}.json", refs)
    _dump(notes / f"mdetr_{subtype}.json", named.body(categories))
    _dump(notes / f"captions_mdetr_{subtype}.json", told.body(categories))
    _dump(notes / f"gqa_{subtype}.json", gqa)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (pairs / f"{pair_split}.json").write_text(text, encoding="utf-8")


class _MdetrFile:
    """Texts and the boxes that their characters name, in MDETR's annotation layout."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(
        self,
        image: dict[str, Any],
        text: str,
        spans: list[tuple[int, int, int]],
        instances: list[dict[str, Any]],
    ) -> None:
        """A text about ``image``; ``spans`` are (which of ``instances``, first character, end)."""
        key = len(self.images)
        entry = {**image, "id": key, "original_img_id": image["id"], "caption": text}
        self.images.append({**entry, "dataset_name": "shapes", "tokens_negative": [[0, len(text)]]})
        for number, start, end in spans:
            box = instances[number]
            part = {k: box[k] for k in ("area", "iscrowd", "category_id", "bbox")}
            own = {"id": len(self.annotations), "image_id": key, "original_id": box["id"]}
            self.annotations.append({**part, **own, "tokens_positive": [[start, end]]})

    def body(self, categories: list[dict[str, Any]]) -> dict[str, Any]:
        """The file."""
        return {
            "info": {},
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }


def _told(scene: Scene, rng: random.Random) -> tuple[str, list[tuple[int, int, int]]]:
    """A caption that names every object, and (object number, first character, end) of each."""
    text, spans = "", []
    for number in rng.sample(range(len(scene.things)), len(scene.things)):
        text += " and a " if text else "a "
        start, phrase = len(text), scene.things[number].phrase
        text += phrase
        spans.append((number, start, len(text)))
    return text, spans


def _gqa_entry(name: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    """A question as GQA has it; semantic types by what is asked for."""
    if kind == "yes/no":
        structural, semantic = "verify", "obj"
    else:
        structural = "query"
        semantic = {"what color": "attr", "what shape": "cat"}.get(
            " ".join(question.split()[:2]), "global"
        )
    return {
        "imageId": name.removesuffix(".jpg"),
        "question": question,
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural, "semantic": semantic, "detailed": semantic},
        "fullAnswer": answer,
        "semantic": [],
    }


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _mask(scene: Scene) -> Image.Image:
    """1 for background, 2 + shape number for objects; mode L. 0 would mean: do not count."""
    mask = Image.new("L", (scene.side, scene.side), 1)
    pen = ImageDraw.Draw(mask)
    for thing in scene.things:
        pen.polygon(thing.outline(), fill=2 + SHAPES.index(thing.shape))
    return mask


def _karpathy_entry(
    image_id: int, name: str, subtype: str, split: str, said: list[str]
) -> dict[str, Any]:
    return {
        "imgid": image_id,
        "cocoid": image_id,
        "filename": name,
        "filepath": subtype,
        "split": split,
        "sentences": [
            {"sentid": image_id * 10 + i, "imgid": image_id, "raw": c, "tokens": c.split()}
            for i, c in enumerate(said)
        ],
    }


def _instance(thing: Thing, image_id: int, number: int) -> dict[str, Any]:
    points = [(round(x, 2), round(y, 2)) for x, y in thing.outline()]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    pairs = zip(points, points[1:] + points[:1], strict=True)
    area = abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in pairs)) / 2
    return {
        "id": image_id * 10 + number,
        "image_id": image_id,
        "iscrowd": 0,
        "category_id": 1 + SHAPES.index(thing.shape),
        "area": round(area, 2),
        "bbox": [min(xs), min(ys), round(max(xs) - min(xs), 2), round(max(ys) - min(ys), 2)],
        "segmentation": [[coordinate for point in points for coordinate in point]],
    }


def _vqa_annotation(
    key: int, image_id: int, question: str, answer: str, kind: str
) -> dict[str, Any]:
    return {
        "question_id": key,
        "image_id": image_id,
        "answer_type": kind,
        "question_type": " ".join(question.split()[:2]),
        "multiple_choice_answer": answer,
        "answers": [
            {"answer_id": i, "answer": answer, "answer_confidence": "yes"} for i in range(1, 11)
        ],
    }


def _reference(image_id: int, number: int, text: str, split: str, key: int) -> dict[str, Any]:
    return {
        "ref_id": key,
        "ann_id": image_id * 10 + number,
        "image_id": image_id,
        "split": split,
        "sentences": [{"sent_id": key, "raw": text, "sent": text, "tokens": text.split()}],
    }
