"""A model whose weights are read when they are used, and dropped when others need the room.

Whatever code asks a module for a parameter gets the real one: a forward pass, statistics, a repair.
Parameters that were changed in place are written to a file before they are dropped, so the model
behaves as if it were in memory. Lists of all parameters hold placeholders of NaN with the right
shape, dtype and device, and one number of memory each.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import plain, reason
from .layerwise import Weights

__all__ = ["Pages", "Place", "paged", "pages_of", "resident"]

Place = tuple[Path, str]
"""A safetensors file, and the name of a weight in it."""


class Pages:
    """The weights of a model that has none in memory.

    ``stored`` gives the weight of a name as it was at the start, ``room`` is how many bytes are
    held at a time, ``folder`` is where changed weights are written, one file each. Who changes a
    weight in place must have done so before ``room`` bytes of other weights are read.
    """

    def __init__(
        self, model: nn.Module, stored: Weights, room: int, folder: Path, device: torch.device
    ) -> None:
        self.room, self.folder, self.device = room, folder, device
        self._stored = stored
        self._first: dict[str, str] = {}  # of all names of a tied parameter
        self._held: OrderedDict[str, nn.Parameter] = OrderedDict()
        self._versions: dict[str, int] = {}
        self._storages: dict[int, str] = {}
        self._files: dict[str, Place] = {}
        self._asked: set[Path] = set()
        self._used = self._count = 0
        self._placeholders: dict[str, nn.Parameter] = {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._first[name] = first.setdefault(id(parameter), name)

    def parameter(self, name: str, placeholder: nn.Parameter) -> nn.Parameter:
        """The real parameter, which stays in memory until there is no more room for it."""
        name = self._first[name]
        self._placeholders[name] = placeholder
        found = self._held.get(name)
        if found is None:
            found = nn.Parameter(self._read(name).to(self.device), placeholder.requires_grad)
            self._make_room(found.nbytes)
            self._held[name], self._versions[name] = found, found._version
            self._storages[found.untyped_storage().data_ptr()] = name
            self._used += found.nbytes
        self._held.move_to_end(name)
        if found.requires_grad != placeholder.requires_grad:
            found.requires_grad_(placeholder.requires_grad)
        return found

    def weight(self, name: str) -> Tensor:
        """The numbers of a parameter, read again if they have been dropped."""
        name = self._first[name]
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name].detach()
        return self.parameter(name, self._placeholders[name]).detach()

    def now(self, name: str) -> Tensor:
        """The weight of a name with all changes so far, for a reader who keeps it to himself."""
        first = self._first.get(name, name)
        held = self._held.get(first)
        return self._read(first) if held is None else held.detach().clone()

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of the parameter in memory that a tensor is a view of, if any."""
        return self._storages.get(tensor.untyped_storage().data_ptr())

    def place(self, name: str) -> Place | None:
        """Where a weight lies as it is now, for :meth:`put_back`; None: it was never changed."""
        name = self._first[name]
        if name in self._held:
            self._write_if_changed(name)
        place = self._files.get(name)
        if place is not None:
            self._asked.add(place[0])
        return place

    def put_back(self, places: Mapping[str, Place | None]) -> None:
        """Let weights be what they are at these places, such as :meth:`place` gave."""
        for name, place in places.items():
            first = self._first[name]
            self._drop(first)
            self._move(first, place)

    def flush(self) -> None:
        """Write every change, and drop all weights from memory."""
        self._make_room(self.room + 1)

    def close(self) -> None:
        """Forget all weights and all changes, and remove the files."""
        for name in list(self._held):
            self._drop(name)
        self._files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def buffer(self, name: str) -> Tensor:
        """The buffer of a name, which no file of changes holds."""
        return self._stored(name).to(self.device)

    def _read(self, name: str) -> Tensor:
        """A weight in memory of its own, where torch puts new tensors.

        Kernels sum in another order where a tensor begins at another address modulo 64.
        """
        if name not in self._files:
            return self._stored(name).detach().clone()
        path, key = self._files[name]
        try:
            with safe_open(path, "pt", backend="pread") as file:
                return file.get_tensor(key).clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {plain(path)}: {reason(error)}") from None

    def _make_room(self, size: int) -> None:
        while self._held and self._used + size > self.room:
            oldest = next(iter(self._held))
            self._write_if_changed(oldest)
            self._drop(oldest)

    def _drop(self, name: str) -> None:
        parameter = self._held.pop(name, None)
        if parameter is not None:
            self._storages.pop(parameter.untyped_storage().data_ptr(), None)
            self._used -= parameter.nbytes

    def _write_if_changed(self, name: str) -> None:
        parameter = self._held[name]
        if parameter._version == self._versions[name]:
            return
        self._count += 1
        path = self.folder / f"{self._count}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: parameter.detach().cpu().contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {plain(path)}: {reason(error)}") from error
        self._move(name, (path, name))
        self._versions[name] = parameter._version

    def _move(self, name: str, place: Place | None) -> None:
        """Note where a weight lies now; its last file goes, unless somebody may want it back."""
        old = self._files.pop(name, None)
        if old is not None and old[0].parent == self.folder and old[0] not in self._asked:
            old[0].unlink(missing_ok=True)
        if place is not None:
            self._files[name] = place


