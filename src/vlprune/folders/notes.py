"""Notes that vouch for the files beside them: a kill, a bad disk or a foreign file is noticed.

A note is a small JSON file, written once all the files it covers are on disk. It holds a key
(which recipe, which phase), a body to remember, the sizes and SHA-256 of the files, and a digest
of itself. Hashing runs at about 1.3 GB per second, which is faster than disks are written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from ..files import digest, plain, read_json, reason, write_text

__all__ = [
    "NO_NOTE",
    "Note",
    "files_in",
    "hashed",
    "note_text",
    "read_note",
    "set_aside",
    "write_note",
]

NO_NOTE = "unfinished"
"""The key of a note that only claims the folder, until the real note is written."""


@dataclass(frozen=True)
class Note:
    """The key and the body of a note."""

    key: str
    body: Any


def hashed(value: Any) -> str:
    """A short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def write_note(path: Path, key: str, body: Any = None, files: Iterable[str] = ()) -> None:
    """Write a note that vouches for ``files``, named relative to its folder.

    Raises CheckpointError if a file cannot be read or the note cannot be written.
    """
    write_text(path, note_text(key, body, {n: digest(path.parent / n) for n in sorted(files)}))


def note_text(key: str, body: Any = None, files: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A note as JSON text; ``files`` is {name: [bytes, SHA-256]}."""
    # the digest is of the value as it will be read: JSON has no tuples, and only text as keys
    text = json.loads(json.dumps({"key": key, "body": body, "files": dict(files)}))
    return json.dumps(text | {"digest": hashed(text)}, indent=1) + "\n"


def read_note(path: Path, only: bool = False) -> Note | None:
    """The note, after a check of every file it vouches for; None if ``path`` does not exist.

    With ``only``, its folder may hold no other files except hidden ones. Raises CheckpointError
    with the reason if the note, a file or the folder is not as it was written.
    """
    if not os.path.lexists(path):
        return None
    text = read_json(path)
    digested = text.pop("digest", None) if isinstance(text, dict) else None
    if not digested or digested != hashed(text) or text.keys() != {"key", "body", "files"}:
        raise CheckpointError(f"{plain(path.name)} is not as it was written")
    for name, written in text["files"].items():
        found = digest(path.parent / name)
        if found != written:
            sizes = f": {found[0]:,} bytes in place of {written[0]:,}"
            raise CheckpointError(
                f"{plain(name)} is not as it was written{sizes if found[0] != written[0] else ''}"
            )
    if only:
        known = {path.name, *text["files"]}
        others = [n for n in files_in(path.parent) if n not in known and not n.startswith(".")]
        if others:
            raise CheckpointError(f"{plain(min(others))} was not there when it was written")
    return Note(text["key"], text["body"])


def files_in(folder: Path) -> list[str]:
    """The names of all files in a folder and below it, relative to it."""
    return [
        (Path(place) / name).relative_to(folder).as_posix()
        for place, folders, files in os.walk(folder)
        for name in [*files, *(f for f in folders if (Path(place) / f).is_symlink())]
    ]


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to ``damaged-NAME``, so that nothing is lost.

    Returns the new path. Raises CheckpointError if the rename fails.
    """
    number, place = 1, path.with_name(f"damaged-{path.name}")
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"damaged-{path.name}-{number}")
    try:
        path.rename(place)
    except OSError as error:
        raise CheckpointError(
            f"{plain(path)} is damaged and cannot be renamed ({reason(error)}): remove it"
        ) from None
    return place
