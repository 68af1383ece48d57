"""What a task is: data, a model class, a loss that the model computes, and a metric."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import from_folder, model_class, open_config, open_processor
from ..data.files import open_image
from ..data.layouts import GENERATED, STANDARD, splits
from ..data.shapes import write_shapes
from ..errors import DataError, RecipeError, did_you_mean
from ..recipe import DataSpec, ModelSpec

__all__ = ["PixelCache", "Task"]

Advance = Callable[[int], None]


class Task(ABC):
    """One task on one data set.

    ``train`` and ``test`` are sequences of items that :meth:`collate` turns into the keywords
    of one forward pass. ``metric`` names the entry of :meth:`evaluate` that counts. ``formats``
    maps each format to what a recipe must name for a split; ``defaults`` are the task's own
    options and their values; ``objects`` is the most that a generated scene may hold.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    formats: ClassVar[Mapping[str, tuple[str, ...]]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    objects: ClassVar[int] = 3
    train: Sequence[Any]
    test: Sequence[Any]
    processor: Any

    def __init__(
        self,
        model: ModelSpec,
        data: DataSpec,
        folder: Path,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model_spec = model
        self.options = self._options(options or {})
        self._load_data(data, folder)
        self.prepare()
        self.processor = self._processor()
        self.pixels = PixelCache(getattr(self.processor, "image_processor", self.processor))

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for name, value in given.items():
            if name not in self.defaults:
                raise RecipeError(
                    f"the task {self.name} has no option {name!r}."
                    f"{did_you_mean(name, self.defaults)}"
                )
            want = type(self.defaults[name])
            good = isinstance(value, (int, float) if want is float else want)
            if not good or isinstance(value, bool) != (want is bool):
                raise RecipeError(
                    f"options.{name} must be like {self.defaults[name]!r}, not {value!r}"
                )
        return {**self.defaults, **given}

    def _load_data(self, data: DataSpec, folder: Path) -> None:
        """Fill ``train`` and ``test``; ``folder`` is where generated data may be written."""
        known = (*self.formats, "shapes")
        form = data.like or next(f for f in self.formats if f in GENERATED)
        for value in (data.format, form):
            if value not in known:
                raise RecipeError(
                    f"the task {self.name} reads {', '.join(sorted(known))}, not {value!r}."
                    f"{did_you_mean(value, known)}"
                )
        if data.format == "shapes":
            form = form if form in GENERATED else next(f for f in self.formats if f in GENERATED)
            root = write_shapes(
                data.folder or folder,
                data.train_items or 2000,
                data.test_items or 400,
                most=self.objects,
            )
            train, test = splits(GENERATED[form], root)
        else:
            form = data.format
            train, test = dict(data.train), dict(data.test)
            if not train and not test and data.folder and form in STANDARD:
                train, test = splits(STANDARD[form], Path(data.folder))
        for split, part in (("train", train), ("test", test)):
            missing = [key for key in self.formats[form] if key not in part]
            if missing:
                raise DataError(
                    f"the format {form} also needs {', '.join(missing)} for each split: "
                    f"give data.{split}.{missing[0]}"
                    + (", or data.folder" if form in STANDARD else "")
                )
        self.train, self.test = self.read(form, train), self.read(form, test)
        if data.format != "shapes":  # there, the numbers say how many scenes to generate
            self.train = self.train[: data.train_items or None]
            self.test = self.test[: data.test_items or None]
        if not self.train or not self.test:
            raise DataError("the data set has no training items or no test items")

    @abstractmethod
    def read(self, form: str, part: Mapping[str, str]) -> list[Any]:
        """The items of one split of the format ``form``."""

    def prepare(self) -> None:
        """Work out what must be known about the data before there is a model."""
        return

    def objective(self, model: Any) -> nn.Module:
        """What is trained: a module whose forward returns the loss, the model or one around it."""
        return model

    @abstractmethod
    def new_processor(self) -> Any:
        """A processor for a small new model."""

    @abstractmethod
    def new_model(self) -> Any:
        """A small new model of the task's class."""

    @abstractmethod
    def model_type(self) -> Any:
        """The class that ``model.path`` is loaded with."""

    @abstractmethod
    def collate(self, items: list[Any], rng: random.Random | None = None) -> dict[str, Any]:
        """The keywords of one training forward pass.

        ``rng`` decides whatever is random about it (which caption, which crop), so that a run
        that is stopped and resumed sees the same batches; without it nothing is random.
        """

    @abstractmethod
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        """Metrics on ``test``, as fractions; ``advance`` is called with items done."""

    @abstractmethod
    def predict(self, model: Any, items: list[Any]) -> list[str]:
        """What the model says about each item, for a person to compare."""

    def results(self, model: Any) -> list[dict[str, Any]]:
        """What the model says about each test item, as the task's evaluation server takes it."""
        said: list[str] = []
        for start in range(0, len(self.test), 64):
            said += self.predict(model, list(self.test[start : start + 64]))
        return [self.result(item, text) for item, text in zip(self.test, said, strict=True)]

    def result(self, item: Any, said: str) -> dict[str, Any]:
        """One entry of :meth:`results`."""
        return {"item": str(getattr(item, "image", getattr(item, "id", ""))), "prediction": said}

    def load(self, path: str | Path) -> Any:
        """The model in a folder or on the hub, for this task."""
        return from_folder(self.model_type(), path)

    def load_by_name(self, path: str | Path) -> Any:
        """The model in a folder or on the hub, by the class that its config names."""
        return from_folder(model_class(open_config(path).to_dict(), path), path)

    def start_token(self) -> int:
        """The token that begins what a decoder says."""
        if not self.model_spec.path:
            return int(self.processor.tokenizer.bos_token_id)
        return int(self.model_config.get_text_config().bos_token_id)

    @cached_property
    def model_config(self) -> Any:
        """The config in ``model.path``, read once: tasks ask for the start token in every batch."""
        return open_config(self.model_spec.path)

    def _processor(self) -> Any:
        if not self.model_spec.path:
            return self.new_processor()
        return open_processor(self.model_spec.path)

    def dense_model(self) -> Any:
        """The model to be compressed."""
        if not self.model_spec.path:
            return self.new_model()
        return self.load(self.model_spec.path)

    def example_inputs(self, batch_size: int = 1) -> dict[str, Tensor]:
        """Inputs of one forward pass, from the test data."""
        items = [self.test[i % len(self.test)] for i in range(batch_size)]
        return self.collate(items)


class PixelCache:
    """Pixel values of images by path; keeps as many as fit in ``limit`` bytes."""

    def __init__(self, image_processor: Any, limit: int = 2 * 1024**3) -> None:
        self.image_processor = image_processor
        self.room = limit
        self.kept: dict[Path, Tensor] = {}

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """(images, channels, height, width), float32."""
        return torch.stack([self._one(path) for path in paths])

    def _one(self, path: Path) -> Tensor:
        found = self.kept.get(path)
        if found is None:
            image: Image.Image = open_image(path)
            found = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
            size = found.numel() * found.element_size()
            if size <= self.room:
                self.room -= size
                self.kept[path] = found
        return found
