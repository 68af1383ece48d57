"""Kinds of values in a data file, and entries that know their place in the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..files import plain

__all__ = [
    "ANSWER",
    "ANYTHING",
    "BOX",
    "COUNT",
    "FLAG",
    "FOLDER",
    "ID",
    "LABEL",
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
    "YES_OR_NO",
    "Entry",
    "Id",
    "Kind",
    "one_of",
    "part",
    "shown",
    "where",
]

LONGEST_SIDE = 1_000_000
Fits = TypeVar("Fits", covariant=True)

Id = int | str
"""The id of an entry. Digits in quotes count as the number: 7 and "7" are the same id."""


class Entry:
    """A value of a parsed file that knows its place in that file, for error messages."""

    __slots__ = ("_above", "_step", "_value")

    def __init__(self, value: Any, above: Entry | Path, step: str | int | None = None) -> None:
        self._value, self._above, self._step = value, above, step

    def __repr__(self) -> str:
        return f"Entry({where(self)})"


@dataclass(frozen=True)
class Kind(Generic[Fits]):
    """A kind of value: its name for messages, and a function that returns the value or None."""

    says: str
    take: Callable[[Entry], Fits | None]


def where(entry: Entry) -> str:
    """The file that holds an entry, and the entry's place in the file, for messages."""
    parts: list[str] = []
    while True:
        above, step = entry._above, entry._step
        if isinstance(above, Path):
            name = plain(above)
            if step is not None:
                name += f", {f'line {step}' if isinstance(step, int) else step}"
            return f"{name}: {', '.join(reversed(parts))}" if parts else name
        parts.append(part(entry))
        # part() has named the list already
        named = isinstance(step, int) and isinstance(above._step, str)
        entry = above._above if named and isinstance(above._above, Entry) else above


def part(entry: Entry) -> str:
    """An entry's place in the list or object around it: ``entry 3 of 'annotations' (id 7)``."""
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
    """A value as a message shows it: as JSON, shortened."""
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


def _text(entry: Entry) -> str | None:
    found = entry._value
    if not isinstance(found, str):
        return None
    try:
        found.encode()
    except UnicodeEncodeError:  # half a character, such as "\ud800", cannot be encoded
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
    """A whole number from 0, also written as 640.0, as tables do."""
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
    """A whole number from 0, or its digits in quotes, with or without leading zeros."""
    found = entry._value
    if isinstance(found, str):
        digits = found.strip()
        return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else None
    return _whole(entry)


def _flag(entry: Entry) -> bool | None:
    found = entry._value
    return bool(found) if isinstance(found, int | float) and found in (0, 1) else None


def _truth(entry: Entry) -> bool | None:
    """A truth value, or its name as text, as in NLVR."""
    return {"true": True, "false": False}.get(str(entry._value).lower())


def _answer(entry: Entry) -> str | None:
    found = entry._value
    return str(found) if _number(entry) is not None else _text(entry)


def _path(entry: Entry) -> str | None:
    """A relative path without ``..``: a stranger's file must not name files outside its folder."""
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
    """The last two parts of an address, ``folder/name``, as a path."""
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


ANYTHING = Kind("a value", lambda entry: entry)
LABEL = Kind(
    "a class: text or a number",
    lambda entry: "" if entry._value in (None, -1) else _answer(entry),
)
YES_OR_NO = Kind(
    "true or false, or 1 or 0",
    lambda entry: (_flag if isinstance(entry._value, int | float) else _truth)(entry),
)


def one_of(*words: str) -> Kind[str]:
    """The kind of values that are one of ``words``."""
    return Kind(
        f"one of {', '.join(words)}",
        lambda entry: entry._value if entry._value in words else None,
    )
