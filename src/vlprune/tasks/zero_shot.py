"""Zero-shot classification with a dual encoder: the class whose prompts fit a picture best."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets.records import labelled_image
from ..data.files import Left
from ..data.pictures import LabelledImage, read_image_folder
from ..errors import DataError, RecipeError, did_you_mean
from ..files import plain
from ..recipe.options import TaskOptions, ZeroShotOptions
from .base import Advance
from .contrast import PairContrast
from .dual_encoders import DualEncoderTask

__all__ = ["ZeroShotTask"]

TOP = 5


class ZeroShotTask(DualEncoderTask):
    """Classification of an image folder by prompts; the metric is ``accuracy``.

    A class is named after its folder or label, with spaces for underscores, or by
    ``options.names``. Its vector is the mean of the unit-length features of its prompts, one per
    template in ``options.templates``, scaled to unit length, as CLIP's authors do (Radford et al.,
    ICML 2021, section 3.1.4). All classes of the training and the test data are candidates.
    ``top5`` is given where there are more than five.

    Training pairs each picture with the prompt of its class in a random template, in the model's
    own contrastive loss, where pictures of one class fit each other's prompts
    (:class:`PairContrast`).
    """

    name: ClassVar[str] = "zero-shot"
    metric: ClassVar[str] = "accuracy"
    takes: ClassVar[type[TaskOptions]] = ZeroShotOptions
    train: Sequence[LabelledImage]
    test: Sequence[LabelledImage]
    item = staticmethod(labelled_image)
    labels: frozenset[str] = frozenset()
    classes: list[str]
    names: list[str]

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[LabelledImage]:
        items = read_image_folder(part["folder"], left)
        # every class is a candidate, also where data.test_items takes the pictures of a few
        self.labels |= {item.label for item in items}
        return items

    def prepare(self) -> None:
        listed = self.class_names("label")
        train = () if listed is not None else self.train
        known = self.labels | {item.label for item in (*train, *self.test)}
        self.classes = sorted(known | {*(listed or ())})
        given = self.options["names"]
        for folder in given:
            if folder not in self.classes:
                raise RecipeError(
                    f"options.names has a name for {plain(folder)}, which is no folder of the data."
                    f"{did_you_mean(folder, self.classes)}"
                )
        self.names = [given.get(label) or label.replace("_", " ") for label in self.classes]
        for name, count in Counter(self.names).items():
            if count > 1:
                same = [c for c, n in zip(self.classes, self.names, strict=True) if n == name]
                raise DataError(
                    f"the classes {', '.join(map(plain, same[:3]))} have the same name "
                    f"{plain(name)!r}, so no prompt tells them apart: give options.names"
                )

    def texts(self) -> list[str]:
        return [self.prompt(name, t) for name in self.names for t in self.options["templates"]]

    @staticmethod
    def prompt(name: str, template: str) -> str:
        """The template with the name in place of ``{}``."""
        return template.replace("{}", name)

    def objective(self, model: Any) -> nn.Module:
        return PairContrast(model)

    def collate(self, items: list[LabelledImage], rng: random.Random | None = None) -> Any:
        templates = self.options["templates"]
        keys = [self.classes.index(item.label) for item in items]
        texts = [
            self.prompt(self.names[key], rng.choice(templates) if rng else templates[0])
            for key in keys
        ]
        batch = {**self.words(texts), **self.looks([item.image for item in items])}
        if rng is not None:  # only the objective takes keys, not the model
            batch["keys"] = torch.tensor(keys)
        return batch

    @torch.no_grad()
    def class_features(self, model: Any, batch_size: int = 64) -> Tensor:
        """The unit-length vector of each class, (classes, width)."""
        texts = self.texts()
        found = torch.cat(
            [
                self._text_features(model, texts[start : start + batch_size])
                for start in range(0, len(texts), batch_size)
            ]
        )
        means = found.reshape(len(self.names), len(self.options["templates"]), -1).mean(1)
        return F.normalize(means, dim=-1)

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        classes = self.class_features(model, batch_size)
        best, wanted = [], []
        for start in range(0, len(self.test), batch_size):
            items = self.test[start : start + batch_size]
            scores = self._image_features(model, [item.image for item in items]) @ classes.T
            best.append(scores.topk(min(TOP, len(self.classes))).indices.cpu())
            wanted += [self.classes.index(item.label) for item in items]
            advance(len(items))
        hits = torch.cat(best) == torch.tensor(wanted)[:, None]
        figures = {"accuracy": float(hits[:, 0].double().mean())}
        if len(self.classes) > TOP:
            figures["top5"] = float(hits.any(1).double().mean())
        return figures

    @torch.no_grad()
    def predict(self, model: Any, items: list[LabelledImage]) -> list[str]:
        model.eval()
        scores = self._image_features(model, [item.image for item in items])
        best = (scores @ self.class_features(model).T).argmax(1)
        return [self.names[i] for i in best.tolist()]
