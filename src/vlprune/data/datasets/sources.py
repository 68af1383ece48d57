"""Hugging Face datasets as a source: from files, from folders, and from the hub.

The package ``datasets`` reads them, by one of its own readers in :data:`READERS`. Its releases from
4 on run no code of a data set, and a reader that is not listed, such as one for pickles, is refused
here before it opens anything.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError, UnsupportedError
from ...files import HUB_NAME, plain, reason
from ...recipe.columns import Columns
from ..files import Left
from .columns import columns_in
from .rows import Place
from .streams import Stream
from .tables import Make, Rows, Table

__all__ = ["Asked", "class_names", "open_rows", "open_stream"]

READERS = ("parquet", "arrow", "csv", "json", "imagefolder", "webdataset")
"""The readers of ``datasets`` that may see a data set."""

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".tar": "webdataset",
}
"""The reader of a file, by its suffix."""

SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""What lies in a folder that ``save_to_disk`` has written."""

HIDDEN_TEST = ("test", "validation")
"""The splits that are tested on, the first of them that a data set has."""


@dataclass(frozen=True)
class Asked:
    """A split as a recipe names it: ``path``, ``name`` and ``split``, and the names of columns.

    ``part`` is ``train`` or ``test``.
    """

    part: str
    path: str
    name: str = ""
    split: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Opened:
    dataset: Any
    place: Place


def open_rows(asked: Asked, wanted: Columns, make: Any, left: Left, most: int = 0) -> Rows[Any]:
    """The items of a split, made from their rows when they are asked for.

    ``left`` counts rows that are left out; ``most`` is how many items are used (0: all). Raises
    DataError for a data set that cannot be read or lacks what is ``wanted``, UnsupportedError
    without the package ``datasets``.
    """
    opened = _open(asked, streaming=False)
    dataset, place = opened.dataset, opened.place
    found = columns_in(place.name, dataset.features, wanted, asked.columns)
    return Rows(Table(dataset, place, found), make, left, most)


def open_stream(
    asked: Asked, wanted: Columns, make: Make[Any], buffer: int = 0, most: int = 0
) -> Stream[Any]:
    """The items of a split, read while they are used. Raises as :func:`open_rows`."""
    opened = _open(asked, streaming=True)
    dataset, place = opened.dataset, opened.place
    found = columns_in(place.name, dataset.features or {}, wanted, asked.columns)
    return Stream(dataset, place, found, make, buffer, most, _contents(dataset, asked))


def class_names(items: Rows[Any] | Stream[Any], column: str) -> list[str] | None:
    """The names of all classes, in the order of their numbers; None if the data set lists none."""
    table = items.table if isinstance(items, Rows) else items
    classes = table.found[column].classes
    return None if classes is None else list(classes)


# -- opening ---------------------------------------------------------------------------


