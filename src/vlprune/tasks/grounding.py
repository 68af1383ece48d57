"""Grounding: finding the boxes that referring expressions and phrases of captions name."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou

from ..data.datasets.records import grounding
from ..data.files import Left
from ..data.regions import Box, Grounding, Phrase, read_mdetr, read_refer
from ..device import moved_to
from ..errors import DataError
from ..recipe.options import GroundingOptions, RegionOptions, TaskOptions
from .base import Advance, Task
from .grounders import Grounder, grounder_of

__all__ = ["GroundingTask", "RegionTask", "as_fractions", "overlaps"]

HITS = (1, 5, 10)


class RegionTask(Task):
    """Base class of tasks with a grounder: texts as tokens, and pictures of any shape."""

    takes: ClassVar[type[TaskOptions]] = RegionOptions

    @cached_property
    def grounder(self) -> Grounder:
        """The family of the model in ``model.path``, or of ``options.model`` for a new model."""
        if not self.model_spec.path:
            return grounder_of(self.options["model"])
        return grounder_of(self.model_config.model_type)

    def texts(self) -> list[str]:
        """Every text of the training set, for the vocabulary of a new model."""
        raise NotImplementedError

    def new_processor(self) -> Any:
        return self.grounder.new_processor(self.model_spec, self.texts())

    def new_config(self) -> Any:
        """The config of a small new model."""
        return self.grounder.new_config(self.model_spec, self.processor.tokenizer, self.options)

    def model_type(self) -> Any:
        return self.grounder.model_class()

    def new_model(self) -> Any:
        return self.grounder.ready(self.model_type()(self.new_config()))

    def load(self, path: str | Path) -> Any:
        return self.grounder.ready(self.load_by_name(path))

    def example_inputs(self, batch_size: int = 1) -> dict[str, Any]:
        """Inputs of one forward pass, without those that only the loss reads."""
        inputs = super().example_inputs(batch_size)
        return {k: v for k, v in inputs.items() if k not in ("labels", "answers")}

    @cached_property
    def positions(self) -> int:
        """The number of text positions over which a query has probabilities."""
        return self.grounder.positions(
            self.model_config if self.model_spec.path else self.new_config()
        )

    # -- one batch ---------------------------------------------------------------------

    def words(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Token ids and mask, and the (first character, end) of each token: (texts, tokens, 2)."""
        prompts = [self.grounder.prompt(text) for text in texts]
        limit = min(self.positions, int(self.processor.tokenizer.model_max_length))
        told = self.processor.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=limit,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        ids = {"input_ids": told["input_ids"], "attention_mask": told["attention_mask"]}
        return ids, told["offset_mapping"]

    def token_map(self, offsets: Tensor, phrase: Phrase) -> Tensor:
        """1 / n at the n tokens of a phrase, 0 elsewhere: (positions,).

        ``offsets`` (tokens, 2) are the characters of the text's tokens. Raises DataError for a
        phrase that the model cannot read because its text is too long.
        """
        found = torch.zeros(len(offsets), dtype=torch.bool)
        for start, end in phrase.spans:
            found |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        row = torch.zeros(self.positions)
        row[: len(found)] = found.float()
        if not found.any():  # truncated away
            raise DataError(
                f"a phrase lies beyond the {len(offsets)} tokens that the model reads: shorten "
                "its text, or use a model with more text positions"
            )
        return row / row.sum()

    def looks(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """``pixel_values``, padded to the largest picture, and ``pixel_mask`` if any is padded."""
        pictures = [self.pixels([i.image], getattr(i, "size", None))[0] for i in items]
        return pad_pictures(pictures)


class GroundingTask(RegionTask):
    """Grounding of phrases with MDETR, Grounding DINO or GLIP; the metric is ``accuracy``.

    ``accuracy`` is R@1, the share of phrases for which the best query's box has an IoU of at least
    0.5 with one of the phrase's boxes. For a text that :attr:`Grounding.refers` to one object,
    queries are ranked as for a referring expression, and ``accuracy`` is the usual figure of
    RefCOCO, RefCOCO+ and RefCOCOg; the phrases of other texts are ranked each by itself, and it is
    R@1 of Flickr30k Entities.
    """

    name: ClassVar[str] = "grounding"
    metric: ClassVar[str] = "accuracy"
    takes: ClassVar[type[TaskOptions]] = GroundingOptions
    train: Sequence[Grounding]
    test: Sequence[Grounding]
    item = staticmethod(grounding)

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[Grounding]:
        if form == "refer":
            return read_refer(part["refs"], part["instances"], part["images"], part["split"], left)
        found = read_mdetr(part["annotations"], part["images"], left)
        return [replace(one, caption=True) for one in found] if form == "mdetr-captions" else found

    def texts(self) -> list[str]:
        return [item.text for item in self.train] + ["."]

    def collate(
        self, items: Sequence[Grounding], rng: random.Random | None = None
    ) -> dict[str, Any]:
        words, offsets = self.words([item.text for item in items])
        labels = []
        for item, places in zip(items, offsets, strict=True):
            pairs = [(phrase, box) for phrase in item.phrases for box in phrase.boxes]
            maps = [self.token_map(places, phrase) for phrase, _ in pairs]
            boxes = as_fractions([box for _, box in pairs], item.size)
            labels.append({"boxes": boxes, "tokens": torch.stack(maps)})
        return {**words, **self.looks(items), "labels": labels}

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        hits, count = dict.fromkeys(HITS, 0), 0
        for start in range(0, len(self.test), batch_size):
            items = self.test[start : start + batch_size]
            for item, ranked in zip(items, self._ranked(model, items), strict=True):
                for phrase, boxes in zip(item.phrases, ranked, strict=True):
                    best = overlaps(boxes, _corners(phrase.boxes)).max(1).values
                    count += 1
                    for k in HITS:
                        hits[k] += bool((best[:k] >= 0.5).any())
            advance(len(items))
        accuracy = {"accuracy": hits[1] / count}
        return accuracy | {f"recall_at_{k}": hits[k] / count for k in HITS[1:]}

    def _ranked(self, model: Any, items: Sequence[Grounding]) -> list[list[Tensor]]:
        """For each phrase of each item, all boxes (queries, 4) as corners in pixels, best first."""
        words, offsets = self.words([item.text for item in items])
        inputs = {**words, **self.looks(items)}
        outputs = model(**moved_to(model, inputs))
        fit, found = (x.cpu() for x in self.grounder.read(outputs))
        result = []
        for item, places, own, boxes in zip(items, offsets, fit, found, strict=True):
            pixels = in_pixels(boxes, item.size)
            score = self.grounder.score_expression if item.refers else self.grounder.score
            scores = [score(own, self.token_map(places, phrase)) for phrase in item.phrases]
            result.append([pixels[s.argsort(descending=True, stable=True)] for s in scores])
        return result

    @torch.no_grad()
    def predict(self, model: Any, items: list[Grounding]) -> list[str]:
        model.eval()
        best = [[boxes[0] for boxes in ranked] for ranked in self._ranked(model, items)]
        return ["; ".join(_say(box) for box in boxes) for boxes in best]


# -- boxes -----------------------------------------------------------------------------


def as_fractions(boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
    """COCO boxes as (centre x, centre y, width, height) in fractions of the image: (n, 4)."""
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    centred = torch.cat([found[:, :2] + found[:, 2:] / 2, found[:, 2:]], dim=1)
    return centred / torch.tensor([*size, *size], dtype=torch.float32)


def in_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) of :func:`as_fractions` as (left, top, right, bottom) in pixels."""
    return center_to_corners_format(boxes) * torch.tensor([*size, *size], dtype=boxes.dtype)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """IoU of each box in ``first`` (n, 4) with each in ``second`` (m, 4), as corners: (n, m)."""
    return box_iou(first, second)[0]


def pad_pictures(pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pictures (3, height, width) in one batch, padded on the right and below.

    ``pixel_values`` (batch, 3, height, width) and, if any picture is padded, ``pixel_mask`` (batch,
    height, width), 1 inside the picture.
    """
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    if all(p.shape[1:] == (height, width) for p in pictures):
        return {"pixel_values": torch.stack(list(pictures))}
    values = torch.zeros(len(pictures), 3, height, width)
    mask = torch.zeros(len(pictures), height, width, dtype=torch.long)
    for i, picture in enumerate(pictures):
        values[i, :, : picture.shape[1], : picture.shape[2]] = picture
        mask[i, : picture.shape[1], : picture.shape[2]] = 1
    return {"pixel_values": values, "pixel_mask": mask}


def _corners(boxes: Sequence[Box]) -> Tensor:
    return torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes])


def _say(box: Tensor) -> str:
    left, top, right, bottom = (round(float(value), 1) for value in box)
    return f"[{left}, {top}, {round(right - left, 1)}, {round(bottom - top, 1)}]"
