"""The columns of a data set that a task reads: found, checked, and taken out of a row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...files import plain
from ...recipe.columns import Column, Columns

__all__ = ["Found", "columns_in"]

NUMBERS = ("int", "uint", "float", "double", "decimal")
MOST = 30
"""Columns that a message lists at most."""


@dataclass(frozen=True)
class Found:
    """Where a task's column lies in a data set.

    ``column`` may lead into objects, as in ``objects.bbox``, where ``top`` is the column of the
    data set and ``steps`` are the keys below. ``stored`` pictures have their bytes or their path in
    a column of their own; others are named by a text. ``classes`` are the names for the numbers in
    it, and ``encoded`` means that the values are JSON texts.
    """

    column: str
    top: str
    steps: tuple[str, ...] = ()
    picture: bool = False
    stored: bool = False
    classes: tuple[str, ...] | None = None
    encoded: bool = False

    def value(self, row: Mapping[str, Any]) -> Any:
        """The plain value in a row of the data set, with the names of classes for numbers."""
        found = row.get(self.top)
        found = _below(_parsed(found) if self.encoded else found, self.steps)
        return found if self.classes is None else _named(found, self.classes)


def columns_in(
    source: str,
    features: Mapping[str, Any],
    wanted: Columns,
    given: Mapping[str, str],
) -> dict[str, Found]:
    """Where each of the ``wanted`` columns lies, by the task's name for it.

    ``features`` are those of the data set called ``source``, and ``given`` are the names of the
    columns that are not named as the task names them. Raises one DataError for all that are missing
    or of the wrong kind.
    """
    found: dict[str, Found] = {}
    wrong: list[str] = []
    for name, column in wanted.items():
        asked = given.get(name, name)
        place = _place(asked, features)
        if place is None:
            if column.needed or name in given:
                wrong.append(f"there is no column {asked!r} for {name}, {SAYS[column.kind]}")
            continue
        top, steps, feature = place
        if not _fits(column, feature, steps):
            wrong.append(
                f"the column {asked!r} for {name} must hold {SAYS[column.kind]}, not "
                f"{_said(feature)}"
            )
            continue
        found[name] = _found(asked, top, steps, column, feature, features[top])
    if wrong:
        listed = [f"{plain(name)} ({_said(kind)})" for name, kind in [*features.items()][:MOST]]
        more = f" and {len(features) - MOST} more" if len(features) > MOST else ""
        there = f"its columns are {', '.join(listed)}{more}" if listed else "it has no columns"
        raise DataError(
            f"{plain(source)} does not fit: {plain('; '.join(wrong))}. There, {there}. Name others "
            f"under data.columns, as in data.columns.{next(iter(wanted))}=NAME"
        )
    return found


SAYS = {
    "picture": "pictures, or texts that name their files",
    "pictures": "pictures or texts that name their files, one or a list per row",
    "text": "texts",
    "texts": "a text or a list of texts per row",
    "class": "classes: numbers or names",
    "truth": "true or false",
    "boxes": "a list of boxes [left, top, width, height] per row",
    "classes": "a list of classes, one for each box",
    "spans": "for each box, a list of pairs [first character, end]",
    "number": "numbers",
    "id": "ids: numbers or texts",
    "anything": "values",
}
"""Each kind of column in words."""


PICTURES = ("picture", "pictures")


def _place(asked: str, known: Mapping[str, Any]) -> tuple[str, tuple[str, ...], Any] | None:
    """The column, the steps below it, and the feature at their end; None if there is no such."""
    if asked in known:
        return asked, (), known[asked]
    top, *steps = asked.split(".")
    if top not in known:
        return None
    feature = known[top]
    depth = 0
    for step in steps:
        if _kind(feature) == "Json":
            return top, tuple(steps), feature
        inner, more = _inner(feature)
        depth += more
        if not isinstance(inner, Mapping) or step not in inner:
            return None
        feature = inner[step]
    return top, tuple(steps), [feature] if depth else feature


def _inner(feature: Any) -> tuple[Any, int]:
    """What a list of lists holds in the end, and how many lists are around it."""
    depth = 0
    while True:
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        elif _kind(feature) in ("List", "LargeList", "Sequence"):
            feature = feature.feature
        else:
            return feature, depth
        depth += 1


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _fits(column: Column, feature: Any, steps: tuple[str, ...]) -> bool:
    """Whether values of this feature may be what the task reads; rows are checked one by one."""
    leaf, depth = _inner(feature)
    dtype = str(getattr(leaf, "dtype", "")) if _kind(leaf) == "Value" else ""
    text, number = dtype in ("string", "large_string"), dtype.startswith(NUMBERS)
    labelled = _kind(leaf) == "ClassLabel"
    if column.kind == "anything":
        return True
    if _kind(leaf) == "Json":
        return column.kind not in PICTURES
    if column.kind in PICTURES:
        own = _kind(leaf) == "Image" or dtype in ("binary", "large_binary")
        own = own or (isinstance(leaf, Mapping) and "bytes" in leaf)
        return depth <= (column.kind == "pictures") and (text or (own and not steps))
    if column.kind in ("boxes", "spans"):
        return number and depth >= 1
    if column.kind == "number":
        return number and depth == 0
    if column.kind == "truth":
        return depth == 0 and (labelled or text or number or dtype == "bool")
    if column.kind in ("class", "id", "classes"):
        return (text or number or labelled) and depth == (column.kind == "classes")
    several = column.kind == "texts"
    return (text or labelled or (several and number)) and depth <= several


def _found(
    asked: str, top: str, steps: tuple[str, ...], column: Column, feature: Any, whole: Any
) -> Found:
    leaf, _ = _inner(feature)
    names = tuple(leaf.names) if _kind(leaf) == "ClassLabel" else None
    picture = column.kind in PICTURES
    stored = picture and str(getattr(leaf, "dtype", "")) not in ("string", "large_string")
    return Found(asked, top, steps, picture, stored, names, any(_kinds(whole, "Json")))


def _kinds(feature: Any, kind: str) -> Iterator[bool]:
    leaf, _ = _inner(feature)
    if isinstance(leaf, Mapping):
        for inner in leaf.values():
            yield from _kinds(inner, kind)
    else:
        yield _kind(leaf) == kind


def _said(feature: Any) -> str:
    """A feature in words, for a message."""
    leaf, depth = _inner(feature)
    if isinstance(leaf, Mapping):
        text = f"objects with {', '.join(map(str, leaf))}"
    elif _kind(leaf) == "ClassLabel":
        text = f"one of {len(leaf.names)} classes"
    elif _kind(leaf) == "Value":
        text = str(leaf.dtype)
    else:
        text = "pictures" if _kind(leaf) == "Image" else _kind(leaf)
    return plain("lists of " * depth + text)


# -- values ----------------------------------------------------------------------------


def _below(value: Any, steps: tuple[str, ...]) -> Any:
    """What lies at the end of these keys, in each object of a list."""
    for number, step in enumerate(steps):
        if isinstance(value, list):
            return [_below(one, steps[number:]) for one in value]
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _named(value: Any, classes: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return value


def _parsed(value: Any) -> Any:
    """The values of JSON texts at any depth; a text that is not JSON stays as it is."""
    if isinstance(value, list):
        return [_parsed(one) for one in value]
    if isinstance(value, dict):
        return {name: _parsed(one) for name, one in value.items()}
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
