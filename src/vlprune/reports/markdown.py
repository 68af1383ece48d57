"""Blocks as Markdown, in which names of strangers stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..files import plain
from .story import Block

__all__ = ["as_text", "markdown", "table"]


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    parts = []
    for block in blocks:
        if block.rows:
            head, *body = block.rows
            parts.append(table(head, body))
        else:
            text = as_text(block.text)
            parts.append(f"{'#' * block.level} {text}" if block.level else text)
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table with titles."""
    rows = [[as_text(cell) for cell in row] for row in (head, *body)]
    rows.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_text(text: str) -> str:
    """The text so that Markdown shows it as it is: names may hold markup, links or HTML."""
    one_line = plain(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]<|]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)
