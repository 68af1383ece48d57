"""Pictures that are no files of their own: bytes in a table, in a stream, or at an address."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from ..errors import DataError
from ..files import plain, reason

__all__ = ["Picture", "RemotePicture", "StoredPicture", "StreamedPicture", "TablePicture"]


class StoredPicture(ABC):
    """A handle that stands where the path of a picture stands; hashable, and without pixels.

    ``name`` is the name of the file that the picture was made from, or an empty string.
    ``str(picture)`` says where the picture is. One that is not ``lasting`` is seen once, so that
    nothing made from it is worth keeping.
    """

    lasting = True
    name: str

    @abstractmethod
    def open(self) -> BinaryIO:
        """The encoded picture, open for reading. Raises DataError if it cannot be had."""

    @property
    def stem(self) -> str:
        """The name without its suffix, as that of a path."""
        return PurePosixPath(self.name).stem


Picture = Path | StoredPicture
"""What can be opened as a picture."""


ONLY = -1
"""The index of a picture that is not one of a list."""


class HoldsPictures(Protocol):
    """A table with pictures in it."""

    @property
    def name(self) -> str:
        """The name of the table, for messages."""

    def open_bytes(self, column: str, row: int, index: int = ...) -> BinaryIO:
        """The bytes in one row and column, open for reading; of a list, those at ``index``."""


@dataclass(frozen=True, slots=True)
class TablePicture(StoredPicture):
    """The picture in one row and column of a table, or the one at ``index`` of the list there."""

    table: HoldsPictures
    column: str
    row: int
    name: str = ""
    index: int = ONLY

    def open(self) -> BinaryIO:
        """The bytes where the table has them, not copied."""
        return self.table.open_bytes(self.column, self.row, self.index)

    def __str__(self) -> str:
        which = "" if self.index == ONLY else f" {self.index}"
        return f"{self.table.name}, row {self.row}, {self.column}{which}"


@dataclass(frozen=True, slots=True, eq=False)
class StreamedPicture(StoredPicture):
    """A picture whose bytes came with a row of a stream."""

    lasting = False
    content: bytes
    place: str
    name: str = ""

    def open(self) -> BinaryIO:
        """The bytes in memory."""
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.place


@dataclass(frozen=True, slots=True)
class RemotePicture(StoredPicture):
    """A picture of a stream that lies in an archive or on the hub, as ``zip://1.jpg::a.zip``."""

    lasting = False
    address: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """The last part of the address of the picture itself."""
        return PurePosixPath(self.address.partition("::")[0]).name

    def open(self) -> BinaryIO:
        """The bytes, fetched anew. Raises DataError if they cannot be."""
        import fsspec

        try:
            with fsspec.open(self.address, "rb") as file:
                return io.BytesIO(file.read())
        except Exception as error:  # each file system has its own
            raise DataError(f"cannot fetch {plain(self.address)}: {reason(error)}") from None

    def __str__(self) -> str:
        return self.address
