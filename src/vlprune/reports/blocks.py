"""What a screen shows, as plain values: headings, sentences and tables.

A table names its columns; renderers look a cell up by the key of its column, never by position.
Cells hold numbers, and the unit of the column says how they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .words import UNITS

__all__ = ["Block", "Column", "Heading", "Sentence", "Table", "cell", "turned"]


@dataclass(frozen=True)
class Heading:
    """The title of a folder (``level`` 1) or of one part of what is said about it (2)."""

    kind: ClassVar[str] = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True)
class Sentence:
    """One paragraph."""

    kind: ClassVar[str] = "sentence"
    text: str


@dataclass(frozen=True)
class Column:
    """One column of a table: the ``key`` of its cells, its ``title``, and the ``unit`` of numbers.

    Units are those of :data:`vlprune.reports.words.UNITS`; a column without one holds text.
    """

    key: str
    title: str
    unit: str = ""

    @property
    def align(self) -> Literal["left", "right"]:
        """Numbers stand right, below each other."""
        return "right" if self.unit else "left"


@dataclass(frozen=True)
class Table:
    """Rows of {key of a column: number or text}; the first column names the row."""

    kind: ClassVar[str] = "table"
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]


Block = Heading | Sentence | Table


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """The text of a cell: a number in its unit, ``before -> after`` for a pair, - for nothing."""
    value = row.get(column.key)
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " -> ".join(cell(column, {column.key: one}) for one in value)
    return value if isinstance(value, str) else UNITS[column.unit](value)


def turned(table: Table) -> Table:
    """The table on its side: one column per row, for few rows of many figures."""
    first, *others = table.columns
    return Table(
        (
            Column(first.key, first.title),
            *(Column(str(n), cell(first, row), "text") for n, row in enumerate(table.rows)),
        ),
        tuple(
            {first.key: column.title}
            | {str(n): cell(column, row) for n, row in enumerate(table.rows)}
            for column in others
        ),
    )
