"""What modules remember from earlier forward passes, outside their parameters and buffers.

OmDet-Turbo keeps the text embeddings of prompts it has seen. Masked and cut model would both answer
from what the dense model remembers, and would agree whatever was cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["forgetful", "memories"]

TORCH = frozenset(vars(nn.Module()))
"""What every module holds, its parameters and buffers among it."""


def memories(model: nn.Module) -> list[MutableMapping[Any, Any]]:
    """The mappings with tensors that modules hold, themselves or in a plain object of theirs."""
    found: dict[int, MutableMapping[Any, Any]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in TORCH or isinstance(value, nn.Module | Tensor | type):
                continue
            inside = getattr(value, "__dict__", {}) if _is_plain(value) else {}
            for held in (value, *inside.values()):
                if isinstance(held, MutableMapping) and any(map(_is_memory, held.values())):
                    found[id(held)] = held
    return [*found.values()]


def _is_plain(value: object) -> bool:
    """Whether an object may be a cache: not a config, not a function."""
    return not hasattr(value, "model_type") and not callable(value)


def _is_memory(value: object) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(part, Tensor) for part in parts)


def _emptied(model: nn.Module) -> list[MutableMapping[Any, Any]]:
    """The memories, which are empty now; a number beside one that counts its entries is 0."""
    found = memories(model)
    for module in model.modules():
        for value in vars(module).values():
            inside = getattr(value, "__dict__", {}) if _is_plain(value) else {}
            sizes = {len(part) for part in inside.values() if any(part is one for one in found)}
            for name, count in inside.items():
                if type(count) is int and count in sizes and not re.search(_LIMIT, name):
                    inside[name] = 0
    for held in found:
        held.clear()
    return found


_LIMIT = "cap|max|size|limit"
"""In the names of numbers that bound a memory: a full one has as many entries."""


@contextmanager
def forgetful(model: nn.Module) -> Iterator[None]:
    """The model without memories while the block runs.

    What a pass in the block fills anew is a memory, and is empty afterwards: it was computed with
    other weights, or in another dtype. Anything else is a table, and has its entries back.
    """
    before = [(held, dict(held)) for held in memories(model)]
    _emptied(model)
    try:
        yield
    finally:
        filled = _emptied(model)
        for held, entries in before:
            if not any(held is one for one in filled):
                held.update(entries)
