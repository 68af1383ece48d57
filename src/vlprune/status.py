"""How a run reports what it is doing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Shows nothing; the command line shows phases and bars instead."""

    def phase(self, title: str) -> None:
        """A new phase begins."""

    def note(self, text: str) -> None:
        """Something the user should know, on a line of its own."""

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Any]:
        """A bar for ``total`` items; yields ``advance(done, note="")``."""
        yield lambda done, note="": None
