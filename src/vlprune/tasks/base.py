"""The base class of tasks: data, a model class, a loss that the model computes, and a metric."""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..data.augment import augmented
from ..data.datasets.rows import Row
from ..data.datasets.sources import Asked, class_names, open_rows, open_stream
from ..data.datasets.streams import Stream
from ..data.datasets.tables import Rows
from ..data.files import Left, listed
from ..data.layouts import GENERATED, STANDARD, splits
from ..data.shapes.write import write_shapes
from ..errors import DataError, RecipeError, did_you_mean
from ..files import plain
from ..folders.opening import from_folder, model_class, open_config, open_processor
from ..recipe.options import TaskOptions
from ..recipe.spec import DataSpec, ModelSpec
from .pixels import PixelCache

__all__ = ["Task"]

Advance = Callable[[int], None]


class Task(ABC):
    """One task on one data set.

    ``train`` and ``test`` are sequences of items that :meth:`collate` turns into the keyword
    arguments of one forward pass. ``metric`` names the main metric among those of
    :meth:`evaluate`; ``objects`` is the largest number of objects in a generated scene. ``takes``
    declares the ``options`` of the task, and ``formats``, which maps each data format to the keys
    that a split must give.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    takes: ClassVar[type[TaskOptions]] = TaskOptions
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
        self.formats = self.takes.formats
        self.options = asdict(self.takes(**(options or {})))
        self._load_data(data, folder)
        self.prepare()
        self.processor = self._processor()
        self.pixels = PixelCache(
            getattr(self.processor, "image_processor", self.processor),
            round(data.pixel_cache * 1024**3),
        )
        self.augment = data.augment
        if self.augment.crop and self.pixels.size is None:
            raise RecipeError(
                "data.augment.crop must be 0 for this model, which reads pictures of any size"
            )

    def _load_data(self, data: DataSpec, folder: Path) -> None:
        """Fill ``train`` and ``test``; generated data go to ``data.folder``, else to ``folder``."""
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
        self.left = {"train": Left(), "test": Left()}
        if form == "dataset":
            self._open_datasets(data)
        else:
            self.train = self.read(form, train, self.left["train"])
            self.test = self.read(form, test, self.left["test"])
        if data.format not in ("shapes", "dataset"):  # these have no more items than that
            self.train = self.train[: data.train_items or None]
            self.test = self.test[: data.test_items or None]
        lists = [("test", self.test), *([] if self.streaming else [("train", self.train)])]
        if not all(items for _, items in lists):
            raise DataError("the data set has no training items or no test items")
        for split, items in reversed(lists):
            check_images(split, [path for item in items for path in images_of(item)])

    def _open_datasets(self, data: DataSpec) -> None:
        """Fill ``train`` and ``test`` from Hugging Face datasets."""
        train, test = (
            Asked(part, given["path"], given.get("name", ""), given.get("split", ""), data.columns)
            for part, given in (("train", data.train), ("test", data.test))
        )
        wanted, make = self.takes.columns, self.item
        if data.streaming:
            stream = open_stream(train, wanted, make, data.shuffle_buffer, data.train_items)
            self.train = stream  # type: ignore[assignment]  # it refuses what it cannot do
            self.test = open_stream(test, wanted, make).first(data.test_items, self.left["test"])
        else:
            self.train = open_rows(train, wanted, make, self.left["train"], data.train_items)
            self.test = open_rows(test, wanted, make, self.left["test"], data.test_items)

    @property
    def streaming(self) -> bool:
        """Whether ``train`` is a :class:`~vlprune.data.streams.Stream`."""
        return isinstance(self.train, Stream)

    def first_train(self, number: int) -> Sequence[Any]:
        """The first training items, at most ``number``."""
        train: Any = self.train
        found: Sequence[Any] = train.first(number) if self.streaming else train[:number]
        return found

    def class_names(self, column: str) -> list[str] | None:
        """The classes of a column of the training set, where the set itself lists them in order.

        Raises DataError for a stream that does not, since it is not looked through.
        """
        train: Any = self.train
        listed = class_names(train, column) if isinstance(train, Rows | Stream) else None
        if listed is None and self.streaming:
            raise DataError(
                "the stream of data.train does not list its classes (a column of the feature "
                "ClassLabel does): store the labels so, or give data.streaming=false"
            )
        return listed

    @property
    def left_out(self) -> str:
        """A sentence about the data that are not used, and why; empty if all are used."""
        parts = [f" of data.{split}: {listed(left)}" for split, left in self.left.items() if +left]
        return f"left out{';'.join(parts)}" if parts else ""

    def facts(self) -> dict[str, Any]:
        """Facts about the data for the report: items of each split, and entries left out.

        A stream has no number of items, which is then None.
        """
        items = {"train": None if self.streaming else len(self.train), "test": len(self.test)}
        return {
            split: {"items": items[split], "left_out": dict(+left)}
            for split, left in self.left.items()
        }

    @abstractmethod
    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[Any]:
        """The items of one split in the format ``form``; ``left`` counts the entries left out."""

    @staticmethod
    def item(row: Row, left: Left) -> Any:
        """The item in a row of a dataset; None, counted in ``left``, for one that is left out.

        Only tasks with the format ``dataset`` are asked.
        """
        raise NotImplementedError

    def contents(self) -> dict[str, Any]:
        """What the files say that options name, by option: a resumed run notices other contents."""
        return {}

    def prepare(self) -> None:
        """Derive facts from the data that the processor and the model need, such as the classes."""
        return

    def objective(self, model: Any) -> nn.Module:
        """The module to train, whose forward returns the loss: the model, or a module around it."""
        return model

    @abstractmethod
    def new_processor(self) -> Any:
        """A processor for a small new model."""

    @abstractmethod
    def new_model(self) -> Any:
        """A small new model of the task's class."""

    @abstractmethod
    def model_type(self) -> Any:
        """The model class that loads ``model.path``."""

    @abstractmethod
    def collate(self, items: list[Any], rng: random.Random | None = None) -> dict[str, Any]:
        """The keyword arguments of one training forward pass.

        ``rng`` makes every random choice (which caption, which crop), so that a run that is
        stopped and resumed sees the same batches; without ``rng`` nothing is random.
        """

    def training_batch(self, items: list[Any], rng: random.Random) -> dict[str, Any]:
        """As :meth:`collate`, of items that are changed at random as the recipe says.

        Only what a model trains on is changed: no test item, and none that a search or a
        calibration looks at.
        """
        return self.collate([self.changed(item, rng) for item in items], rng)

    def changed(self, item: Any, rng: random.Random) -> Any:
        """The training item, its pictures changed as ``data.augment`` says."""
        return augmented(item, self.augment, rng) if self.augment.on else item

    @abstractmethod
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        """Metrics on ``test``, as fractions; ``advance`` gets the number of items of each step."""

    @abstractmethod
    def predict(self, model: Any, items: list[Any]) -> list[str]:
        """The model's output for each item as text, for a person to compare."""

    def results(self, model: Any) -> list[dict[str, Any]]:
        """The model's output for each test item, in the format of the task's evaluation server."""
        said: list[str] = []
        for start in range(0, len(self.test), 64):
            said += self.predict(model, list(self.test[start : start + 64]))
        return [self.result(item, text) for item, text in zip(self.test, said, strict=True)]

    def result(self, item: Any, said: str) -> dict[str, Any]:
        """One entry of :meth:`results`."""
        return {"item": str(getattr(item, "image", getattr(item, "id", ""))), "prediction": said}

    def load(self, path: str | Path) -> Any:
        """The model in a folder or on the hub, loaded for this task."""
        return from_folder(self.model_type(), path)

    def load_by_name(self, path: str | Path) -> Any:
        """The model in a folder or on the hub, loaded as the class that its config names."""
        return from_folder(model_class(open_config(path).to_dict(), path), path)

    def start_token(self) -> int:
        """Id of the token with which the decoder's text begins."""
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
        """The model to compress: the one in ``model.path``, or a small new one."""
        if not self.model_spec.path:
            return self.new_model()
        return self.load(self.model_spec.path)

    def example_inputs(self, batch_size: int = 1) -> dict[str, Tensor]:
        """Inputs of one forward pass, from the test data; items repeat if there are too few."""
        items = [self.test[i % len(self.test)] for i in range(batch_size)]
        return self.collate(items)


def images_of(item: Any) -> tuple[Path, ...]:
    """The paths of an item's pictures, and of its mask if it has one."""
    paths = getattr(item, "images", None) or (
        getattr(item, "image", None),
        getattr(item, "mask", None),
    )
    return tuple(path for path in paths if isinstance(path, Path))


def check_images(split: str, paths: Sequence[Path]) -> None:
    """Raise DataError now for missing pictures, not when training first opens one of them.

    Each folder is listed once, which takes less time than asking for every file.
    """
    wanted: dict[Path, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        wanted[path.parent].append(path)
    missing: list[Path] = []
    for folder, own in wanted.items():
        try:
            there = set(os.listdir(folder))
        except (OSError, ValueError):
            there = set()
        # the file system may still find names that differ in case or Unicode form
        missing += [path for path in own if path.name not in there and not os.path.isfile(path)]
    if missing:
        count = sum(map(len, wanted.values()))
        raise DataError(
            f"{len(missing):,} of the {count:,} images of data.{split} are missing, as "
            f"{plain(missing[0])}: give the right folder, restore them, or remove their entries"
        )
