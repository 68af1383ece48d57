"""Image classification with ViT and DeiT."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets.records import labelled_image
from ..data.files import Left
from ..data.pictures import LabelledImage, read_image_folder
from ..device import device_of, moved_to, place
from ..errors import DataError, UnsupportedError
from ..recipe.options import ClassificationOptions, TaskOptions
from ..training.objective import Trainee
from .base import Advance, Task
from .new_models import vit_processor, vit_settings

__all__ = ["ClassificationTask", "SoftTargets"]


class ClassificationTask(Task):
    """Classification of an image folder in ImageNet's layout; the metric is ``top1``.

    Options: ``mixup`` (Beta parameter, 0 = none; Zhang et al., ICLR 2018), ``smoothing`` of
    labels, ``flip`` of training images, and ``distill_from``, the folder of a teacher model whose
    decision the distillation head of a DeiTForImageClassificationWithTeacher learns (Touvron
    et al., ICML 2021, hard distillation). Without a teacher that head learns the labels.
    """

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "top1"
    takes: ClassVar[type[TaskOptions]] = ClassificationOptions
    train: Sequence[LabelledImage]
    test: Sequence[LabelledImage]
    item = staticmethod(labelled_image)
    classes: list[str]

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[LabelledImage]:
        return read_image_folder(part["folder"], left)

    def prepare(self) -> None:
        listed = self.class_names("label")
        self.classes = listed or _sorted({item.label for item in self.train})
        unknown = {item.label for item in self.test} - set(self.classes)
        if unknown:
            raise DataError(f"the test images have a class without training images: {min(unknown)}")

    def new_processor(self) -> Any:
        return vit_processor(self.model_spec)

    def model_type(self) -> Any:
        from transformers import DeiTForImageClassification

        return DeiTForImageClassification

    def new_model(self) -> Any:
        from transformers import DeiTConfig

        config = DeiTConfig(**vit_settings(self.model_spec), num_labels=len(self.classes))
        return self.model_type()(config)

    def load(self, path: str | Path) -> Any:
        model = self.load_by_name(path)
        if model.config.num_labels != len(self.classes):
            raise UnsupportedError(
                f"{path} tells {model.config.num_labels} classes apart, the data has "
                f"{len(self.classes)}: use the data set it was trained on"
            )
        return model

    def objective(self, model: Any) -> nn.Module:
        teacher = self.load_by_name(self.options["distill_from"]) if self.teaches(model) else None
        return SoftTargets(model, len(self.classes), self.options["smoothing"], teacher)

    def teaches(self, model: Any) -> bool:
        """Whether ``distill_from`` is given. Raises UnsupportedError if ``model`` cannot use it."""
        wanted = bool(self.options["distill_from"])
        if wanted and not hasattr(model, "distillation_classifier"):
            raise UnsupportedError(
                "options.distill_from needs a model with a distillation token "
                "(DeiTForImageClassificationWithTeacher)"
            )
        return wanted

    def collate(self, items: list[LabelledImage], rng: random.Random | None = None) -> Any:
        pixels = self.pixels([item.image for item in items])
        labels = torch.tensor([self.classes.index(item.label) for item in items])
        batch: dict[str, Any] = {"pixel_values": pixels, "labels": labels}
        if rng is None:
            return batch
        if self.options["flip"]:
            flipped = torch.tensor([rng.random() < 0.5 for _ in items])
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
            batch["pixel_values"] = pixels
        if self.options["mixup"] > 0:  # each image with its partner in the reversed batch
            share = rng.betavariate(self.options["mixup"], self.options["mixup"])
            batch["pixel_values"] = share * pixels + (1 - share) * pixels.flip(0)
            batch |= {"other_labels": labels.flip(0), "share": torch.tensor(share)}
        return batch

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        from torchmetrics.classification import MulticlassAccuracy  # takes seconds

        model.eval()
        count = len(self.classes)
        tops = {
            f"top{k}": place(MulticlassAccuracy(count, top_k=k, average="micro"), device_of(model))
            for k in (1, 5)
            if k < count
        }
        for start in range(0, len(self.test), batch_size):
            items = list(self.test[start : start + batch_size])
            batch = moved_to(model, self.collate(items))
            logits = model(pixel_values=batch["pixel_values"]).logits
            for top in tops.values():
                top.update(logits, batch["labels"])
            advance(len(items))
        return {name: float(top.compute()) for name, top in tops.items()}

    @torch.no_grad()
    def predict(self, model: Any, items: list[LabelledImage]) -> list[str]:
        model.eval()
        pixels = moved_to(model, self.pixels([item.image for item in items]))
        best = model(pixel_values=pixels).logits.argmax(1)
        return [self.classes[i] for i in best.tolist()]


def _sorted(labels: set[str]) -> list[str]:
    """The classes in order: by number if the labels of a dataset are numbers, else by name."""
    numbers = all(label.isascii() and label.isdigit() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))


class SoftTargets(Trainee):
    """Cross-entropy with mixed and smoothed labels, and hard distillation into a second head."""

    def __init__(self, model: nn.Module, classes: int, smoothing: float, teacher: Any) -> None:
        super().__init__(model)
        self.classes, self.smoothing = classes, smoothing
        self._teacher = (teacher.eval(),) if teacher is not None else ()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        other_labels: Tensor | None = None,
        share: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``{"loss": (), "logits": (batch, classes)}``; ``labels`` are class numbers (batch,).

        ``other_labels`` (batch,) are mixed into ``labels``, which keep the weight ``share``.
        """
        output = self.model(pixel_values=pixel_values)
        wanted = F.one_hot(labels, self.classes).to(output.logits.dtype)
        if other_labels is not None and share is not None:
            other = F.one_hot(other_labels, self.classes).to(wanted.dtype)
            wanted = share * wanted + (1 - share) * other
        wanted = (1 - self.smoothing) * wanted + self.smoothing / self.classes
        second = getattr(output, "distillation_logits", None)
        if second is None:
            return {"loss": F.cross_entropy(output.logits, wanted), "logits": output.logits}
        decided: Tensor = wanted
        for teacher in self._teacher:
            with torch.no_grad():
                decided = place(teacher, self.device)(pixel_values=pixel_values).logits.argmax(1)
        loss = F.cross_entropy(output.cls_logits, wanted) + F.cross_entropy(second, decided)
        return {"loss": loss / 2, "logits": output.logits}

    def teach(self, teacher: Any, batch: Mapping[str, Tensor]) -> Any:
        """The output of ``teacher``, a model of the same task, for a batch."""
        return teacher(pixel_values=batch["pixel_values"])