class _Paged(dict[str, Any]):
    """The parameters of one module. Reading one by its name reads it from the pages.

    ``values`` and ``items`` give the placeholders, so that a list of all parameters loads none.
    """

    def __init__(self, pages: Pages, path: str, placeholders: Mapping[str, Any]) -> None:
        super().__init__(placeholders)
        self.pages, self.path = pages, path

    def __getitem__(self, leaf: str) -> Any:
        placeholder = super().__getitem__(leaf)
        if placeholder is None:
            return None
        return self.pages.parameter(f"{self.path}.{leaf}".lstrip("."), placeholder)


@contextmanager
def paged(model: nn.Module, pages: Pages) -> Iterator[None]:
    """The empty model with its weights on ``pages`` while the block runs.

    Buffers, which are small, are read at once. Files of changed weights are removed at the end.
    """
    pages.close()  # a run that was killed leaves files
    made: dict[int, nn.Parameter] = {}
    with ExitStack() as undo:
        undo.callback(pages.close)
        for path, module in model.named_modules():
            for leaf, buffer in list(module._buffers.items()):
                if buffer is not None:
                    name = f"{path}.{leaf}".lstrip(".")
                    real = pages.buffer(name) if buffer.is_meta else buffer.to(pages.device)
                    undo.callback(module._buffers.__setitem__, leaf, buffer)
                    module._buffers[leaf] = real
            undo.callback(module.__dict__.__setitem__, "_parameters", module._parameters)
            placeholders = {
                leaf: None if one is None else made.setdefault(id(one), _placeholder(one, pages))
                for leaf, one in module._parameters.items()
            }
            module.__dict__["_parameters"] = _Paged(pages, path, placeholders)
        yield


def _placeholder(parameter: nn.Parameter, pages: Pages) -> nn.Parameter:
    nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=pages.device)
    return nn.Parameter(nothing.expand(parameter.shape), parameter.requires_grad)


def pages_of(model: nn.Module) -> Pages | None:
    """The pages that a model's weights are on; None for a model in memory."""
    parameters: Any = model._parameters
    return parameters.pages if isinstance(parameters, _Paged) else None


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """A part of a paged model with all of its weights in memory while the block runs.

    Its parameters can then be listed, and be given other data. A model in memory is left alone.
    """
    pages = pages_of(module)
    if pages is None:
        yield
        return
    tables = [(part, part._parameters) for part in module.modules()]
    real: dict[int, nn.Parameter] = {}
    try:
        for part, table in tables:
            loaded = {}
            for leaf, placeholder in table.items():
                if placeholder is not None and id(placeholder) not in real:
                    value = pages.now(f"{table.path}.{leaf}".lstrip("."))  # type: ignore[attr-defined]
                    real[id(placeholder)] = nn.Parameter(value, placeholder.requires_grad)
                loaded[leaf] = None if placeholder is None else real[id(placeholder)]
            part.__dict__["_parameters"] = loaded
        yield
    finally:
        for part, table in tables:
            changed = part._parameters
            part.__dict__["_parameters"] = table
            for leaf, parameter in changed.items():
                if parameter is not None:
                    ours: Tensor = table[leaf].detach()  # type: ignore[union-attr]
                    if not torch.equal(_bits(ours), _bits(parameter.detach())):
                        ours.copy_(parameter.detach())


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: 0 and -0 are equal, but not the same."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
