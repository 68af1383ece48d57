"""Progress as the command line shows it: phases and bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Columns

from ..files import plain
from ..status import Progress
from .console import err

__all__ = ["Bars"]

SILENCE = 60.0
"""Seconds without a word, at most, where stderr is no terminal."""


class Bars(Progress):
    """Phases and bars on stderr; where that is no terminal, plain lines, at least one a minute."""

    def phase(self, title: str) -> None:
        """Print a line for the phase that begins."""
        err.print(title, style="bold" if err.is_terminal else None)

    def note(self, text: str) -> None:
        """Print a line as it is, control characters escaped."""
        err.print(plain(text), markup=False, soft_wrap=True)

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Any]:
        """A bar that disappears when it is done."""
        if not err.is_terminal:
            yield _plain_lines(title, total)
            return
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Columns(*columns, console=err, transient=True) as bars:
            task = bars.add_task(plain(title), total=total, note="")

            def advance(done: int, note: str = "") -> None:
                bars.update(task, advance=done)
                if note:
                    bars.update(task, note=plain(note))

            yield advance


def _plain_lines(title: str, total: int) -> Any:
    """An advance function that prints a line at every quarter, and at least every minute."""
    so_far, said, quarter = 0, "", 1
    began = told = time.monotonic()

    def advance(done: int, note: str = "") -> None:
        nonlocal so_far, said, quarter, told
        so_far += done
        said = note or said
        now = time.monotonic()
        if not done or not (so_far * 4 >= total * quarter or now - told >= SILENCE):
            return
        quarter, told = so_far * 4 // total + 1, now
        left = (now - began) * (total - so_far) / so_far
        more = f"about {_span(left)} left" if left >= SILENCE else ""
        err.print(" ".join(filter(None, [f"  {title} {so_far}/{total}", said, more])))

    return advance


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
