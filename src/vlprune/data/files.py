"""Reading what is on disk: every reader takes parsed files apart with :func:`field`, only with it.

A parsed value is an :class:`Entry`, which cannot be looked into in any other way: whatever a
stranger's file holds is the data as meant, or a DataError that names the file, the entry, the key
and what was expected there.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import DataError
from ..files import MiB, parse_json, plain
from ..files import read_text as read_bounded
from .images import open_image

__all__ = [
    "ANSWER",
    "BOX",
    "COUNT",
    "FLAG",
    "FOLDER",
    "ID",
    "LIST",
    "NAME",
    "NUMBER",
    "NUMBERED",
    "OBJECT",
    "PAIRS",
    "PATH",
    "SPANS",
    "TEXT",
    "TEXT_OR_NULL",
    "TRIPLE",
    "TRUTH",
    "URL",
    "WHOLE",
    "WORDS",
    "Entry",
    "Id",
    "Kind",
    "Left",
    "check_split",
    "field",
    "inside",
    "listed",
    "one_of",
    "open_image",
    "optional",
    "read_json",
    "read_jsonl",
    "read_text",
    "shown",
    "some",
    "unique",
    "value",
    "wrong",
]

LARGEST = 8 * 1024 * MiB
LONGEST_SIDE = 1_000_000
T = TypeVar("T")

Id = int | str
"""What an entry is called by. Digits in quotes are the number: 7 and "7" are the same id."""

Left = Counter[str]
"""How many entries a reader left out, by reason."""


class Entry:
    """A value of a parsed file that knows its place in it, for messages."""

    __slots__ = ("_above", "_step", "_value")

    def __init__(self, value: Any, above: Entry | Path, step: str | int | None = None) -> None:
        self._value, self._above, self._step = value, above, step

    def __repr__(self) -> str:
        return f"Entry({_where(self)})"


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a value must be: in words, and a function that gives it, or None if it does not fit."""

    says: str
    take: Callable[[Entry], T | None]


# -- files -----------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError if it is missing, no regular file or not UTF-8."""
    return read_bounded(path, DataError, LARGEST)


def read_json(path: Path) -> Entry:
    """The value in a JSON file. Raises DataError with line and column if it is malformed."""
    return Entry(parse_json(read_text(path), path, DataError, unique=True), path)


def read_jsonl(path: Path) -> Iterator[Entry]:
    """The value of every line that is not blank. Raises DataError naming the malformed line.

    Only a line feed ends a line: the other characters at which Python splits lines may stand
    unescaped in a JSON string.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{plain(path)}, line {number}"
            try:
                found = parse_json(line, where, DataError, unique=True)
            except DataError as error:  # it counts lines from this one
                raise DataError(str(error).replace(", line 1, column", ", column")) from None
            yield Entry(found, path, number)


# -- taking entries apart --------------------------------------------------------------


def field(entry: Entry, name: str, kind: Kind[T]) -> T:
    """The value that the object ``entry`` has under ``name``, of this kind. Raises DataError."""
    found = entry._value
    if not isinstance(found, dict):
        raise DataError(f"{_where(entry)} must be an object with {shown(name)}, not {shown(found)}")
    if name not in found:
        raise DataError(f"{_where(entry)} has no {shown(name)}, which must be {kind.says}")
    return value(Entry(found[name], entry, name), kind)


def optional(entry: Entry, name: str, kind: Kind[T]) -> T | None:
    """The same, or None where there is nothing or ``null`` under ``name``. Raises DataError."""
    found = entry._value
    if isinstance(found, dict) and found.get(name) is None:
        return None
    return field(entry, name, kind)


def value(entry: Entry, kind: Kind[T]) -> T:
    """The value of ``entry`` itself. Raises DataError if it is of another kind."""
    found = kind.take(entry)
    if found is None:
        raise DataError(f"{_where(entry)} must be {kind.says}, not {shown(entry._value)}")
    return found


def unique(entries: list[Entry], name: str = "id") -> dict[Id, Entry]:
    """Entries by their id under ``name``. Raises DataError for one that occurs twice."""
    found: dict[Id, Entry] = {}
    for entry in entries:
        key = field(entry, name, ID)
        if key in found:
            raise DataError(
                f"{_where(entry)}: the same {shown(name)} as {_part(found[key])}: it must be "
                "that of one entry"
            )
        found[key] = entry
    return found


def wrong(entry: Entry, text: str) -> DataError:
    """An error about ``entry``, to be raised: its place, and what is wrong there."""
    return DataError(f"{_where(entry)}: {plain(text)}")


def some(found: list[T], path: Path, what: str, left: Left | None = None) -> list[T]:
    """``found``. Raises DataError if it is empty, with what was left out."""
    if not found:
        told = f"; left out were {listed(left)}" if left and +left else ""
        raise DataError(f"{plain(path)} holds no {what}{told}")
    return found


def listed(left: Left) -> str:
    """The reasons and counts, as in ``images without a caption (3), boxes of crowds (1)``."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in left.items() if count)


