"""A model without weights, and its weights read from the folder when they are asked for.

transformers does the loading: its own ``from_pretrained`` runs, with tensors on the meta device in
place of those in the files. So names, dtypes, merged and split weights, ties and configs are those
of an ordinary load. The same functions then load single tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils.hub import cached_file

from ..cutting.sharing.ties import WholeWeights, ties_in
from ..errors import CheckpointError, UnsupportedError
from ..files import plain, reason
from ..folders.opening import from_folder, model_class, open_config
from ..structures.units import owner_of

__all__ = ["LazyWeights", "Source", "folder_of", "open_source"]


@dataclass(frozen=True)
class Source:
    """A model on the meta device, and its weights by name.

    Index buffers and what the files do not hold (rotary frequencies) are real numbers in ``model``.
    """

    model: Any
    weights: Mapping[str, Tensor]

    @cached_property
    def weight(self) -> Callable[[str], Tensor]:
        """The weight of a name as a forward pass reads it, shared weights put together."""
        whole, dtype = WholeWeights(self.model, self.weights.__getitem__), self.model.dtype
        shared = {tie.target for tie in ties_in(self.model)}
        return lambda name: whole(name).to(dtype) if name in shared else whole(name)


def folder_of(name: str | Path) -> Path:
    """The folder of a model: itself, or where the cache of the hub holds its files."""
    if Path(name).is_dir():
        return Path(name)
    found = cached_file(str(name), "config.json")
    assert found is not None
    return Path(found).parent


def open_source(name: str | Path) -> Source:
    """The model in a folder or on the hub, without its weights in memory.

    Raises CheckpointError, UnsupportedError as :func:`vlprune.folders.opening.open_model` does, and
    UnsupportedError for a folder that lacks weights, which a load in memory would make up.
    """
    cls = model_class(open_config(name).to_dict(), name)
    found: list[LazyWeights] = []

    def load(
        model: Any, _state: Any, files: Sequence[str], config: Any, _expected: Any = None
    ) -> tuple[Any, None]:
        weights = LazyWeights(model, files, config)
        found.append(weights)
        return weights.told, None

    lazy = type(
        cls.__name__,
        (cls,),
        {"_load_pretrained_model": staticmethod(load), "__module__": cls.__module__},
    )
    model, info = from_folder(lazy, name, output_loading_info=True)
    model.__class__ = cls
    (weights,) = found
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsupportedError(
            f"{plain(name)} lacks the weights of {plain(missing[0])} and {len(missing) - 1} more, "
            "which a load would make up: save the model once with save_pretrained"
        )
    weights.know_ties(model)
    return Source(model, weights)


@dataclass
class _Group:
    """Tensors of the files that become one or more weights of the model.

    ``converted``: they are merged, split or turned on the way, rather than only renamed.
    """

    keys: list[str]
    converted: bool


class LazyWeights(Mapping[str, Tensor]):
    """{name in the model: weight}, read from the files at every access and kept by nobody.

    A weight has the bits and the dtype that it has after an ordinary load. ``told`` is what
    transformers says about the load.
    """

    def __init__(self, model: Any, files: Sequence[str], config: Any) -> None:
        self._handles = {key: handle for file in files for key, handle in _keys_of(file)}
        self._config = replace(config, device_map={"": "meta"})
        groups = _groups_of(model, config.weight_mapping or [], self._handles)
        self._empty: Any = None
        if any(group.converted for group in groups.values()):
            self._empty = copy.deepcopy(model)
        stubs = {key: _Stub(handle.get_slice(key)) for key, handle in self._handles.items()}
        self.told, _ = convert_and_load_state_dict_in_model(model, stubs, self._config)
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self._owner: dict[str, _Group] = {}
        for first, group in groups.items():
            names = self._load(group, stubs, "meta") if group.converted else (first,)
            self._owner.update(dict.fromkeys(names, group))
        self._last: tuple[_Group, dict[str, Tensor]] | None = None
        self._leave_one_of_two(model)
        self._fill_integers(model)

    def __getitem__(self, name: str) -> Tensor:
        group = self._owner[name]
        if not group.converted:
            return self._read(group.keys[0]).to(self._dtypes[name])
        if self._last is None or self._last[0] is not group:
            self._last = None  # two groups need not be in memory at a time
            slices = {key: self._handles[key].get_slice(key) for key in group.keys}
            self._last = group, self._load(group, slices, "cpu")
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def know_ties(self, model: Any) -> None:
        """Let every name of a tied weight stand for the one that the files hold."""
        tied: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            tied.setdefault(id(tensor), []).append(name)
        for names in tied.values():
            held = next((name for name in names if name in self._owner), None)
            if held is not None:
                self._owner |= dict.fromkeys(names, self._owner[held])
                self._dtypes |= dict.fromkeys(names, self._dtypes[held])

    def _read(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._handles[key].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {plain(key)}: {reason(error)}") from None
        return tensor

    def _load(self, group: _Group, tensors: Mapping[str, Any], device: str) -> dict[str, Tensor]:
        """The weights that a group becomes, by transformers' own conversion."""
        model, config = self._empty, replace(self._config, device_map={"": device})
        before = model.state_dict(keep_vars=True)
        part = {key: tensors[key] for key in group.keys}
        convert_and_load_state_dict_in_model(model, part, config)
        after = model.state_dict(keep_vars=True)
        made = {name: tensor for name, tensor in after.items() if tensor is not before[name]}
        for name in made:
            path, leaf = owner_of(name)
            setattr(model.get_submodule(path), leaf, before[name])
        return {name: tensor.detach() for name, tensor in made.items()}

    def _leave_one_of_two(self, model: Any) -> None:
        """Of two weights that the config ties and the files both hold, drop the second if equal.

        transformers compares them after a load, which it cannot do without their numbers.
        """
        for target, source in list(model.all_tied_weights_keys.items()):
            if target not in self._owner or source not in self._owner:
                continue
            if torch.equal(self[target], self[source]):
                del self._owner[target]
                self.told.missing_keys.add(target)
            else:
                del model.all_tied_weights_keys[target]

    def _fill_integers(self, model: Any) -> None:
        """Give the model its index buffers, which are checked, and read to find what is shared."""
        for name, buffer in model.named_buffers():
            if name in self._owner and not buffer.is_floating_point():
                path, leaf = owner_of(name)
                model.get_submodule(path)._buffers[leaf] = self[name]


class _Stub:
    """The shape and dtype of a tensor in a file, for a load that reads no numbers."""

    def __init__(self, piece: Any) -> None:
        self.piece = piece

    def get_dtype(self) -> str:
        """The dtype as the file names it."""
        return str(self.piece.get_dtype())

    def __getitem__(self, _index: object) -> Tensor:
        dtype = str_to_torch_dtype[self.get_dtype()]
        return torch.empty(self.piece.get_shape(), dtype=dtype, device="meta")


def _keys_of(file: str) -> Iterator[tuple[str, Any]]:
    """(key, open file) of every tensor in a file, which is read rather than mapped.

    Pages of a mapped file would count as memory of this process for as long as the file is open.
    """
    try:
        handle = safe_open(file, framework="pt", device="cpu", backend="pread")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {plain(file)}: {reason(error)}") from None
    yield from ((key, handle) for key in handle.keys())  # noqa: SIM118


def _groups_of(model: Any, mapping: Sequence[Any], keys: Iterable[str]) -> dict[str, _Group]:
    """{first weight that a group becomes: group}, by the rules that transformers loads with."""
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, _Group] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if name in state:
            groups.setdefault(name, _Group([], pattern is not None)).keys.append(key)
    return groups
