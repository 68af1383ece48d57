"""One row of a data set, read by the names of a task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, overload

from ...errors import DataError
from ...files import plain
from ..files import each, field, hidden, optional
from ..kinds import COUNT, ID, PATH, Entry, Id, Kind
from ..stored import Picture, RemotePicture, StreamedPicture
from .columns import Found

__all__ = ["Part", "Place", "Row", "Stored", "streamed_picture"]

T = TypeVar("T")
Measure = Callable[[int, Picture], tuple[int, int]]
Stored = Picture | None | tuple[Picture, ...]
"""What a row has in a column of stored pictures: one, none, or those of a list."""
REMOTE = ("hf://", "https://huggingface.co/")


@dataclass(frozen=True)
class Place:
    """Where a data set is, for messages and for the pictures that it names.

    ``folder`` is what relative paths begin at; without one, there is none. Absolute paths, which
    the Image feature may hold, must lie below ``folder`` or one of ``caches``.
    """

    name: str
    folder: Path | None
    caches: tuple[Path, ...] = ()

    @cached_property
    def path(self) -> Path:
        """The name as a path, above which no entry lies."""
        return Path(self.name)

    def picture(self, text: str, where: str) -> Picture:
        """The picture at a path of the Image feature. Raises DataError for a path elsewhere."""
        address, _, archive = text.partition("::")
        if "://" in text:
            outer = archive or address
            if outer.startswith(REMOTE) or self._inside(outer):
                return RemotePicture(text)
        elif os.path.isabs(text):
            if self._inside(text):
                return Path(text)
        elif self.folder is not None and ".." not in Path(text).parts:
            return self.folder / text
        raise DataError(
            f"{where} names the picture {plain(text)}, which is not part of the data set: move it "
            "there, or store the pictures themselves"
        )

    def _inside(self, text: str) -> bool:
        path = Path(os.path.normpath(text))
        roots = [self.folder, *self.caches] if self.folder is not None else self.caches
        tops = [top(root) for root in roots for top in (os.path.abspath, os.path.realpath)]
        return any(path.is_relative_to(one) for one in tops)


@dataclass(frozen=True)
class Row:
    """A row: its values by the task's names, and its pictures.

    ``number`` counts from 0. ``measure`` gives the (width, height) of the row's picture.
    """

    place: Place
    number: int
    found: Mapping[str, Found]
    entry: Entry
    stored: Mapping[str, Stored]
    measure: Measure

    @classmethod
    def of(
        cls,
        place: Place,
        number: int,
        found: Mapping[str, Found],
        raw: Mapping[str, Any],
        stored: Mapping[str, Stored],
        measure: Measure,
    ) -> Row:
        """The row of these raw values, by the columns of the data set."""
        values = {one.column: one.value(raw) for one in found.values() if not one.stored}
        entry = Entry(values, place.path, f"row {number}")
        return cls(place, number, found, entry, stored, measure)

    def get(self, name: str, kind: Kind[T]) -> T:
        """The value of a column. Raises DataError unless it is of ``kind``."""
        return field(self.entry, self.found[name].column, kind)

    def optional(self, name: str, kind: Kind[T]) -> T | None:
        """As :meth:`get`, but None where there is no such column or no value."""
        if name not in self.found:
            return None
        return optional(self.entry, self.found[name].column, kind)

    def each(self, name: str, kind: Kind[T]) -> list[T]:
        """The values of a column of lists, or its one value. Raises DataError."""
        return each(self.entry, self.found[name].column, kind)

    def hidden(self, name: str) -> bool:
        """Whether a column of labels has none in this row."""
        return hidden(self.entry, self.found[name].column)

    def picture(self, name: str) -> Picture | None:
        """The picture in a column; None if there is none."""
        column = self.found[name]
        if column.stored:
            found = self.stored[name]
            return found if not isinstance(found, tuple) else next(iter(found), None)
        text = self.optional(name, PATH)
        return None if text is None else self._named(column, text)

    def pictures(self, name: str) -> list[Picture]:
        """The pictures in a column of lists, or its one picture; none where there is no column."""
        if name not in self.found:
            return []
        column = self.found[name]
        if column.stored:
            found = self.stored[name]
            return [*found] if isinstance(found, tuple) else [found] if found is not None else []
        return [self._named(column, text) for text in self.each(name, PATH)]

    def _named(self, column: Found, text: str) -> Picture:
        """The picture in the file of that name."""
        if self.place.folder is None:
            raise DataError(
                f"{plain(self.place.name)}: the column {plain(column.column)!r} names files, and a "
                "data set on the hub has no folder of them: give a column of pictures"
            )
        return self.place.folder / text

    @property
    def id(self) -> Id:
        """The id of the row, or its number."""
        found = self.optional("id", ID)
        return self.number if found is None else found

    def size(self, picture: Picture) -> tuple[int, int]:
        """The (width, height) in the row, or that of the picture itself."""
        width, height = self.optional("width", COUNT), self.optional("height", COUNT)
        if width is not None and height is not None:
            return width, height
        return self.measure(self.number, picture)


def streamed_picture(place: Place, raw: Any, where: str) -> Stored:
    """The picture in a row of a stream: its bytes, or those at its path. Raises DataError."""
    if isinstance(raw, list):
        several = [streamed_picture(place, one, f"{where} {n}") for n, one in enumerate(raw)]
        return tuple(one for one in several if one is not None and not isinstance(one, tuple))
    content, path = raw, None
    if isinstance(raw, Mapping):
        content, path = raw.get("bytes"), raw.get("path")
    if isinstance(content, bytes):
        name = os.path.basename(path) if isinstance(path, str) else ""
        return StreamedPicture(content, where, name)
    if isinstance(path, str):
        return place.picture(path, where)
    if raw is None or isinstance(raw, Mapping):
        return None
    raise DataError(f"{plain(where)} must be a picture, not {plain(type(raw).__name__)}")


class Part(Sequence[T]):
    """Some of the items of a sequence, by their numbers, made when they are asked for."""

    def __init__(self, items: Sequence[T], numbers: Sequence[int]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, number: int) -> T: ...

    @overload
    def __getitem__(self, number: slice) -> Part[T]: ...

    def __getitem__(self, number: int | slice) -> T | Part[T]:
        if isinstance(number, slice):
            return Part(self.items, self.numbers[number])
        return self.items[self.numbers[number]]

    def __iter__(self) -> Iterator[T]:
        return (self.items[number] for number in self.numbers)