def check_split(split: str) -> str:
    """``split`` where a set is divided here. Raises DataError if it is neither train nor test."""
    if split not in ("train", "test"):
        raise DataError(f"the split must be train or test, not {shown(split)}")
    return split


def inside(folder: Path, name: str) -> Path:
    """The subfolder of that name if there is one, else the folder itself."""
    return folder / name if os.path.isdir(folder / name) else folder


def _where(entry: Entry) -> str:
    """The file of an entry and its place there."""
    parts: list[str] = []
    while True:
        above, step = entry._above, entry._step
        if isinstance(above, Path):
            name = plain(above) if step is None else f"{plain(above)}, line {step}"
            return f"{name}: {', '.join(reversed(parts))}" if parts else name
        parts.append(_part(entry))
        named = isinstance(step, int) and isinstance(above._step, str)  # the list is in the part
        entry = above._above if named and isinstance(above._above, Entry) else above


def _part(entry: Entry) -> str:
    """An entry's place in what is around it: ``entry 3 of 'annotations' (id 7)``."""
    above, step = entry._above, entry._step
    if isinstance(step, str) or isinstance(above, Path):
        return shown(step)
    listed = f" of {shown(above._step)}" if isinstance(above._step, str) else ""
    known = entry._value if isinstance(entry._value, dict) else {}
    key = next((key for key in NAMED if isinstance(known.get(key), int | str)), None)
    named = f" ({key} {shown(known[key])})" if key else ""
    return f"entry {step}{listed}{named}"


NAMED = ("id", "question_id", "identifier", "ref_id", "sent_id", "qa_id", "image_id", "filename")


def shown(found: Any, deep: bool = True) -> str:
    """A value for a message, as JSON has it, and short."""
    if isinstance(found, dict):
        return "an object"
    if isinstance(found, list):
        if len(found) > 6 or not deep:
            return f"a list of {len(found)}"
        return f"[{', '.join(shown(one, False) for one in found)}]"
    if isinstance(found, str):
        found = found if len(found) <= 40 else f"{found[:40]}…"
        return plain(repr(found))
    text = json.dumps(found)  # also true, null and NaN
    return text if len(text) <= 40 else f"{text[:40]}…"


# -- kinds -----------------------------------------------------------------------------


def _text(entry: Entry) -> str | None:
    found = entry._value
    if not isinstance(found, str):
        return None
    try:
        found.encode()
    except UnicodeEncodeError:  # half a character, as in "\ud800": it cannot be written anywhere
        return None
    return found


def _words(entry: Entry) -> str | None:
    found = _text(entry)
    return found if found and found.strip() else None


def _number(entry: Entry) -> float | None:
    found = entry._value
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        found = float(found)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _whole(entry: Entry) -> int | None:
    """A whole number from 0, also as 640.0, which tables write."""
    found = _number(entry)
    if found is None or found < 0 or not found.is_integer() or found > 2**53:
        return None
    return int(found)


def _count(entry: Entry) -> int | None:
    found = _whole(entry)
    return found if found and found <= LONGEST_SIDE else None


def _id(entry: Entry) -> Id | None:
    found = entry._value
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    if isinstance(found, float):
        return _whole(entry)
    text = (_words(entry) or "").strip()
    if not text:
        return None
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 4000 and str(int(text)) == text:
        return int(text)
    return text


def _numbered(entry: Entry) -> int | None:
    """A whole number, or one in quotes, zeros before it or not."""
    found = entry._value
    if isinstance(found, str):
        digits = found.strip()
        return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else None
    return _whole(entry)


