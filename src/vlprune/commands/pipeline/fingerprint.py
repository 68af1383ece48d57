"""Short digests of the contents of a model folder and of a data set, wherever they lie.

A run that goes on must notice that the model or the data behind a path has changed, but must not
start anew because a folder was moved. So contents are digested, but no paths or times.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.captions import EachCaption
from ...data.datasets.rows import Part
from ...data.datasets.streams import Stream
from ...data.datasets.tables import Rows, Table
from ...data.stored import StoredPicture, StreamedPicture, TablePicture
from ...errors import VlpruneError
from ...files import digest

__all__ = ["model_files", "of_data", "of_model"]

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
NOT_THE_MODEL = ("bench.json", "report.json", "vlprune-dense.json", "vlprune-cut.json")
WHOLE = 2**30
"""Bytes of pictures that are read in full; larger data sets are sampled evenly to this size."""


def model_files(folder: Path) -> list[str]:
    """Names of the files in a folder that make up a model and its processor."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.suffix in MODEL_FILES
        and entry.name not in NOT_THE_MODEL
        and not entry.name.startswith(".")
        and entry.is_file()
    )


def of_model(path: str) -> str:
    """The digest of a model's folder; of a model on the hub, the commit that is in the cache.

    The whole folder is read, at more than a gigabyte per second. The empty string if there is no
    such model, which is reported when the model is loaded.
    """
    if not path:
        return ""
    folder = Path(path)
    if folder.is_dir():
        return _hash([name, *digest(folder / name)] for name in model_files(folder))
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(path, "config.json")
    except (OSError, ValueError):
        return ""
    return Path(config).parent.name if config else ""


def of_data(items: Sequence[Any]) -> str:
    """The digest of a task's items and their pictures, by name, size and content.

    Pictures of more than :data:`WHOLE` bytes together are known by the names and sizes of all and
    the contents of evenly spaced ones. A stream is known by its files' names and sizes.
    """
    if isinstance(items, Stream):
        return _hash([items.contents, items.buffer, items.most])
    if isinstance(items, EachCaption):  # each picture once
        items = items.images
    pictures: dict[Path, int] = {}
    total = hashlib.sha256()
    table = _table_of(items)
    every = max(1, -(-table.stored_bytes() // WHOLE)) if table is not None else 1
    for item in items:
        total.update(repr(list(_leaves(item, pictures, every))).encode())
    for path in pictures:
        try:
            pictures[path] = os.stat(path).st_size
        except OSError:  # reported when it is opened
            pictures[path] = -1
    total.update(repr([(path.name, size) for path, size in pictures.items()]).encode())
    stride = max(1, -(-sum(pictures.values()) // WHOLE))
    for path in list(pictures)[::stride]:
        try:
            total.update(repr(digest(path)).encode())
        except VlpruneError:
            total.update(b"unreadable")
    return total.hexdigest()[:16]


def _table_of(items: Any) -> Table | None:
    """The table that the items come from; None for items that are a list."""
    while isinstance(items, Part):
        items = items.items
    return items.table if isinstance(items, Rows) else None


def _leaves(value: Any, pictures: dict[Path, int], every: int = 1) -> Iterator[Any]:
    """All that a value holds, paths as file names; the files are added to ``pictures``.

    Of pictures that a table holds, those in every so many rows are read.
    """
    if isinstance(value, TablePicture):
        yield value.name
        if value.row % every == 0:
            yield hashlib.sha256(value.open().read()).hexdigest()
    elif isinstance(value, StreamedPicture):
        yield hashlib.sha256(value.content).hexdigest()
    elif isinstance(value, StoredPicture):
        yield str(value)
    elif isinstance(value, Path):
        pictures.setdefault(value, 0)
        yield value.name
    elif dataclasses.is_dataclass(value):
        yield type(value).__name__
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), pictures, every)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield key
            yield from _leaves(entry, pictures, every)
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for entry in value:
            yield from _leaves(entry, pictures, every)
    elif value is None or isinstance(value, (str, int, float, bytes)):
        yield value
    else:  # the text of anything else may hold an address
        yield type(value).__name__


def _hash(rows: Iterable[Any]) -> str:
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:16]
