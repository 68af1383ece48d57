"""Where a command prints: results to stdout, progress and problems to stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import RecipeError
from ..files import plain, write_text

__all__ = ["Plain", "err", "out", "write"]


class Plain(Console):
    """A console that prints text as it is: names may hold markup, emoji codes or escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text without its control characters."""
        return super().render_str(plain(text), **options)


err = Plain(stderr=True)
out = Plain(soft_wrap=False)


def write(path: Path, text: str) -> None:
    """Write a file, all of it or nothing, and report that. Raises RecipeError if that fails."""
    write_text(path, text, RecipeError)
    err.print(f"Written to {path}.")
