"""Small files: every failure is one clear error, and a write is all or nothing.

A path may come from an untrusted folder, so reading is bounded: a pipe, a device or a file that is
too large for its kind is refused before any of it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import CheckpointError, VlpruneError

__all__ = [
    "HUB_NAME",
    "MiB",
    "digest",
    "is_full",
    "opened",
    "parse_json",
    "plain",
    "read_json",
    "read_text",
    "reason",
    "shown",
    "unfinished",
    "write_text",
]

HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
"""What a name on the hub looks like: OWNER/NAME or NAME."""
MiB = 2**20
LARGEST = 64 * MiB
"""More than any config, plan or report needs: a plan of a million units takes about 8 MiB."""


def plain(text: object) -> str:
    """A name or text from outside, for a message: control characters are escaped.

    Escape sequences could move a terminal's cursor, change its colours, or hide what follows.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in str(text))


def shown(value: object) -> str:
    """A value from outside, for a message: shortened, with control characters escaped."""
    if value is None:
        return "nothing"
    short = reprlib.Repr()
    short.maxstring = 100  # module names have up to 80 characters
    short.maxother = short.maxlong = 60
    try:
        return plain(short.repr(value)).replace("\n", "\\n")
    except Exception:  # an object that cannot print itself
        return f"such a {type(value).__name__}"


def reason(error: BaseException) -> str:
    """Why the system or a library refused, in at most 300 characters.

    The system's path is left out, as the message names it anyway. The text of a library is cut
    short, as it may quote all of a damaged file.
    """
    text = plain(getattr(error, "strerror", None) or " ".join(str(error).split()))
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"


FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def is_full(error: BaseException, place: Path | None = None) -> bool:
    """Whether an error means that the disk or quota is full, by its errno or that of its cause.

    The writers of torch and safetensors lose the errno. Given ``place``, the folder they wrote to,
    a mebibyte is written into it and removed again, to see whether that fails in the same way.
    """
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and one.errno is not None:
            return one.errno in FULL
        one = one.__cause__ or one.__context__
    if place is None:
        return False
    probe = place / ".probe"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(MiB))
            file.flush()
            os.fsync(file.fileno())
    except OSError as refused:
        return refused.errno in FULL
    finally:
        probe.unlink(missing_ok=True)
    return False


@contextmanager
def opened(
    path: str | Path, kind: type[VlpruneError] = CheckpointError, most: int | None = None
) -> Iterator[BufferedReader]:
    """A regular file of at most ``most`` bytes, open for reading. Raises ``kind``."""
    name = plain(path)
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    except FileNotFoundError:
        raise kind(f"there is no file {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise kind(f"cannot read {name}: {reason(error)}") from None
    with file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise kind(f"{name} is not a regular file: give a file")
        if most is not None and facts.st_size > most:
            raise kind(
                f"{name} has {facts.st_size / MiB:,.0f} MiB, and at most "
                f"{most / MiB:,.0f} MiB are read: it is not such a file"
            )
        yield file


def read_text(
    path: str | Path, kind: type[VlpruneError] = CheckpointError, most: int = LARGEST
) -> str:
    """The UTF-8 text of a regular file of at most ``most`` bytes. Raises ``kind``."""
    with opened(path, kind, most) as file:
        try:
            # read(most) would allocate that much memory for every file, however small
            size = max(os.fstat(file.fileno()).st_size, MiB)
            return file.read(min(size, most) + 1).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise kind(
                f"{plain(path)} is not UTF-8 text (byte {error.start}): save it as UTF-8"
            ) from None
        except OSError as error:
            raise kind(f"cannot read {plain(path)}: {reason(error)}") from None


def _without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking: a pipe that nobody writes to would block forever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def digest(path: str | Path, kind: type[VlpruneError] = CheckpointError) -> list[Any]:
    """[bytes, SHA-256 in hexadecimal] of a regular file of any size. Raises ``kind``."""
    with opened(path, kind) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            return [size, hashlib.file_digest(file, "sha256").hexdigest()]
        except OSError as error:
            raise kind(f"cannot read {plain(path)}: {reason(error)}") from None


def parse_json(
    text: str,
    where: str | Path,
    kind: type[VlpruneError] = CheckpointError,
    unique: bool = False,
) -> Any:
    """The value of a JSON text from ``where``. Raises ``kind`` with line and column.

    If an object repeats a key, its last value counts, as everywhere in Python; with ``unique``, a
    repeated key is refused.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except json.JSONDecodeError as error:
        raise kind(
            f"cannot read {plain(where)}, line {error.lineno}, column {error.colno}: not valid "
            f"JSON ({error.msg})"
        ) from None
    except RecursionError:
        raise kind(
            f"cannot read {plain(where)}: brackets are nested too deeply for JSON of ours"
        ) from None
    except ValueError as error:  # a number with thousands of digits
        raise kind(f"cannot read {plain(where)}: not valid JSON ({reason(error)})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object made of these pairs. Raises ValueError for a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"an object holds the key {key[:40]!r} twice")
            seen.add(key)
    return found


def read_json(
    path: str | Path, kind: type[VlpruneError] = CheckpointError, most: int = LARGEST
) -> Any:
    """The value in a JSON file. Raises ``kind``, with line and column where it is malformed."""
    return parse_json(read_text(path, kind, most), path, kind)


def write_text(path: str | Path, text: str, kind: type[VlpruneError] = CheckpointError) -> None:
    """Write a file completely or not at all. Raises ``kind``.

    A link or a device (``/dev/stdout``) is written to in place: replacing it would leave a regular
    file where the user had put something else. Other files that exist keep their mode; new ones
    follow the umask.
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


def unfinished(path: Path) -> list[Path]:
    """The partial files that :func:`write_text` left beside ``path`` when it was killed.

    Only a caller who knows that nobody is writing ``path`` may remove them.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}")
    return [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]
