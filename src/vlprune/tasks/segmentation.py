"""Semantic segmentation with Segmenter."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..data.augment import distorted
from ..data.datasets.records import masked_image
from ..data.files import Left, open_image
from ..data.pictures import IGNORE, MaskedImage, open_mask, read_ade20k
from ..device import moved_to
from ..errors import DataError
from ..files import plain
from ..folders.opening import from_folder, open_config
from ..recipe.options import SegmentationOptions, TaskOptions
from .base import Advance, Task
from .new_models import vit_processor, vit_settings

__all__ = ["SegmentationTask", "windows"]

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class SegmentationTask(Task):
    """ADE20K's layout with a SegmenterForSemanticSegmentation; the metric is ``miou``.

    ``miou`` is the mean intersection over union over the whole test set, at one scale: the shorter
    side of an image is resized to the model's image size, and windows of that size slide over
    the image. Options: ``multi_scale`` adds ``miou_multi_scale`` (six scales, each also mirrored);
    ``classes`` is the number of classes of a new model (0: as many as the training masks have);
    ``augment`` trains on random crops at 0.5 to 2 times the size, mirrored half the time. One that
    has a single class, or a class that covers ``largest_class`` or more of it, is drawn again, up
    to ten times (1: it is not). ``distort`` trains on crops in other colours.
    """

    name: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "miou"
    takes: ClassVar[type[TaskOptions]] = SegmentationOptions
    train: Sequence[MaskedImage]
    test: Sequence[MaskedImage]
    item = staticmethod(masked_image)

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[MaskedImage]:
        return read_ade20k(part["images"], part["masks"], left)

    def new_processor(self) -> Any:
        return vit_processor(self.model_spec)

    def model_type(self) -> Any:
        from ..models import SegmenterForSemanticSegmentation

        return SegmenterForSemanticSegmentation

    def new_model(self) -> Any:
        from ..models import SegmenterConfig

        classes = self.options["classes"] or self.found_classes
        config = SegmenterConfig(**vit_settings(self.model_spec), num_labels=classes)
        return self.model_type()(config)

    def load(self, path: str | Path) -> Any:
        """The Segmenter in ``path``, or a new decoder on the encoder of the ViT there."""
        from transformers import ViTModel

        config = open_config(path)
        if config.model_type != "vit":
            return super().load(path)
        from ..models import SegmenterConfig

        classes = self.options["classes"] or self.found_classes
        sizes = {k: v for k, v in config.to_dict().items() if k in vit_settings(self.model_spec)}
        model = self.model_type()(SegmenterConfig(**sizes, num_labels=classes))
        encoder = from_folder(ViTModel, path, add_pooling_layer=False)
        model.vit.load_state_dict(encoder.state_dict())
        return model

    @cached_property
    def found_classes(self) -> int:
        """Number of classes in the training masks: the largest class number plus 1.

        Raises DataError for a stream, whose masks are not looked through.
        """
        if self.streaming:
            raise DataError("the masks of a stream are not counted: give options.classes")
        masks = (open_mask(item.mask) for item in self.train)
        return 1 + max(int(mask[mask != IGNORE].max(initial=0)) for mask in masks)

    @cached_property
    def known_classes(self) -> int:
        """Number of classes of the model that is trained."""
        if self.model_spec.path and self.model_config.model_type != "vit":
            return int(self.model_config.num_labels)
        return int(self.options["classes"] or self.found_classes)

    def _opened(self, item: MaskedImage, classes: int) -> tuple[Image.Image, np.ndarray]:
        """Image, and mask (height, width). Raises DataError for a class not below ``classes``."""
        image = open_image(item.image)
        mask = open_mask(item.mask, image.size)
        most = int(mask[mask != IGNORE].max(initial=0))
        if most >= classes:
            raise DataError(
                f"the mask {plain(item.mask)} holds the value {most + 1}, and the model has "
                f"{classes} classes: train with such a mask, or give options.classes"
            )
        return image, mask

    @property
    def side(self) -> int:
        """The side of a window, in pixels."""
        size = self.processor.size
        return int(size["height"] if "height" in size else size["shortest_edge"])

    def _tensor(self, image: Image.Image) -> Tensor:
        """(channels, height, width), normalised as the processor says."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, deviation = (
            torch.tensor(values)[:, None, None]
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return (pixels - mean) / deviation

    def collate(
        self, items: list[MaskedImage], rng: random.Random | None = None
    ) -> dict[str, Tensor]:
        return _stacked([self._crop(item, rng) for item in items])

    def training_batch(self, items: list[MaskedImage], rng: random.Random) -> dict[str, Tensor]:
        colours = rng if self.options["distort"] else None
        return _stacked([self._crop(item, rng, colours) for item in items])

    def _crop(
        self, item: MaskedImage, rng: random.Random | None, colours: random.Random | None = None
    ) -> tuple[Tensor, Tensor]:
        """A square of the window's size: pixels (3, side, side), labels (side, side)."""
        (image, mask), side = self._opened(item, self.known_classes), self.side
        moving = rng if self.options["augment"] else None
        zoom = moving.uniform(0.5, 2.0) if moving is not None else 1.0
        scale = zoom * side / min(image.size)
        width, height = (max(1, round(scale * length)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        labels = F.interpolate(
            torch.from_numpy(mask)[None, None].float(), (height, width), mode="nearest"
        )[0, 0].long()
        x, y = self._place(labels, moving)
        image = image.crop((x, y, min(width, x + side), min(height, y + side)))
        labels = labels[y : y + side, x : x + side]
        if moving is not None and moving.random() < 0.5:
            image, labels = ImageOps.mirror(image), labels.flip(-1)
        pixels = self._tensor(image if colours is None else distorted(image, colours))
        room = (0, side - pixels.shape[2], 0, side - pixels.shape[1])
        return F.pad(pixels, room), F.pad(labels, room, value=IGNORE)

    def _place(self, labels: Tensor, rng: random.Random | None) -> tuple[int, int]:
        """The upper left corner (x, y) of a crop: the middle one without ``rng``."""
        side, (height, width) = self.side, labels.shape
        left, top = max(0, width - side), max(0, height - side)
        if rng is None:
            return left // 2, top // 2
        x, y = rng.randint(0, left), rng.randint(0, top)
        most = self.options["largest_class"]
        for _ in range(10 if most < 1 else 0):
            seen = labels[y : y + side, x : x + side]
            counts = seen[seen != IGNORE].unique(return_counts=True)[1]
            if len(counts) > 1 and int(counts.max()) < most * int(counts.sum()):
                break
            x, y = rng.randint(0, left), rng.randint(0, top)
        return x, y

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        from torchmetrics.classification import MulticlassJaccardIndex  # takes seconds

        model.eval()
        metrics: dict[str, tuple[float, ...]] = {"miou": (1.0,)}
        if self.options["multi_scale"]:
            metrics["miou_multi_scale"] = SCALES
        scores = {
            name: MulticlassJaccardIndex(
                model.config.num_labels, average="macro", ignore_index=IGNORE
            )
            for name in metrics
        }
        for item in self.test:
            image, mask = self._opened(item, model.config.num_labels)
            truth = torch.from_numpy(mask)
            for name, scales in metrics.items():
                said = self._classes(model, image, scales, truth.shape)
                scores[name].update(said[None], truth[None])
            advance(1)
        return {name: float(score.compute()) for name, score in scores.items()}

    def _classes(
        self, model: Any, image: Image.Image, scales: Sequence[float], shape: Any
    ) -> Tensor:
        """The predicted class of every pixel, (height, width) as in ``shape``."""
        total = torch.zeros(1)
        for scale in scales:
            zoom = scale * self.side / min(image.size)
            size = [max(self.side, round(zoom * length)) for length in image.size]
            pixels = self._tensor(image.resize((size[0], size[1]), Image.Resampling.BILINEAR))
            for mirror in (False, True) if len(scales) > 1 else (False,):
                logits = self._slide(model, pixels.flip(-1) if mirror else pixels)
                logits = logits.flip(-1) if mirror else logits
                full = F.interpolate(logits[None], tuple(shape), mode="bilinear")[0]
                total = total + full.softmax(0).cpu()
        return total.argmax(0)

    def _slide(self, model: Any, pixels: Tensor) -> Tensor:
        """Logits (classes, height, width), averaged where windows overlap."""
        side, (_, height, width) = self.side, pixels.shape
        places = list(windows(height, width, side))
        stack = torch.stack([pixels[:, y : y + side, x : x + side] for y, x in places])
        logits = model(pixel_values=moved_to(model, stack)).logits
        patch = getattr(model.config, "patch_size", 0)
        per_patch = isinstance(patch, int) and patch > 0 and logits.shape[2] == -(-side // patch)
        size = [n * patch for n in logits.shape[2:]] if per_patch else [side, side]  # may overhang
        logits = F.interpolate(logits.float(), size, mode="bilinear").cpu()[..., :side, :side]
        total = torch.zeros(logits.shape[1], height, width)
        count = torch.zeros(height, width)
        for (y, x), window in zip(places, logits, strict=True):
            total[:, y : y + side, x : x + side] += window
            count[y : y + side, x : x + side] += 1
        return total / count

    @torch.no_grad()
    def predict(self, model: Any, items: list[MaskedImage]) -> list[str]:
        model.eval()
        said = []
        for item in items:
            image = open_image(item.image)
            classes = self._classes(model, image, (1.0,), (image.height, image.width))
            found, counts = classes.unique(return_counts=True)
            shares = counts.double() / classes.numel()
            named = zip(found.tolist(), shares.tolist(), strict=True)
            said.append(", ".join(f"class {c}: {share:.0%}" for c, share in named))
        return said


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of crops, from pixels and labels of each."""
    return {
        "pixel_values": torch.stack([pixels for pixels, _ in pairs]),
        "labels": torch.stack([labels for _, labels in pairs]),
    }


def windows(height: int, width: int, side: int) -> Iterator[tuple[int, int]]:
    """Upper left corners (y, x) of windows that cover the image; the last may overlap others."""
    for y in (*range(0, height - side, side), height - side):
        for x in (*range(0, width - side, side), width - side):
            yield y, x
