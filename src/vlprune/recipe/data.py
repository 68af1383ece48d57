"""What a recipe says about its data, and whether the task can read that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Annotated

from ..errors import did_you_mean
from .checks import KEY, Checked, Flag, Number, OneOf, Text, Whole, checked
from .options import TASK_OPTIONS

__all__ = ["AugmentSpec", "DataSpec", "data_mistakes"]

MANY = 10**9
SCENES = 10**6
GIB = 1024
"""The most GiB of prepared pictures that a process may keep."""
TABLE = "dataset"
"""The format of Hugging Face datasets, whose columns a recipe may name."""

Place = tuple[str, ...]


POLICIES = ("blip", "timm")


@checked
class AugmentSpec(Checked):
    """Random changes of the pictures of a training batch; by default there are none.

    ``crop`` is the least fraction of the area that a random crop keeps, whose sides are to each
    other as 3 to 4, or less far apart; it is scaled to the size that the model reads (0: no crop).
    ``mirror`` mirrors half of the pictures. RandAugment (Cubuk et al., NeurIPS 2020) follows:
    ``operations`` times an operation from the list of ``policy``, each left out half of the time,
    with a strength drawn around ``magnitude`` with the standard deviation ``deviation``.
    """

    crop: Annotated[float, Number(0, 1)] = 0.0
    mirror: Annotated[bool, Flag()] = False
    operations: Annotated[int, Whole(0, 16)] = 0
    magnitude: Annotated[float, Number(0, 10)] = 5.0
    deviation: Annotated[float, Number(0, 10)] = 0.0
    policy: Annotated[str, OneOf(*POLICIES)] = "blip"

    @property
    def on(self) -> bool:
        """Whether anything is changed."""
        return bool(self.crop or self.mirror or self.operations)


@checked
class DataSpec(Checked):
    """Which data.

    ``format`` is one that the task reads (docs/recipes.md lists them), with ``train`` and
    ``test`` naming the files of each split, or ``folder`` where all lies in one place. The
    format ``shapes`` generates ``train_items`` and ``test_items`` scenes into ``folder`` and
    reads them as the format ``like`` (default: the task's first). 0 items means all.
    ``$NAME`` is replaced from the environment.

    The format ``dataset`` reads a Hugging Face dataset. ``columns`` maps the task's own names to
    the columns that hold them, where the two differ. With ``streaming`` the training split is read
    from its beginning while it is trained on, shuffled among ``shuffle_buffer`` rows at a time (0:
    in its own order). ``pixel_cache`` is how many GiB of prepared pictures each process keeps.
    ``augment`` changes the pictures of training batches at random.
    """

    format: Annotated[str, Text(1)] = "shapes"
    like: Annotated[str, Text()] = ""
    folder: Annotated[str, Text()] = ""
    train: Mapping[Annotated[str, Text(1)], Annotated[str, Text(1)]] = field(default_factory=dict)
    test: Mapping[Annotated[str, Text(1)], Annotated[str, Text(1)]] = field(default_factory=dict)
    columns: Mapping[Annotated[str, Text(1)], Annotated[str, Text(1)]] = field(default_factory=dict)
    train_items: Annotated[int, Whole(0, MANY)] = 0
    test_items: Annotated[int, Whole(0, MANY)] = 0
    streaming: Annotated[bool, Flag()] = False
    shuffle_buffer: Annotated[int, Whole(0, 10**6)] = 1000
    pixel_cache: Annotated[float, Number(0, GIB)] = 2.0
    augment: AugmentSpec = field(default_factory=AugmentSpec)

    def conflicts(self) -> Iterable[tuple[Place, str]]:
        """Scenes are generated, so their number is bounded by the disk; only tables stream."""
        for name in ("train_items", "test_items"):
            items = getattr(self, name)
            if self.format == "shapes" and items and not 2 <= items <= SCENES:
                yield (name,), f"{KEY} must be from 2 to {SCENES:,} generated scenes, not {items:,}"
        for name in ("columns", "streaming"):
            if getattr(self, name) and self.format != TABLE:
                yield (name,), f"{KEY} is only for data.format: {TABLE}"
        if self.streaming and not self.test_items:
            text = "must be at least 1 with streaming, since the test items are held in memory"
            yield ("test_items",), f"{KEY} {text}, as in 1000"


def data_mistakes(task: str, data: DataSpec) -> Iterator[tuple[Place, str]]:
    """The mistakes: a format that the task does not read, and unknown or missing keys.

    Pictures with boxes, masks or a chat about them are not augmented: a crop or a mirror image
    would have to change these, too.
    """
    takes = TASK_OPTIONS[task]
    if data.augment.on and not takes.augments:
        able = ", ".join(name for name, one in sorted(TASK_OPTIONS.items()) if one.augments)
        yield ("augment",), f"{KEY} is only for {able}"
    known = OneOf("shapes", *sorted(takes.formats))
    for name, value in (("format", data.format), ("like", data.like)):
        if value not in known.words and (value or name == "format"):
            yield (name,), known.refuses(value)
    if data.format not in takes.formats:
        return
    needs, also = takes.formats[data.format], takes.also.get(data.format, ())
    may = (*needs, *also, *takes.optional.get(data.format, ()))
    for split, part in (("train", data.train), ("test", data.test)):
        for key in part:
            if key not in may:
                text = f"unknown key '{KEY}': {data.format} reads {', '.join(may)}."
                yield (split, key), text + did_you_mean(key, may)
        wanted = (*needs, *also) if any(key in part for key in also) else needs
        missing = [key for key in wanted if key not in part]
        if missing and (part or not data.folder):
            text = f"{KEY} is missing: the format {data.format} reads {', '.join(wanted)}"
            yield (split, missing[0]), text
    for name in data.columns:
        if name not in takes.columns:
            names = [*takes.columns]
            text = f"unknown key '{KEY}': {task} reads {', '.join(names)}."
            yield ("columns", name), text + did_you_mean(name, names)