def _flag(entry: Entry) -> bool | None:
    found = entry._value
    return bool(found) if isinstance(found, int | float) and found in (0, 1) else None


def _truth(entry: Entry) -> bool | None:
    """A truth value, or its name as text, which NLVR writes."""
    return {"true": True, "false": False}.get(str(entry._value).lower())


def _answer(entry: Entry) -> str | None:
    found = entry._value
    return str(found) if _number(entry) is not None else _text(entry)


def _path(entry: Entry) -> str | None:
    """A path below the folder it is relative to; a stranger's file must not read beyond it."""
    found = _words(entry)
    if found is None or "\0" in found:
        return None
    path = Path(found)
    return found if path.parts and not path.anchor and ".." not in path.parts else None


def _name(entry: Entry) -> str | None:
    found = _id(entry)
    if isinstance(found, str):
        path = _path(entry)
        return path if path is not None and Path(path).name == path else None
    return None if found is None else str(entry._value if isinstance(entry._value, str) else found)


def _list(entry: Entry) -> list[Entry] | None:
    found = entry._value
    if not isinstance(found, list):
        return None
    return [Entry(one, entry, number) for number, one in enumerate(found)]


def _triple(entry: Entry) -> list[Entry] | None:
    found = _list(entry)
    return found if found and len(found) == 3 else None


def _url(entry: Entry) -> str | None:
    """The last folder and the name of a file."""
    *_, folder, name = ("", "", *(_words(entry) or "").split("/"))
    return _path(Entry(f"{folder}/{name}", entry)) if folder and name else None


def _pairs(entry: Entry) -> list[tuple[str, Entry]] | None:
    found = entry._value
    if not isinstance(found, dict):
        return None
    return [(key, Entry(one, entry, key)) for key, one in found.items()]


def _box(entry: Entry) -> tuple[float, float, float, float] | None:
    numbers = [_number(one) for one in _list(entry) or ()]
    if len(numbers) != 4 or None in numbers or numbers[2] < 0 or numbers[3] < 0:  # type: ignore[operator]
        return None
    return tuple(numbers)  # type: ignore[return-value]


def _spans(entry: Entry) -> tuple[tuple[int, int], ...] | None:
    found = []
    if not isinstance(entry._value, list):
        return None
    for pair in _list(entry) or ():
        ends = [_whole(one) for one in _list(pair) or ()]
        if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] >= ends[1]:
            return None
        found.append((ends[0], ends[1]))
    return tuple(found)


TEXT = Kind("text", _text)
TEXT_OR_NULL = Kind("text or null", lambda entry: "" if entry._value is None else _text(entry))
WORDS = Kind("text that is not blank", _words)
ANSWER = Kind("text or a number", _answer)
ID: Kind[Id] = Kind("an id: a whole number, or text that is not blank", _id)
NUMBER = Kind("a finite number", _number)
WHOLE = Kind("a whole number from 0", _whole)
NUMBERED = Kind("a whole number from 0, in quotes or not", _numbered)
COUNT = Kind(f"a whole number from 1 to {LONGEST_SIDE:,}", _count)
TRUTH = Kind("true or false", _truth)
FLAG = Kind("0, 1, true or false", _flag)
PATH = Kind("a path inside the folder of images, neither absolute nor with '..'", _path)
FOLDER = Kind(
    "a folder inside the folder of images",
    lambda entry: "" if entry._value == "" else _path(entry),
)
NAME = Kind("a number, or a name without folders, as a part of a file's name", _name)
LIST: Kind[list[Entry]] = Kind("a list", _list)
TRIPLE: Kind[list[Entry]] = Kind("[question, answer, image id]", _triple)
OBJECT = Kind("an object", lambda entry: entry if isinstance(entry._value, dict) else None)
PAIRS = Kind("an object", _pairs)
URL = Kind("an address that ends with a folder and the name of a file", _url)
BOX = Kind("[left, top, width, height]: four finite numbers, the last two not negative", _box)
SPANS = Kind("a list of pairs [first character, end], each with first < end", _spans)


def one_of(*words: str) -> Kind[str]:
    """One of these words."""
    return Kind(
        f"one of {', '.join(words)}",
        lambda entry: entry._value if entry._value in words else None,
    )