def _open(asked: Asked, streaming: bool) -> _Opened:
    library = _library()
    path, name = asked.path, plain(asked.path)
    files = _files(path)
    with _quiet(library):
        if files:
            return _from_files(library, asked, files, streaming)
        if os.path.isdir(path):
            folder = Path(path)
            if (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file():
                return _saved(library, asked, folder, streaming)
            return _from_name(library, asked, folder, streaming)
        if os.path.lexists(path):
            raise DataError(f"{name} is neither a folder nor a regular file")
        if not HUB_NAME.fullmatch(path):
            raise DataError(f"there is no file or folder {name}, and no data set can be called so")
        return _from_name(library, asked, None, streaming)


def _files(path: str) -> list[str]:
    """The files that a path or a pattern names, sorted; empty for a folder or a name."""
    if os.path.isfile(path):
        return [path]
    if not any(sign in path for sign in "*?["):
        return []
    found = sorted(one for one in glob.glob(path, recursive=True) if os.path.isfile(one))
    if not found:
        raise DataError(f"no file matches {plain(path)}")
    return found


def _from_files(library: Any, asked: Asked, files: list[str], streaming: bool) -> _Opened:
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in SUFFIXES:
        raise DataError(
            f"{plain(asked.path)} names files ending in {plain(', '.join(suffixes))}: they must "
            f"all end in one of {', '.join(SUFFIXES)}"
        )
    if asked.name:
        raise DataError(f"data.{asked.part}.name is for folders and the hub, not for files")
    split = asked.split or asked.part
    base = re.match(r"\w+", split)
    with _told(f"cannot read {plain(asked.path)}"):
        builder = library.load_dataset_builder(
            SUFFIXES[suffixes[0]], data_files={base[0] if base else split: files}
        )
    fixed = Path(re.split(r"[*?\[]", asked.path)[0])
    folder = Path(asked.path).parent if len(files) == 1 and os.path.isfile(asked.path) else fixed
    if folder == fixed and not folder.is_dir():
        folder = folder.parent
    return _built(library, builder, asked, folder, split, streaming)


def _from_name(library: Any, asked: Asked, folder: Path | None, streaming: bool) -> _Opened:
    """A folder as it lies, or a data set on the hub."""
    name = plain(asked.path)
    try:
        builder = library.load_dataset_builder(asked.path, asked.name or None)
    except ConnectionError:
        raise DataError(
            f"there is no file or folder {name}, and the hub cannot be asked for a data set of "
            "that name: without a network, give a data set that is in the cache or on the disk"
        ) from None
    except Exception as error:
        raise DataError(f"cannot open the data set {name}: {_why(error)}") from None
    reader = type(builder).__module__.rpartition(".")[2]
    cached = reader == "cache"  # what an earlier run has made of a data set on the hub
    if not type(builder).__module__.startswith("datasets.") or not (cached or reader in READERS):
        raise DataError(
            f"{name} would be read as {plain(reader)}: a data set must be one of "
            f"{', '.join(READERS)}"
        )
    there = [str(one) for one in builder.config.data_files or builder.info.splits or ()]
    split = asked.split or _default(asked, there, name)
    return _built(library, builder, asked, folder, split, streaming)


def _default(asked: Asked, there: list[str], name: str) -> str:
    """The split of a data set where the recipe names none. Raises DataError if it has no such."""
    wanted = ("train",) if asked.part == "train" else HIDDEN_TEST
    found = next((split for split in wanted if split in there), None)
    if found is None and there:
        raise DataError(
            f"{name} has no split {' or '.join(wanted)}, but {', '.join(map(plain, there))}: give "
            f"data.{asked.part}.split"
        )
    return found or wanted[0]


def _built(
    library: Any, builder: Any, asked: Asked, folder: Path | None, split: str, streaming: bool
) -> _Opened:
    with _told(f"cannot read the split {plain(split)} of {plain(asked.path)}"):
        if streaming:
            dataset = builder.as_streaming_dataset(split=split).decode(False)
        else:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=split)
    return _Opened(dataset, _place(library, asked, folder))


def _saved(library: Any, asked: Asked, folder: Path, streaming: bool) -> _Opened:
    """What ``save_to_disk`` has written: one data set, or one for each split."""
    with _told(f"cannot read {plain(folder)}"):
        found = library.load_from_disk(str(folder))
    if isinstance(found, Mapping):
        split = asked.split or _default(asked, [*found], plain(folder))
        if split not in found:
            raise DataError(
                f"{plain(folder)} has no split {plain(split)}, but {plain(', '.join(found))}"
            )
        found = found[split]
    elif asked.split:
        raise DataError(f"{plain(folder)} holds one data set: leave data.{asked.part}.split out")
    if streaming:
        found = found.to_iterable_dataset().decode(False)
    return _Opened(found, _place(library, asked, folder))


def _place(library: Any, asked: Asked, folder: Path | None) -> Place:
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (library.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return Place(asked.path, folder, tuple(Path(cache) for cache in caches))


def _contents(dataset: Any, asked: Asked) -> str:
    """What tells a stream from another: the names and sizes of its files, or its place."""
    files = sorted(_files(asked.path))
    if not files and os.path.isdir(asked.path):
        files = sorted(str(one) for one in Path(asked.path).rglob("*") if one.is_file())
    sizes = [(os.path.basename(file), os.path.getsize(file)) for file in files]
    where: Any = sizes or [asked.path, repr(dataset.info.download_checksums)]
    return repr([where, asked.name, asked.split, sorted((asked.columns).items())])


# -- the library -----------------------------------------------------------------------


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(
            "data.format: dataset needs the package datasets: pip install 'vlprune[data]'"
        ) from None
    return datasets


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's bars and warnings on the screen; as they were afterwards."""
    bars = library.are_progress_bars_disabled()
    verbosity = library.logging.get_verbosity()
    library.disable_progress_bars()
    library.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.logging.set_verbosity(verbosity)
        if not bars:
            library.enable_progress_bars()


@contextmanager
def _told(text: str) -> Iterator[None]:
    """Any error of the library as one DataError that begins with ``text``."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{text}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    """The reason at the end of a chain of errors: the library wraps those of its parsers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error) or type(error).__name__
