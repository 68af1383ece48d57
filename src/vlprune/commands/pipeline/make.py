"""Making what a recipe names: its task, its method, its held-out batches, its dense model."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.captions import EachCaption
from ...data.datasets.rows import Part
from ...data.datasets.streams import Stream
from ...device import place
from ...errors import UnsupportedError
from ...folders.opening import guarded
from ...methods import METHODS, Method
from ...recipe.spec import Recipe
from ...tasks import TASKS, Task

__all__ = [
    "CalibrationBatches",
    "HeldOut",
    "in_fresh_memory",
    "make_method",
    "make_task",
    "model_from",
    "new_model",
    "split",
]

HELD_OUT = 0.05
"""The fraction of the training items that a search learns from and does not train on."""
LOOK = 16
"""Items in a held-out batch: a quarter of a training batch, but no fewer than these, or all of it.

Such a batch costs as much as its share of a training step, and a short search looks at one every
few steps.
"""


def make_task(recipe: Recipe, folder: Path) -> Task:
    """The task of a recipe, with its data loaded.

    Raises the errors of the task's readers, and UnsupportedError if the processor of ``model.path``
    cannot make a batch of that data.
    """
    task = TASKS[recipe.task](recipe.model, recipe.data, folder, recipe.options)
    if recipe.model.path:
        with guarded(recipe.model.path, f"make batches for {recipe.task} with", UnsupportedError):
            task.example_inputs(1)
    return task


def make_method(options: Mapping[str, Any], round_to: int | None = None) -> Method:
    """The method of a recipe, whose name and options the recipe has checked.

    ``round_to`` replaces the option of that name.
    """
    chosen = dict(options)
    if round_to is not None:
        chosen["round_to"] = round_to
    cls: Any = METHODS[chosen.pop("name")]
    return cls(**chosen)


class HeldOut(Sequence[Any]):
    """Batches of items that the search does not train on, collated on access."""

    def __init__(self, task: Task, items: Sequence[Any], batch_size: int) -> None:
        self.task, self.items, self.batch_size = task, items, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.batch_size)

    def __getitem__(self, number: Any) -> Any:
        start = number * self.batch_size
        batch = list(self.items[start : start + self.batch_size])
        return self.task.collate(batch, random.Random(f"held out/{number}"))


class CalibrationBatches(Sequence[Any]):
    """Training items as the model takes them, drawn by the recipe's seed and collated on access.

    Of a stream, they are the first ones.

    Nothing in a batch is random, so that a run that is resumed sees the same numbers.
    """

    def __init__(self, task: Task, recipe: Recipe) -> None:
        self.task, self.size = task, recipe.calibration.batch_size
        train: Any = task.train
        if isinstance(train, Stream):
            self.items: Sequence[Any] = train.first(recipe.calibration.items)
            self.chosen: Sequence[int] = range(len(self.items))
            return
        order = list(range(len(train)))
        random.Random(f"{recipe.seed}/calibration").shuffle(order)
        self.items, self.chosen = train, order[: recipe.calibration.items]

    def __len__(self) -> int:
        return math.ceil(len(self.chosen) / self.size)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):  # what ends a loop over a sequence
            raise IndexError(number)
        start = number * self.size
        return self.task.collate([self.items[i] for i in self.chosen[start : start + self.size]])


def split(task: Task, recipe: Recipe) -> tuple[Sequence[Any], HeldOut]:
    """The training items, split: 95 % to train on, the rest in held-out batches for the search.

    An image is held out with all its captions.
    """
    train = task.train
    groups: Sequence[Sequence[int]] = (
        train.groups() if isinstance(train, EachCaption) else [(n,) for n in range(len(train))]
    )
    order = list(range(len(groups)))
    random.Random(f"{recipe.seed}/held out").shuffle(order)
    count = max(1, round(HELD_OUT * len(order)))
    aside, rest = (
        [item for number in sorted(part) for item in groups[number]]
        for part in (order[:count], order[count:])
    )
    items = Part(task.train, aside)
    trained = recipe.search.batch_size
    size = min(trained, len(items), max(LOOK, trained // 4))
    return Part(task.train, rest), HeldOut(task, items, size)


def new_model(task: Task, device: torch.device) -> Any:
    """The dense model as the recipe describes it, on the device.

    Its config names the dtype of its parts, as ``from_pretrained`` would: a resumed run loads the
    model instead, and both must save the same ``config.json``.
    """
    model = task.dense_model()
    for name in getattr(model.config, "sub_configs", ()):
        part = getattr(model.config, name, None)
        if part is not None:
            part.dtype = model.dtype
    return place(in_fresh_memory(model), device)


def model_from(folder: Path, task: Task, device: torch.device) -> Any:
    """The model that an earlier run of the recipe saved in ``folder``, on the device."""
    return place(in_fresh_memory(task.load(folder)), device)


def in_fresh_memory(model: Any) -> Any:
    """The same model, its weights where torch puts new tensors.

    A loaded file is mapped, so weights begin at any address. Kernels then sum in another order, and
    a resumed training would differ in its last bits from the one it continues.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model
