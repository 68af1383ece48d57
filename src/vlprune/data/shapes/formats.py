"""Scenes as entries in the formats of the data sets they stand in for."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

from .scene import SHAPES, Scene, Thing

__all__ = [
    "MdetrFile",
    "gqa_entry",
    "instance",
    "karpathy_entry",
    "mask_of",
    "reference",
    "talk",
    "told",
    "vqa_annotation",
]


class MdetrFile:
    """Texts, and the boxes that spans of them name, in MDETR's annotation layout."""

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
        """Add a text about ``image``; ``spans``: (index in ``instances``, first character, end)."""
        key = len(self.images)
        entry = {**image, "id": key, "original_img_id": image["id"], "caption": text}
        self.images.append({**entry, "dataset_name": "shapes", "tokens_negative": [[0, len(text)]]})
        for number, start, end in spans:
            box = instances[number]
            part = {k: box[k] for k in ("area", "iscrowd", "category_id", "bbox")}
            own = {"id": len(self.annotations), "image_id": key, "original_id": box["id"]}
            self.annotations.append({**part, **own, "tokens_positive": [[start, end]]})

    def body(self, categories: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of the annotation file, for JSON."""
        return {
            "info": {},
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }


def told(scene: Scene, rng: random.Random) -> tuple[str, list[tuple[int, int, int]]]:
    """A caption that names every object, and (object number, first character, end) per object."""
    text, spans = "", []
    for number in rng.sample(range(len(scene.things)), len(scene.things)):
        text += " and a " if text else "a "
        start, phrase = len(text), scene.things[number].phrase
        text += phrase
        spans.append((number, start, len(text)))
    return text, spans


def talk(image_id: int, name: str, asked: list[tuple[str, str, str]]) -> dict[str, Any]:
    """A conversation in LLaVA's format, of (question, answer, answer type) about one image."""
    said: list[dict[str, str]] = []
    for number, (question, answer, _) in enumerate(asked):
        mark = "" if number else "<image>\n"
        said.append({"from": "human", "value": f"{mark}{question}"})
        said.append({"from": "gpt", "value": answer})
    return {"id": image_id, "image": name, "conversations": said}


def gqa_entry(name: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    """A question in GQA's format; its kind and first words decide its semantic type."""
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


def mask_of(scene: Scene) -> Image.Image:
    """Mask in mode L: 1 for background, 2 + shape number for objects; 0 would mean "ignored"."""
    mask = Image.new("L", (scene.side, scene.side), 1)
    pen = ImageDraw.Draw(mask)
    for thing in scene.things:
        pen.polygon(thing.outline(), fill=2 + SHAPES.index(thing.shape))
    return mask


def karpathy_entry(
    image_id: int, name: str, subtype: str, split: str, said: list[str]
) -> dict[str, Any]:
    """An image and its captions, as in the Karpathy split JSON."""
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


def instance(thing: Thing, image_id: int, number: int) -> dict[str, Any]:
    """A shape as an entry of COCO's instances JSON."""
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


def vqa_annotation(
    key: int, image_id: int, question: str, answer: str, kind: str
) -> dict[str, Any]:
    """Ten equal answers to a question, as in VQAv2's annotations JSON."""
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


def reference(image_id: int, number: int, text: str, split: str, key: int) -> dict[str, Any]:
    """A referring expression, as in RefCOCO's references."""
    return {
        "ref_id": key,
        "ann_id": image_id * 10 + number,
        "image_id": image_id,
        "split": split,
        "sentences": [{"sent_id": key, "raw": text, "sent": text, "tokens": text.split()}],
    }
