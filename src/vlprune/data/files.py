"""Reading files from disk: readers look into parsed files only with the functions here.

A parsed value is an :class:`~vlprune.data.kinds.Entry`, which readers open only through these
functions. Any file, even a stranger's, thus yields either the expected data or a DataError that
names the file, the entry, the key and the kind of value expected.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from ..errors import DataError
from ..files import MiB, parse_json, plain
from ..files import read_text as read_bounded
from .images import open_image
from .kinds import ANYTHING, ID, Entry, Id, Kind, part, shown, where

__all__ = [
    "Left",
    "check_split",
    "each",
    "field",
    "hidden",
    "inside",
    "listed",
    "open_image",
    "optional",
    "read_json",
    "read_jsonl",
    "read_text",
    "some",
    "unique",
    "value",
    "wrong",
]

LARGEST = 8 * 1024 * MiB
T = TypeVar("T")

Left = Counter[str]
"""How many entries a reader left out, by reason."""


# -- files -----------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError unless it is a regular UTF-8 file of at most 8 GiB."""
    return read_bounded(path, DataError, LARGEST)


def read_json(path: Path) -> Entry:
    """The value in a JSON file. Raises DataError, with line and column for malformed JSON."""
    return Entry(parse_json(read_text(path), path, DataError, unique=True), path)


def read_jsonl(path: Path) -> Iterator[Entry]:
    """The value of each line that is not blank. Raises DataError naming a malformed line.

    Only a line feed ends a line: the other characters at which Python splits lines may stand
    unescaped in a JSON string.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{plain(path)}, line {number}"
            try:
                found = parse_json(line, where, DataError, unique=True)
            except DataError as error:  # the message counts lines within this line
                raise DataError(str(error).replace(", line 1, column", ", column")) from None
            yield Entry(found, path, number)


# -- taking entries apart --------------------------------------------------------------


def field(entry: Entry, name: str, kind: Kind[T]) -> T:
    """The value under ``name`` in the object ``entry``. Raises DataError unless of ``kind``."""
    found = entry._value
    if not isinstance(found, dict):
        raise DataError(f"{where(entry)} must be an object with {shown(name)}, not {shown(found)}")
    if name not in found:
        raise DataError(f"{where(entry)} has no {shown(name)}, which must be {kind.says}")
    return value(Entry(found[name], entry, name), kind)


def optional(entry: Entry, name: str, kind: Kind[T]) -> T | None:
    """As :func:`field`, but None if ``name`` is absent or ``null``. Raises DataError."""
    found = entry._value
    if isinstance(found, dict) and found.get(name) is None:
        return None
    return field(entry, name, kind)


def each(entry: Entry, name: str, kind: Kind[T]) -> list[T]:
    """The values in the list under ``name``, or the one value that stands there without a list.

    Empty for ``null``. Raises DataError unless they are of ``kind``.
    """
    found = field(entry, name, ANYTHING)
    if found._value is None or found._value == []:
        return []
    whole = kind.take(found)
    if whole is not None:
        return [whole]
    if not isinstance(found._value, list):
        return [value(found, kind)]
    return [value(Entry(one, found, number), kind) for number, one in enumerate(found._value)]


def hidden(entry: Entry, name: str) -> bool:
    """Whether there is no label under ``name``: ``null``, blank or -1, as in some test splits."""
    found = field(entry, name, ANYTHING)._value
    return found is None or found == -1 or (isinstance(found, str) and not found.strip())


def value(entry: Entry, kind: Kind[T]) -> T:
    """The value of ``entry`` itself. Raises DataError if it is not of ``kind``."""
    found = kind.take(entry)
    if found is None:
        raise DataError(f"{where(entry)} must be {kind.says}, not {shown(entry._value)}")
    return found


def unique(entries: list[Entry], name: str = "id") -> dict[Id, Entry]:
    """Entries by their id under ``name``. Raises DataError for an id that occurs twice."""
    found: dict[Id, Entry] = {}
    for entry in entries:
        key = field(entry, name, ID)
        if key in found:
            raise DataError(
                f"{where(entry)}: the same {shown(name)} as {part(found[key])}: it must be "
                "that of one entry"
            )
        found[key] = entry
    return found


def wrong(entry: Entry, text: str) -> DataError:
    """A DataError for the caller to raise: the place of ``entry``, then ``text``."""
    return DataError(f"{where(entry)}: {plain(text)}")


def some(found: list[T], path: Path, what: str, left: Left | None = None) -> list[T]:
    """``found`` itself. Raises DataError, with the counts in ``left``, if ``found`` is empty."""
    if not found:
        told = f"; left out were {listed(left)}" if left and +left else ""
        raise DataError(f"{plain(path)} holds no {what}{told}")
    return found


def listed(left: Left) -> str:
    """Reasons with their counts, as in ``images without a caption (3), boxes of crowds (1)``."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in left.items() if count)


def check_split(split: str) -> str:
    """``split`` itself. Raises DataError if it is neither train nor test.

    For data sets that their reader divides.
    """
    if split not in ("train", "test"):
        raise DataError(f"the split must be train or test, not {shown(split)}")
    return split


def inside(folder: Path, name: str) -> Path:
    """The subfolder ``name`` of ``folder`` if it exists, else ``folder`` itself."""
    return folder / name if os.path.isdir(folder / name) else folder
