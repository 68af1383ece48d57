"""Reading and writing small files: one message for whatever is wrong, all or nothing.

A path may come from a stranger's folder, so reading is bounded: a pipe, a device or a file larger
than its kind ever is, is refused before a byte of it is read.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
import uuid
from pathlib import Path
from typing import Any

from .errors import CheckpointError, VlpruneError

__all__ = ["MiB", "parse_json", "plain", "read_json", "read_text", "reason", "shown", "write_text"]

MiB = 2**20
LARGEST = 64 * MiB
"""More than any config, plan or report needs: a plan of a million units has some 8 MiB."""


def plain(text: object) -> str:
    """A name or text of somebody else for a message: control characters escaped.

    Escape sequences would move the cursor of a terminal, colour it, or hide what follows.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in str(text))


def shown(value: object) -> str:
    """A value of somebody else for a message: short, with control characters escaped."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return plain(short.repr(value))


def reason(error: BaseException) -> str:
    """Why the system refused, without the path that the message names anyway."""
    return plain(getattr(error, "strerror", None) or " ".join(str(error).split()))


def read_text(
    path: str | Path, kind: type[VlpruneError] = CheckpointError, most: int = LARGEST
) -> str:
    """The UTF-8 text of a regular file of at most ``most`` bytes. Raises ``kind``."""
    name = plain(path)
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise kind(f"{name} is not a regular file: give a file")
            if facts.st_size > most:
                raise kind(
                    f"{name} has {facts.st_size / MiB:,.0f} MiB, and at most "
                    f"{most / MiB:,.0f} MiB are read: it is not such a file"
                )
            return file.read(most + 1).decode("utf-8-sig")
    except FileNotFoundError:
        raise kind(f"there is no file {name}") from None
    except UnicodeDecodeError as error:
        raise kind(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, VlpruneError):
            raise
        raise kind(f"cannot read {name}: {reason(error)}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to would block here for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(text: str, where: str | Path, kind: type[VlpruneError] = CheckpointError) -> Any:
    """The value of a JSON text from ``where``. Raises ``kind`` with line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise kind(
            f"cannot read {plain(where)}, line {error.lineno}, column {error.colno}: not valid "
            f"JSON ({error.msg})"
        ) from None
    except RecursionError:
        raise kind(
            f"cannot read {plain(where)}: brackets are nested too deeply for JSON of ours"
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise kind(f"cannot read {plain(where)}: not valid JSON ({reason(error)})") from None


def read_json(
    path: str | Path, kind: type[VlpruneError] = CheckpointError, most: int = LARGEST
) -> Any:
    """The value in a JSON file. Raises ``kind``, with line and column where it is malformed."""
    return parse_json(read_text(path, kind, most), path, kind)


def write_text(path: str | Path, text: str, kind: type[VlpruneError] = CheckpointError) -> None:
    """Write a file, all of it or nothing. Raises ``kind``.

    A link or a device (``/dev/stdout``) is written into: replacing it would leave a regular file
    where the user had put something else. Other files keep their mode, new ones follow the umask.
    """
    path = Path(path)
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")
            return
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            partial.write_text(text, encoding="utf-8")
            if path.exists():
                partial.chmod(stat.S_IMODE(path.stat().st_mode))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise kind(f"cannot write {plain(path)}: {reason(error)}") from None
