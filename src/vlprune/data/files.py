"""Reading what is on disk; whatever is wrong with it becomes one sentence with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..errors import DataError

__all__ = ["field", "open_image", "read_json", "read_jsonl", "read_text"]


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises DataError with line and column if it is malformed."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for every line. Raises DataError naming the malformed line."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg})"
            ) from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object")
        yield number, value


def field(entry: Mapping[str, Any], name: str, path: Path, number: int) -> Any:
    """``entry[name]``. Raises DataError saying which entry of which file lacks it."""
    if not isinstance(entry, Mapping) or name not in entry:
        raise DataError(f"{path}: entry {number} has no {name!r}")
    return entry[name]


def open_image(path: Path) -> Image.Image:
    """The image as RGB, fully decoded. Raises DataError if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"the image {path} cannot be decoded ({error}): restore it, or remove its entries"
        ) from None
