"""Data sets as tables on disk: items are made from their rows when they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Generic, TypeVar, overload

from ...errors import DataError
from ...files import plain, reason
from ..files import Left, some
from ..images import size_of
from ..stored import ONLY, Picture, TablePicture
from .columns import Found
from .rows import Part, Place, Row, Stored

__all__ = ["Make", "Rows", "Table"]

T = TypeVar("T")
Make = Callable[[Row, Left], T | None]
"""From a row to an item; None, counted in the second argument, for a row that is left out."""

BATCH = 1000
"""Rows that are turned into Python values together."""


class Table:
    """The columns of a ``datasets.Dataset`` that a task reads.

    Rows are read from the Arrow table, which is mapped from disk, and only those columns that were
    ``found``. The bytes of a picture are not touched before the picture is opened.
    """

    def __init__(self, dataset: Any, place: Place, found: Mapping[str, Found]) -> None:
        self.place, self.found, self.length = place, found, len(dataset)
        self.stored = {name: one.top for name, one in found.items() if one.stored}
        plain_columns = sorted({one.top for one in found.values() if not one.stored})
        self._plain = _arrow(dataset, plain_columns)
        self._pictures = _arrow(dataset, sorted({*self.stored.values()}))
        self._sizes = array("i")

    @property
    def name(self) -> str:
        """The name of the data set, for messages."""
        return self.place.name

    def __len__(self) -> int:
        return self.length

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows from ``start`` to ``stop``. Raises DataError for a table that is damaged."""
        try:
            values: list[dict[str, Any]] = [{}] * (stop - start)
            if self._plain is not None:
                values = self._plain[start:stop].to_pylist()
            pictures = {name: [*self._seen(name, start, stop)] for name in self.stored}
        except DataError:
            raise
        except Exception as error:  # pyarrow's, of many kinds
            raise DataError(
                f"cannot read the rows {start} to {stop - 1} of {plain(self.name)}: {reason(error)}"
            ) from None
        for i, raw in enumerate(values):
            stored = {name: own[i] for name, own in pictures.items()}
            yield Row.of(self.place, start + i, self.found, raw, stored, self.measured)

    def measured(self, row: int, picture: Picture) -> tuple[int, int]:
        """The (width, height) of a row's picture, which is opened the first time only."""
        sizes = self._sizes
        if not sizes:
            sizes.frombytes(bytes(2 * self.length * sizes.itemsize))
        if not sizes[2 * row]:
            sizes[2 * row : 2 * row + 2] = array("i", size_of(picture))
        return sizes[2 * row], sizes[2 * row + 1]

    def _seen(self, name: str, start: int, stop: int) -> Iterator[Stored]:
        """Handles of the pictures in a column: bytes in the table, or files at their paths."""
        column = self.stored[name]
        cells = self._pictures[start:stop].column(column)
        if not _is_list(cells.type):
            told = zip(*_empty_and_paths(cells), strict=True)
            for row, (empty, path) in enumerate(told, start):
                yield self._handle(column, row, ONLY, empty, path)
            return
        for row in range(start, stop):
            inner = cells[row - start].values
            if inner is None:
                yield ()
                continue
            several = zip(*_empty_and_paths(inner), strict=True)
            yield tuple(
                picture
                for index, (empty, path) in enumerate(several)
                if (picture := self._handle(column, row, index, empty, path)) is not None
            )

    def _handle(
        self, column: str, row: int, index: int, empty: bool, path: str | None
    ) -> Picture | None:
        if not empty:
            base = str(path or "").replace("\\", "/").rpartition("/")[2]
            return TablePicture(self, column, row, base, index)
        if path:
            return self.place.picture(path, f"{plain(self.name)}, row {row}, {column}")
        return None

    def stored_bytes(self) -> int:
        """The bytes of all pictures that the table itself holds."""
        import pyarrow.compute as pc

        total = 0
        for column in {*self.stored.values()}:
            for start in range(0, self.length, BATCH):
                cells = self._bytes(column, start, start + BATCH)
                total += pc.sum(pc.binary_length(cells)).as_py() or 0
        return total

    def _bytes(self, column: str, start: int, stop: int) -> Any:
        import pyarrow.compute as pc
        import pyarrow.types as types

        cells = self._pictures[start:stop].column(column)
        if _is_list(cells.type):
            cells = pc.list_flatten(cells)
        return pc.struct_field(cells, "bytes") if types.is_struct(cells.type) else cells

    def open_bytes(self, column: str, row: int, index: int = ONLY) -> BinaryIO:
        """The bytes of a picture, open for reading, where the table has them."""
        import pyarrow

        cells = self._bytes(column, row, row + 1)
        file: BinaryIO = pyarrow.BufferReader(cells[max(index, 0)].as_buffer())
        return file


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    found: bool = types.is_list(kind) or types.is_large_list(kind)
    return found


def _empty_and_paths(cells: Any) -> tuple[list[bool], list[Any]]:
    """For each picture, whether it has no bytes, and its path."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    if not types.is_struct(cells.type):
        return cells.is_null().to_pylist(), [None] * len(cells)
    names = [cells.type.field(i).name for i in range(cells.type.num_fields)]
    paths = pc.struct_field(cells, "path").to_pylist() if "path" in names else [None] * len(cells)
    return pc.struct_field(cells, "bytes").is_null().to_pylist(), paths


def _arrow(dataset: Any, columns: list[str]) -> Any:
    return dataset.select_columns(columns).with_format("arrow") if columns else None


class Rows(Sequence[T], Generic[T]):
    """The items of a table, made from their rows when they are asked for.

    All rows are read once, without their pictures, to find wrong values and those that are left
    out, which ``left`` counts; ``most`` ends that once so many items are found (0: never). Raises
    DataError for a wrong value, and if no row is an item.
    """

    def __init__(self, table: Table, make: Make[T], left: Left, most: int = 0) -> None:
        self.table, self.make = table, make
        kept = array("q")
        for row in _all(table):
            if make(row, left) is not None:
                kept.append(row.number)
                if len(kept) == most:
                    break
        some(list(kept[:1]), table.place.path, "row that can be used", left)
        whole = kept[-1] == len(kept) - 1
        self.kept: Sequence[int] = range(len(kept)) if whole else kept

    def __len__(self) -> int:
        return len(self.kept)

    @overload
    def __getitem__(self, number: int) -> T: ...

    @overload
    def __getitem__(self, number: slice) -> Part[T]: ...

    def __getitem__(self, number: int | slice) -> T | Part[T]:
        if isinstance(number, slice):
            return Part(self, range(len(self))[number])
        row = self.kept[number]
        return self._item(next(self.table.rows(row, row + 1)))

    def __iter__(self) -> Iterator[T]:
        """All items in order, read many at a time."""
        wanted = iter(self.kept)
        number = next(wanted, None)
        for row in _all(self.table):
            if number is None:
                return
            if row.number == number:
                yield self._item(row)
                number = next(wanted, None)

    def _item(self, row: Row) -> T:
        item = self.make(row, Left())
        assert item is not None  # else it would not be among those that are kept
        return item


def _all(table: Table) -> Iterator[Row]:
    for start in range(0, len(table), BATCH):
        yield from table.rows(start, min(start + BATCH, len(table)))
