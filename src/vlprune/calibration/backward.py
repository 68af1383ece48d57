"""A backward pass through a model that is not in memory.

A graph would hold every weight and every activation that it needs. Of a weight it notes the name
and reads it again; activations for which there is no room lie in files until their turn comes.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cutting.paged import Pages, pages_of
from .store import IN_MEMORY

__all__ = ["set_aside"]

SMALL = 2**16
"""Bytes of a tensor that is not worth a file."""
LINE = 64
"""Bytes to which torch aligns new tensors; kernels sum in another order at other addresses."""


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Graphs of a model on pages hold no weights, and at most ``IN_MEMORY`` bytes of the rest."""
    pages = pages_of(model)
    if pages is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vlprune-") as place:
        saved = _Saved(pages, IN_MEMORY, Path(place))
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            yield


@dataclass(frozen=True)
class _Weight:
    """A view of a weight."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Held:
    """An activation in memory, counted as long as a graph holds it."""

    def __init__(self, saved: _Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        saved.used += tensor.nbytes

    def __del__(self) -> None:
        self.saved.used -= self.tensor.nbytes


class _Filed:
    """An activation in a file, which is removed with it."""

    def __init__(self, tensor: Tensor, path: Path) -> None:
        self.path, self.dtype, self.device = path, tensor.dtype, tensor.device
        self.size, self.stride = tensor.size(), tensor.stride()
        self.offset = tensor.data_ptr() % LINE // tensor.element_size()
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tofile(path)

    def read(self) -> Tensor:
        """The activation, laid out in memory as it was."""
        span = 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        room = torch.empty(self.offset + span, dtype=self.dtype, device=self.device)
        found = room.as_strided(self.size, self.stride, self.offset)
        numbers = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8)).view(self.dtype)
        return found.copy_(numbers.reshape(self.size))

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


class _Saved:
    """What graphs have saved."""

    def __init__(self, pages: Pages, room: int, folder: Path) -> None:
        self.pages, self.room, self.folder = pages, room, folder
        self.used = 0
        self._numbers = itertools.count()

    def pack(self, tensor: Tensor) -> Any:
        name = self.pages.name_of(tensor)
        if name is not None:
            return _Weight(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        fits = self.used + tensor.nbytes <= self.room
        if fits or tensor.nbytes < SMALL or not _apart(tensor):
            return _Held(self, tensor)
        return _Filed(tensor, self.folder / str(next(self._numbers)))

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _Held):
            return saved.tensor
        if isinstance(saved, _Filed):
            return saved.read()
        weight = self.pages.weight(saved.name)
        return weight.as_strided(saved.size, saved.stride, saved.offset)


def _apart(tensor: Tensor) -> bool:
    """Whether every number of a tensor has a place of its own in memory."""
    reach = 0
    for step, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1 and step <= reach:
            return False
        reach += (count - 1) * step
    return True
