"""Blocks as Markdown, in which names of strangers stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..files import plain
from .blocks import Block, Heading, Table, cell

__all__ = ["as_text", "markdown"]


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    return "\n\n".join(map(_block, blocks)) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    text = as_text(block.text)
    return f"{'#' * block.level} {text}" if isinstance(block, Heading) else text


def _table(table: Table) -> str:
    titles = [as_text(column.title) for column in table.columns]
    rules = ["---:" if column.align == "right" else "---" for column in table.columns]
    rows = [[as_text(cell(column, row)) for column in table.columns] for row in table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, rules, *rows))


def as_text(text: str) -> str:
    """The text so that Markdown shows it as it is: names may hold markup, links or HTML."""
    one_line = plain(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]<|]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)
