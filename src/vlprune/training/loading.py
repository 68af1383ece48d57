"""Training items for the Trainer's loader: looked up by number, or taken from a stream."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import VlpruneError
from ..recipe.spec import Training

__all__ = ["Collate", "Endless", "Items", "Numbered", "Seeded", "as_it_was", "length"]

Collate = Callable[[list[Any], random.Random], Any]


@runtime_checkable
class Endless(Protocol):
    """Items without a number, in an order that depends on a seed alone."""

    def endless(self, seed: int = 0) -> Iterator[Any]:
        """The items from the first on, over and over."""


def length(items: Sequence[Any] | Endless) -> int:
    """The number of items; 0 for a stream, which trains by steps alone."""
    return 0 if isinstance(items, Endless) else len(items)


class Items(Dataset[tuple[int, Any]]):
    """A sequence as a torch data set of (number, item)."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        return number, self.items[number]


class Numbered(IterableDataset[tuple[int, Any]]):
    """A stream as a torch data set of (number, item), from step ``done`` on.

    Every process reads all of the stream, and accelerate gives each its part of every batch; every
    worker of a loader, too, reads all of it, and passes on each batch that is its turn. So batches
    are the same whatever the number of workers. Items that are passed over are not decoded.
    """

    def __init__(
        self, stream: Endless, seed: int, spec: Training, processes: int, done: int = 0
    ) -> None:
        self.stream, self.seed = stream, seed
        self.together = spec.batch_size * processes
        self.start = done * spec.accumulate * self.together

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        numbered = enumerate(self.stream.endless(self.seed))
        for number, item in islice(numbered, self.start, None):
            if (number - self.start) // self.together % workers == turn:
                yield number, item


def as_it_was(error: VlpruneError) -> VlpruneError:
    """The error itself; for one that torch has brought from a worker, the error raised there.

    torch puts the worker's traceback into the message, which ends with the error's own text.
    """
    text, kind = str(error), type(error)
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.\n", text):
        return error
    return kind(text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())


class Seeded:
    """A collator whose randomness depends on the seed and the batch's item numbers only."""

    def __init__(self, collate: Collate, seed: int) -> None:
        self.collate, self.seed = collate, seed

    def __call__(self, rows: list[tuple[int, Any]]) -> Any:
        numbers = ",".join(str(number) for number, _ in rows)
        return self.collate([item for _, item in rows], random.Random(f"{self.seed}/{numbers}"))
