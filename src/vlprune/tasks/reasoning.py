"""Visual reasoning with BLIP: is a statement true of a pair of images?"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.datasets.records import statement
from ..data.files import Left
from ..data.pairs import Statement, read_nlvr1, read_nlvr2
from ..device import moved_to
from ..folders.opening import from_folder, open_config
from ..recipe.options import ReasoningOptions, TaskOptions
from .base import Advance, Task
from .new_models import blip_config, blip_processor

__all__ = ["ReasoningTask", "swapped"]

SIDE = re.compile(r'(?<![^\s.!"()*#:;~])(left|right)(?![^\s.!"()*#:;~])', re.IGNORECASE)
"""The words that BLIP's authors change over: between blanks, or the marks that they remove."""


class ReasoningTask(Task):
    """NLVR2 with a :class:`vlprune.models.BlipForVisualReasoning`; the metric is ``accuracy``.

    ``model.path`` may also name a BLIP of transformers, whose weights then start this model, with
    both cross-attentions alike. The text begins with the tokenizer's own first token. The option
    ``swap`` trains on half of the statements with their images, and their words left and right,
    changed over.
    """

    name: ClassVar[str] = "reasoning"
    metric: ClassVar[str] = "accuracy"
    takes: ClassVar[type[TaskOptions]] = ReasoningOptions
    train: Sequence[Statement]
    test: Sequence[Statement]
    item = staticmethod(statement)

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[Statement]:
        if form == "nlvr1":
            return read_nlvr1(part["folder"], part["split"], left)
        return read_nlvr2(part["statements"], part["images"], left)

    def new_processor(self) -> Any:
        return blip_processor(self.model_spec, [s.text for s in self.train])

    def model_type(self) -> Any:
        from ..models import BlipForVisualReasoning

        return BlipForVisualReasoning

    def new_model(self) -> Any:
        from ..models import BlipNlvrConfig

        sizes = blip_config(self.model_spec, self.processor.tokenizer).to_dict()
        merged = self.model_spec.text_layers // 2
        return self.model_type()(BlipNlvrConfig(**sizes, merge_from_layer=merged))

    def load(self, path: str | Path) -> Any:
        from transformers import BlipForImageTextRetrieval

        if open_config(path).model_type == "blip":
            return self.model_type().from_blip(from_folder(BlipForImageTextRetrieval, path))
        return super().load(path)

    def changed(self, item: Statement, rng: random.Random) -> Statement:
        """The statement with changed pictures and, half of the time, told from the other side."""
        item = super().changed(item, rng)
        return swapped(item) if self.options["swap"] and rng.random() < 0.5 else item

    def collate(
        self, items: list[Statement], rng: random.Random | None = None
    ) -> dict[str, Tensor]:
        text = self.processor.tokenizer(
            [s.text for s in items], padding=True, truncation=True, return_tensors="pt"
        )
        pixels = self.pixels([image for s in items for image in s.images])
        return {
            "pixel_values": pixels.unflatten(0, (len(items), 2)),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": torch.tensor([int(s.truth) for s in items]),
        }

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        right = 0
        for start in range(0, len(self.test), batch_size):
            items = list(self.test[start : start + batch_size])
            said = self._answers(model, items)
            right += sum(answer == s.truth for answer, s in zip(said, items, strict=True))
            advance(len(items))
        return {"accuracy": right / len(self.test)}

    def predict(self, model: Any, items: list[Statement]) -> list[str]:
        model.eval()
        return [str(answer).lower() for answer in self._answers(model, items)]

    @torch.no_grad()
    def _answers(self, model: Any, items: list[Statement]) -> list[bool]:
        batch = {k: v for k, v in self.collate(items).items() if k != "labels"}
        return [bool(a) for a in model(**moved_to(model, batch)).logits.argmax(1).tolist()]


def swapped(statement: Statement) -> Statement:
    """The statement about the same pictures in the other order; it is as true as before."""

    def other(match: re.Match[str]) -> str:
        word = "right" if match[0].lower() == "left" else "left"
        return word.capitalize() if match[0][0].isupper() else word

    first, second = statement.images
    text = SIDE.sub(other, statement.text)
    return dataclasses.replace(statement, text=text, images=(second, first))
