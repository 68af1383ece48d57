"""Writing generated scenes to disk, in all formats at once."""

from __future__ import annotations

import errno
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ...errors import DataError
from ...files import plain, read_json, reason
from ..images import is_left_over
from .formats import (
    MdetrFile,
    gqa_entry,
    instance,
    karpathy_entry,
    mask_of,
    reference,
    talk,
    told,
    vqa_annotation,
)
from .scene import SHAPES, SIZES, Scene, draw, make_scene
from .words import captions, questions, references, statement

__all__ = ["write_shapes"]


def write_shapes(
    folder: str | Path,
    train: int = 2000,
    test: int = 400,
    seed: int = 0,
    side: int = 64,
    most: int = 3,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``train`` + ``test`` scenes in every format and return the folder that holds them.

    The same arguments give the same bytes; a complete folder is left alone, an incomplete one is
    completed. If ``folder`` holds scenes made with other arguments, the scenes go into a folder
    inside it. ``side`` is the side of a picture in pixels, ``most`` the most objects per scene.
    ``progress`` is called with 1 after each scene. Raises DataError for fewer than two scenes in a
    split, and for a folder that holds other files or cannot be written: only files that this
    function wrote are ever overwritten. Raises OSError when the disk is full.
    """
    if train < 2 or test < 2:
        raise DataError("write_shapes needs at least two scenes in each split")
    made = {"version": 5, "train": train, "test": test, "seed": seed, "side": side, "most": most}
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
    """The arguments of the scenes written to ``root``, complete or not; None for an empty folder.

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
    """Write all scenes in all formats."""
    root.mkdir(parents=True, exist_ok=True)
    _dump(root / NOTE, made | {"complete": False})
    train = range(made["train"])
    test = range(made["train"], made["train"] + made["test"])
    splits = (
        _Split(root, made, "train2014", "train", "training", "train", "train", train),
        _Split(root, made, "val2014", "test", "validation", "dev", "val", test),
    )
    for split in splits:
        split.write(progress or (lambda _: None))
    images = [entry for split in splits for entry in split.karpathy]
    _dump(root / "annotations" / "dataset_shapes.json", {"dataset": "shapes", "images": images})
    _dump(root / NOTE, made)


KINDS = tuple(itertools.product(SIZES, SHAPES))
"""The classes for classification, as (size, shape)."""


class _Split:
    """One split; its pictures are written scene by scene, its annotations at the end.

    Each format has its own name for the split: ``subtype`` is COCO's, ``masks`` ADE20K's,
    ``pairs`` NLVR2's, ``classes`` that of image folders.
    """

    def __init__(
        self,
        root: Path,
        made: dict[str, Any],
        subtype: str,
        split: str,
        masks: str,
        pairs: str,
        classes: str,
        ids: range,
    ) -> None:
        self.seed, self.side, self.most = made["seed"], made["side"], made["most"]
        self.subtype, self.split, self.pair_split, self.ids = subtype, split, pairs, ids
        self.images, self.notes = root / "images" / subtype, root / "annotations"
        self.scenes = root / "ade20k" / "images" / masks
        self.masks = root / "ade20k" / "annotations" / masks
        self.classes, self.pairs = root / "classes" / classes, root / "nlvr2"
        self.listed: list[dict[str, Any]] = []
        self.karpathy: list[dict[str, Any]] = []
        self.captions: list[dict[str, Any]] = []
        self.boxes: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.references: list[dict[str, Any]] = []
        self.statements: list[dict[str, Any]] = []
        self.gqa: dict[str, Any] = {}
        self.talks: list[dict[str, Any]] = []
        self.named, self.told = MdetrFile(), MdetrFile()
        self.sentence_ids = itertools.count()

    def write(self, progress: Callable[[int], None]) -> None:
        """Write the whole split; ``progress`` is called with 1 after each scene."""
        for folder in (self.images, self.scenes, self.masks, self.pairs / self.pair_split):
            folder.mkdir(parents=True, exist_ok=True)
        self.notes.mkdir(parents=True, exist_ok=True)
        for size, shape in KINDS:
            (self.classes / f"{size}-{shape}").mkdir(parents=True, exist_ok=True)
        before = None
        for image_id in self.ids:
            rng = random.Random(f"{self.seed}/{image_id}")
            scene = make_scene(rng, self.side, self.most)
            image = draw(scene, rng)
            self._pictures(image_id, scene, image)
            self._annotate(image_id, scene, rng)
            if before is not None and image_id % 2 == 1:
                self._pair(image_id, before, (scene, image), rng)
            before = (scene, image)
            progress(1)
        self._annotations()

    def _name(self, image_id: int) -> str:
        return f"COCO_{self.subtype}_{image_id:012d}.jpg"

    def _pictures(self, image_id: int, scene: Scene, image: Image) -> None:
        """Write the scene, its mask, and a picture of a single shape for classification."""
        image.save(self.images / self._name(image_id), quality=95)
        image.save(self.scenes / f"{image_id:012d}.jpg", quality=95)
        mask_of(scene).save(self.masks / f"{image_id:012d}.png")
        alone = random.Random(f"{self.seed}/{image_id}/alone")
        size, shape = KINDS[image_id % len(KINDS)]
        single = make_scene(alone, self.side, 1)
        radius = SIZES[size] * self.side
        thing = replace(single.things[0], shape=shape, size=size, radius=radius)
        picture = draw(replace(single, things=(thing,)), alone)
        picture.save(self.classes / f"{size}-{shape}" / f"{image_id:012d}.jpg", quality=95)

    def _annotate(self, image_id: int, scene: Scene, rng: random.Random) -> None:
        """Collect captions, boxes, questions and referring expressions of one scene."""
        name = self._name(image_id)
        entry = {"id": image_id, "file_name": name, "width": self.side, "height": self.side}
        self.listed.append(entry)
        said = captions(scene, rng)
        for number, caption in enumerate(said):
            key = image_id * 10 + number
            self.captions.append({"id": key, "image_id": image_id, "caption": caption})
        self.karpathy.append(karpathy_entry(image_id, name, self.subtype, self.split, said))
        boxes = [instance(thing, image_id, number) for number, thing in enumerate(scene.things)]
        self.boxes += boxes
        asked = questions(scene, rng)
        self.talks.append(talk(image_id, name, asked))
        for number, (question, answer, kind) in enumerate(asked):
            key = image_id * 100 + number
            self.asked.append({"image_id": image_id, "question": question, "question_id": key})
            self.gqa[str(key)] = gqa_entry(name, question, answer, kind)
            self.answered.append(vqa_annotation(key, image_id, question, answer, kind))
        for number, text in references(scene):
            sentence = next(self.sentence_ids)
            self.references.append(reference(image_id, number, text, self.split, sentence))
            self.named.add(entry, text, [(number, 0, len(text))], boxes)
        apart = random.Random(f"{self.seed}/{image_id}/told")
        self.told.add(entry, *told(scene, apart), boxes)

    def _pair(
        self,
        image_id: int,
        before: tuple[Scene, Image],
        now: tuple[Scene, Image],
        rng: random.Random,
    ) -> None:
        """Collect a statement about two scenes, and write their pictures."""
        sentence, truth = statement(before[0], now[0], rng)
        name = f"{self.pair_split}-{image_id}-0"
        line = {"identifier": f"{name}-0", "sentence": sentence, "label": str(truth)}
        self.statements.append(line)
        for number, (_, picture) in enumerate((before, now)):
            picture.save(self.pairs / self.pair_split / f"{name}-img{number}.png")

    def _annotations(self) -> None:
        """Write the annotation files, which list all pictures of the split."""
        categories = [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]
        listed, subtype = {"images": self.listed}, {"data_subtype": self.subtype}
        for name, body in {
            "captions": {**listed, "annotations": self.captions},
            "instances": {**listed, "annotations": self.boxes, "categories": categories},
            "questions": {**subtype, "questions": self.asked},
            "answers": {**subtype, "annotations": self.answered},
            "refs": self.references,
            "mdetr": self.named.body(categories),
            "captions_mdetr": self.told.body(categories),
            "gqa": self.gqa,
            "conversations": self.talks,
        }.items():
            _dump(self.notes / f"{name}_{self.subtype}.json", body)
        text = "".join(json.dumps(line) + "\n" for line in self.statements)
        (self.pairs / f"{self.pair_split}.json").write_text(text, encoding="utf-8")


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
