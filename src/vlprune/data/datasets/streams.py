"""Data sets that are read from their beginning, row by row, while a model trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Generic, NoReturn, TypeVar

from ...errors import DataError
from ...files import plain, reason
from ..files import Left, some
from ..images import size_of
from ..stored import Picture
from .columns import Found
from .rows import Place, Row, streamed_picture
from .tables import Make

__all__ = ["Stream"]

T = TypeVar("T")


@dataclass(frozen=True)
class Stream(Generic[T]):
    """The items of a ``datasets.IterableDataset``, over and over.

    There is no number of items and none can be looked up: :meth:`__len__`, :meth:`__iter__` and
    :meth:`__getitem__` raise DataError. ``buffer`` rows at a time are shuffled among each other (0:
    none), ``most`` rows are read before it begins again (0: all). ``contents`` tells one data set
    from another.
    """

    dataset: Any
    place: Place
    found: Mapping[str, Found]
    make: Make[T]
    buffer: int = 0
    most: int = 0
    contents: str = ""

    def endless(self, seed: int = 0) -> Iterator[T]:
        """The items, in an order that depends on ``seed`` alone. Rows without one are passed over.

        Every pass has another order. Raises DataError for a wrong value, for a stream that cannot
        be read, and for one in which no row is an item.
        """
        rows = self._rows
        if self.buffer:
            rows = rows.shuffle(seed=seed, buffer_size=self.buffer)
        for number in count():
            rows.set_epoch(number)
            left, any_item = Left(), False
            for item in self._pass(rows, left):
                any_item = True
                yield item
            if not any_item:
                some([], self.place.path, "row that can be used", left)

    def first(self, number: int, left: Left | None = None) -> list[T]:
        """The first items in their own order, at most ``number``; ``left`` counts rows without."""
        left = Left() if left is None else left
        found = list(islice(self._pass(self._rows, left), number))
        return some(found, self.place.path, "row that can be used", left)

    @property
    def _rows(self) -> Any:
        return self.dataset.take(self.most) if self.most else self.dataset

    def _pass(self, rows: Any, left: Left) -> Iterator[T]:
        """One pass, always through all shards: torch's workers share the batches, not the rows."""
        batches = rows.iter(batch_size=1)
        for number in count():
            try:
                batch = next(batches, None)
            except Exception as error:  # of parsers, of the network, of many kinds
                raise DataError(
                    f"cannot read on in {plain(self.place.name)}: {reason(error)}"
                ) from None
            if batch is None:
                return
            item = self.make(self._row(number, {name: own[0] for name, own in batch.items()}), left)
            if item is not None:
                yield item

    def _row(self, number: int, raw: Mapping[str, Any]) -> Row:
        stored = {}
        for name, one in self.found.items():
            if one.stored:
                where = f"{self.place.name}, row {number}, {one.column}"
                stored[name] = streamed_picture(self.place, raw.get(one.top), where)
        return Row.of(self.place, number, self.found, raw, stored, _measured)

    def __len__(self) -> int:
        self._refuse()

    def __iter__(self) -> Iterator[T]:
        self._refuse()

    def __getitem__(self, number: Any) -> Any:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DataError(
            f"{plain(self.place.name)} is a stream, and this needs a look at all training items: "
            "give data.streaming=false"
        )


def _measured(_row: int, picture: Picture) -> tuple[int, int]:
    return size_of(picture)
