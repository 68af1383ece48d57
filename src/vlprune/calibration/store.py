"""Tensors set aside: finished steps, originals to put back, activations that wait their turn."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..cutting.paged import Place, pages_of
from ..errors import CheckpointError
from ..files import plain, reason

__all__ = ["IN_MEMORY", "Originals", "Parked", "Shelf", "Steps", "lies_in", "put"]

IN_MEMORY = 256 * 2**20
"""Bytes that may be held in memory whatever the size of the model; more lies in a file."""


@torch.no_grad()
def put(model: nn.Module, tensors: Mapping[str, Tensor], file: Path | None = None) -> None:
    """Copy tensors into the parameters of the same names.

    A model that is not in memory notes that they lie in ``file``, if that is given.
    """
    if file is not None and pages_of(model) is not None:
        lies_in(model, tensors, file)
        return
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)


def lies_in(model: nn.Module, names: Iterable[str], file: Path | None) -> None:
    """Tell a model that is not in memory that ``file``, if there is one, holds these weights."""
    pages = pages_of(model)
    if pages is not None and file is not None:
        pages.put_back({name: (file, name) for name in names})


class Steps:
    """Finished steps of one calibration, a file each; without a folder nothing is kept.

    A file counts only for the same ``key``, which names the model, the batches and the options.
    """

    def __init__(self, folder: Path | None = None, key: str = "") -> None:
        self.folder, self.key = folder, key

    def below(self, key: str) -> Steps:
        """The steps in the same folder that count for this key only, too."""
        return Steps(self.folder, f"{self.key}/{key}")

    def known(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts of a finished step; None if it has to be done."""
        if self.folder is None:
            return None
        try:
            with safe_open(self._path(name), "pt") as file:
                facts = json.loads((file.metadata() or {}).get("facts", "{}"))
                if facts.pop("key", None) != self.key:
                    return None
                return {n: file.get_tensor(n) for n in file.keys()}, facts  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):  # not there, or damaged: done again
            return None

    def remember(
        self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write a finished step, whole or not at all. Raises CheckpointError if that fails."""
        if self.folder is None:
            return
        path = self._path(name)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        text = json.dumps({"key": self.key, **(facts or {})})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            plain_tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_file(plain_tensors, part, metadata={"facts": text})
            part.replace(path)
        except OSError as error:
            raise CheckpointError(f"cannot write {plain(path)}: {reason(error)}") from None
        finally:
            part.unlink(missing_ok=True)

    def file(self, name: str) -> Path | None:
        """The file of a step, if steps are kept."""
        return None if self.folder is None else self._path(name)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


class Originals:
    """The parameters of a model as they were, to be put back if anything fails.

    Of a model that is not in memory only the places are noted where its weights lie.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._held: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._places: dict[str, Place | None] = {}
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, names: Iterable[str]) -> None:
        """Note these parameters, unless they are noted already."""
        pages = pages_of(self.model)
        if pages is not None:
            new = [name for name in names if name not in self._places]
            self._places |= {name: pages.place(name) for name in new}
            return
        new = [n for n in dict.fromkeys(names) if n not in self._held and n not in self._files]
        tensors = {name: self.model.get_parameter(name).detach().cpu().clone() for name in new}
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        if self._bytes <= IN_MEMORY or not tensors:
            self._held |= tensors
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vlprune-")
        path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file(tensors, path)
        self._files |= dict.fromkeys(tensors, path)

    def __bool__(self) -> bool:
        return bool(self._held or self._files or self._places)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore every noted parameter in place."""
        pages = pages_of(self.model)
        if pages is not None:
            pages.put_back(self._places)
        put(self.model, self._held)
        for path in set(self._files.values()):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.model.get_parameter(name).copy_(file.get_tensor(name))

    def forget(self) -> None:
        """Drop all notes, and the temporary file."""
        self._held, self._files, self._places, self._bytes = {}, {}, {}, 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Shelf:
    """Room for activations that wait: ``room`` bytes in memory, whatever is more on disk.

    Storage at one of the addresses ``others``, or of a tensor that ``is_weight`` knows, belongs to
    somebody else, and is never set aside.
    """

    def __init__(
        self,
        room: int,
        others: Iterable[int] = (),
        is_weight: Callable[[Tensor], object] = lambda tensor: False,
    ) -> None:
        self.room, self.others, self.is_weight = room, frozenset(others), is_weight
        self.used = 0
        self._count = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def beside(cls, model: nn.Module, inputs: Iterable[Mapping[str, Any]]) -> Shelf:
        """A shelf with room for a quarter of the model's bytes, and at least 256 MiB.

        The model's own tensors and those of ``inputs`` are never set aside. A model that is not in
        memory gives no room.
        """
        pages = pages_of(model)
        size = 0 if pages else sum(p.numel() * p.element_size() for p in model.parameters())
        given = (t for batch in inputs for t in batch.values() if isinstance(t, Tensor))
        owned = chain(model.parameters(), model.buffers(), given)
        addresses = (t.untyped_storage().data_ptr() for t in owned)
        is_weight = pages.name_of if pages else lambda tensor: None
        return cls(max(IN_MEMORY, size // 4), addresses, is_weight)

    def park(self, tensor: Tensor | None) -> Parked:
        """Set a tensor aside. Nobody may read it, or another view of it, unless it is awake."""
        return Parked(self, tensor if tensor is not None and self._may(tensor) else None)

    def _may(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        owned = storage.data_ptr() in self.others or self.is_weight(tensor)
        return whole and storage.resizable() and not owned

    def place(self) -> Path:
        """The path of a file that does not exist yet."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vlprune-")
        self._count += 1
        return Path(self._folder.name) / str(self._count)

    def close(self) -> None:
        """Remove what is left on disk."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Parked:
    """One tensor on a shelf: :meth:`take` it back for good, or read it :meth:`awake`."""

    def __init__(self, shelf: Shelf, tensor: Tensor | None) -> None:
        self.shelf = shelf
        self.tensor = tensor
        self.file: Path | None = None
        self.size = self.tensor.untyped_storage().nbytes() if self.tensor is not None else 0
        if shelf.used + self.size <= shelf.room or not self.size:
            shelf.used += self.size
            return
        self.file = shelf.place()
        self._bytes().cpu().clone().numpy().tofile(self.file)  # numpy pins the storage it views
        self._drop()

    def take(self) -> None:
        """Put the tensor back into memory, for good."""
        if self.file is None:
            self.shelf.used -= self.size
        elif self.tensor is not None:
            self._load()
            self.file.unlink(missing_ok=True)
        self.tensor, self.file, self.size = None, None, 0

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The tensor in memory while the block runs; changes made to it meanwhile are lost."""
        if self.file is None:
            yield
            return
        self._load()
        try:
            yield
        finally:
            self._drop()

    def _bytes(self) -> Tensor:
        assert self.tensor is not None
        return torch.empty(0, dtype=torch.uint8, device=self.tensor.device).set_(
            self.tensor.untyped_storage()
        )

    def _drop(self) -> None:
        assert self.tensor is not None
        self.tensor.untyped_storage().resize_(0)

    def _load(self) -> None:
        assert self.tensor is not None
        assert self.file is not None
        self.tensor.untyped_storage().resize_(self.size)
        self._bytes().copy_(torch.from_numpy(np.fromfile(self.file, dtype=np.uint8)))
