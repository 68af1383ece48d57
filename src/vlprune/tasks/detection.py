"""Detection of all objects of the known classes, named in prompts or numbered by the model."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.datasets.records import scenery
from ..data.files import Left
from ..data.regions import Phrase, Scenery, read_coco_instances, read_nlvr1_objects
from ..device import moved_to
from ..errors import DataError, RecipeError, UnsupportedError
from ..folders.opening import from_folder, open_config
from ..models.atss import suppress
from ..recipe.options import DetectionOptions, TaskOptions
from .base import Advance
from .detectors import (
    ClassDetector,
    detector_class,
    detector_config,
    detector_processor,
    new_detector,
    published_detector,
)
from .grounding import RegionTask, as_fractions, in_pixels

__all__ = ["DetectionTask"]

MOST = 100
"""Detections per image, the limit in COCO's evaluation."""

Found = tuple[float, int, Tensor]
"""Score, place of the class among the classes, and (left, top, right, bottom) in pixels."""


class DetectionTask(RegionTask):
    """COCO detection; the metric is COCO's ``ap``, computed by pycocotools.

    GLIP, Grounding DINO and MDETR read a prompt that joins the names of all classes, as in
    "cat. dog."; the score of a class is that of its words. A prompt longer than the model can read
    is split over several passes.

    RT-DETR, RT-DETRv2, D-FINE, DETR, Conditional DETR, Deformable DETR and YOLOS number their
    classes: those of the data must be among the names in the config's ``id2label``, or have such a
    name in ``options.names``. They train by
    their own loss, and their image processor reads their output.
    """

    name: ClassVar[str] = "detection"
    metric: ClassVar[str] = "ap"
    takes: ClassVar[type[TaskOptions]] = DetectionOptions
    train: Sequence[Scenery]
    test: Sequence[Scenery]
    item = staticmethod(scenery)
    classes: list[str]
    detector: ClassDetector | None

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[Scenery]:
        if form == "nlvr1-objects":
            return read_nlvr1_objects(part["folder"], part["split"], left)
        return read_coco_instances(part["instances"], part["images"], left)

    def prepare(self) -> None:
        listed = self.class_names("labels")
        if self.streaming:
            self.classes = sorted(listed or ())
            return
        # prompts also name classes that only test images have
        items = itertools.chain(self.train, self.test)
        self.classes = sorted({label for item in items for label in item.labels})
        if not self.classes:
            raise DataError("no image of the data set has a box")
        path, names = self.model_spec.path, self.options["names"]
        self.detector = (
            published_detector(self.model_config, self.classes, names, path)
            if path
            else new_detector(self.options["model"], self.classes)
        )
        if names and not (path and self.detector):
            raise RecipeError(
                "options.names is for a model in model.path that numbers its classes: leave it out"
            )

    # -- a model that numbers its classes ------------------------------------------------

    def new_processor(self) -> Any:
        return detector_processor(self.model_spec) if self.detector else super().new_processor()

    def new_config(self) -> Any:
        if not self.detector:
            return super().new_config()
        return detector_config(self.options["model"], self.model_spec, self.classes, self.options)

    def new_model(self) -> Any:
        if not self.detector:
            return super().new_model()
        config = self.new_config()
        return detector_class(config)(config)

    def model_type(self) -> Any:
        if not self.detector:
            return super().model_type()
        return detector_class(self.model_config if self.model_spec.path else self.new_config())

    def load(self, path: str | Path) -> Any:
        if not self.detector:
            return super().load(path)
        return from_folder(detector_class(open_config(path)), path)

    def looks(self, items: Sequence[Any]) -> dict[str, Tensor]:
        found = super().looks(items)
        if self.detector:
            self.detector.check(found)
        return found

    def texts(self) -> list[str]:
        return [". ".join(self.classes) + "."]

    # -- prompts -----------------------------------------------------------------------

    @cached_property
    def prompts(self) -> list[tuple[str, dict[str, Phrase]]]:
        """Prompts that together name every class, each with the position of its class names."""
        found: list[tuple[str, dict[str, Phrase]]] = []
        waiting = list(self.classes)
        while waiting:
            count = len(waiting)
            while count > 1 and self._length(waiting[:count]) > self.positions:
                count -= 1
            text, phrases = "", {}
            for name in waiting[:count]:
                phrases[name] = Phrase(((len(text), len(text) + len(name)),), ())
                text += f"{name}. "
            found.append((text.rstrip(), phrases))
            waiting = waiting[count:]
        return found

    def _length(self, names: Sequence[str]) -> int:
        return len(self.processor.tokenizer(". ".join(names) + ".")["input_ids"])

    def _maps(self, text: str, phrases: Mapping[str, Phrase]) -> dict[str, Tensor]:
        _, offsets = self.words([text])
        return {name: self.token_map(offsets[0], phrase) for name, phrase in phrases.items()}

    # -- one batch ---------------------------------------------------------------------

    def collate(self, items: Sequence[Scenery], rng: random.Random | None = None) -> dict[str, Any]:
        if self.detector:
            return {**self.looks(items), "labels": [self.detector.labels(i) for i in items]}
        text, phrases = self.prompts[rng.randrange(len(self.prompts)) if rng else 0]
        maps = self._maps(text, phrases)
        words, _ = self.words([text] * len(items))
        labels = []
        for item in items:
            pairs = [
                (box, maps[label])
                for box, label in zip(item.boxes, item.labels, strict=True)
                if label in maps
            ]
            tokens = [row for _, row in pairs]
            labels.append(
                {
                    "boxes": as_fractions([box for box, _ in pairs], item.size),
                    "tokens": torch.stack(tokens) if tokens else torch.zeros(0, self.positions),
                }
            )
        return {**words, **self.looks(items), "labels": labels}

    # -- evaluation --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 32) -> dict[str, float]:
        model.eval()
        found: list[dict[str, Any]] = []
        for start in range(0, len(self.test), batch_size):
            items = self.test[start : start + batch_size]
            for number, said in enumerate(self._detect(model, items), start):
                found += [{"image_id": number, **one} for one in said]
            advance(len(items))
        return self._average_precision(found)

    def _detect(self, model: Any, items: Sequence[Scenery]) -> list[list[dict[str, Any]]]:
        """The best detections of each image, in the format of COCO's result files."""
        said = self._numbered(model, items) if self.detector else self._prompted(model, items)
        return [
            [
                {"category_id": number + 1, "score": score, "bbox": _coco(place)}
                for score, number, place in sorted(own, key=lambda one: -one[0])[:MOST]
            ]
            for own in said
        ]

    def _numbered(self, model: Any, items: Sequence[Scenery]) -> list[list[Found]]:
        assert self.detector is not None
        outputs = model(**moved_to(model, self.looks(items)))
        found = self.detector.read(outputs, [item.size for item in items], self.processor)
        order = {name: number for number, name in enumerate(self.classes)}
        return [[(score, order[name], box) for score, name, box in own] for own in found]

    def _prompted(self, model: Any, items: Sequence[Scenery]) -> list[list[Found]]:
        looks = moved_to(model, self.looks(items))
        said: list[list[Found]] = [[] for _ in items]
        for text, phrases in self.prompts:
            words, _ = self.words([text] * len(items))
            outputs = model(**moved_to(model, words), **looks)
            fit, boxes = (x.cpu() for x in self.grounder.read(outputs))
            maps = self._maps(text, phrases)
            asked = torch.tensor([self.classes.index(name) for name in maps])
            for i, item in enumerate(items):
                scores = torch.stack(
                    [self.grounder.score(fit[i], row[: fit.shape[-1]]) for row in maps.values()]
                )
                places = in_pixels(boxes[i], item.size)
                for score, number, place in self._best(scores, places):
                    said[i].append((score, int(asked[number]), place))
        return said

    def _best(self, scores: Tensor, places: Tensor) -> list[Found]:
        """The best detections of one image, best first, as (score, row of ``scores``, place).

        ``scores`` is (classes, places). Equal scores are ordered by class, then by place.
        """
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : 10 * MOST]
        rows = torch.arange(len(scores))[:, None].expand_as(best).reshape(-1)
        values, places = scores.gather(1, best).reshape(-1), places[best.reshape(-1)]
        if self.grounder.suppresses:
            stays = suppress(places, values, classes=rows, most=MOST)
        else:
            stays = values.argsort(descending=True, stable=True)[:MOST]
        found = zip(values[stays].tolist(), rows[stays].tolist(), places[stays], strict=True)
        return [*found]

    def _average_precision(self, found: list[dict[str, Any]]) -> dict[str, float]:
        """COCO's figures for ``found``. Raises UnsupportedError without pycocotools.

        Images go by their numbers, as pycocotools needs ids that sort as one array.
        """
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError:
            raise UnsupportedError(
                "average precision needs pycocotools: pip install 'vlprune[grounding]'"
            ) from None
        if not found:
            return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
        boxes = [
            {
                "id": number + 1,
                "image_id": image,
                "category_id": self.classes.index(label) + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for number, (image, box, label) in enumerate(
                (image, box, label)
                for image, item in enumerate(self.test)
                for box, label in zip(item.boxes, item.labels, strict=True)
            )
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = COCO()
            truth.dataset = {
                "info": {},
                "images": [{"id": image} for image in range(len(self.test))],
                "annotations": boxes,
                "categories": [{"id": i + 1, "name": n} for i, n in enumerate(self.classes)],
            }
            truth.createIndex()
            scored = COCOeval(truth, truth.loadRes(found), "bbox")
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
        stats = [max(0.0, float(value)) for value in scored.stats]
        return {"ap": stats[0], "ap50": stats[1], "ap75": stats[2]}

    @torch.no_grad()
    def predict(self, model: Any, items: list[Scenery]) -> list[str]:
        model.eval()
        return [
            "; ".join(
                f"{self.classes[one['category_id'] - 1]} {one['bbox']} {one['score']:.2f}"
                for one in said
                if one["score"] >= 0.3
            )
            for said in self._detect(model, items)
        ]

    @torch.no_grad()
    def results(self, model: Any) -> list[dict[str, Any]]:
        """COCO's result file: one entry per detection."""
        model.eval()
        found: list[dict[str, Any]] = []
        for start in range(0, len(self.test), 32):
            items = list(self.test[start : start + 32])
            for item, said in zip(items, self._detect(model, items), strict=True):
                found += [{"image_id": item.id, **one} for one in said]
        return found


def _coco(place: Tensor) -> list[float]:
    left, top, right, bottom = (float(value) for value in place)
    return [round(value, 2) for value in (left, top, right - left, bottom - top)]
