"""Blocks on a terminal, or as plain text where the output goes to a file or another program."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box, table
from rich.cells import cell_len
from rich.console import Console

from .blocks import Block, Heading, Sentence, Table, cell, turned

__all__ = ["show"]

PLAIN = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Columns apart by spaces, and a line of dashes below the titles."""
GAP = 2
LONG = 12
"""A longer word (a path, say) may go on in the next line of its column."""


def show(blocks: Sequence[Block], console: Console) -> None:
    """Print the blocks. Nothing is cut off, whatever the width."""
    for before, block in zip((None, *blocks), blocks, strict=False):
        if isinstance(before, Table) or (before and isinstance(block, Heading)):
            console.print()
        if isinstance(block, Table):
            if isinstance(before, Sentence):
                console.print()
            _show_table(block, console)
        elif isinstance(block, Heading):
            console.print(block.text, style="bold" if block.level == 1 else "underline")
        else:
            console.print(block.text)


def _show_table(block: Table, console: Console) -> None:
    """A table; on its side where only that is narrow enough; else a list."""
    for form in (block, turned(block)):
        widths = _widths(form, console.width)
        if widths:
            console.print(_drawn(form, widths, console.is_terminal))
            return
    first, *others = block.columns
    for row in block.rows:
        console.print(f"{first.title}: {cell(first, row)}")
        for column in others:
            console.print(f"  {column.title}: {cell(column, row)}")


def _widths(block: Table, room: int) -> list[int]:
    """The width of every column, sharing what is left; empty if there is no room.

    A number stays whole, and so does a word that is not long.
    """
    least, most = [], []
    for column in block.columns:
        cells = [cell(column, row) for row in block.rows]
        words = [word for text in (column.title, *cells) for word in text.split()]
        whole = max(map(cell_len, cells), default=0) if column.align == "right" else 0
        least.append(max(whole, max(min(cell_len(word), LONG) for word in words)))
        most.append(max(map(cell_len, (column.title, *cells))))
    spare = room - sum(least) - GAP * (len(least) - 1)
    if spare < 0:
        return []
    wants = [wide - narrow for narrow, wide in zip(least, most, strict=True)]
    for number in sorted(range(len(wants)), key=wants.__getitem__):  # so most columns get all
        more = min(wants[number], spare)
        least[number] += more
        spare -= more
    return least


def _drawn(block: Table, widths: Sequence[int], lines: bool) -> table.Table:
    drawn = table.Table(
        box=box.SIMPLE_HEAD if lines else PLAIN,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column, width in zip(block.columns, widths, strict=True):
        drawn.add_column(column.title, justify=column.align, overflow="fold", width=width)
    for row in block.rows:
        drawn.add_row(*(cell(column, row) for column in block.columns))
    return drawn
