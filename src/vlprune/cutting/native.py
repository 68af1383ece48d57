"""Named subclasses that accept narrower weights than the stock forward does.

A structure names its subclass by a key. The architecture that owns the forward registers the
subclass here, so that cutting, which knows no architectures, can look it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["native_forward", "register_native_forward"]

_FORWARDS: dict[str, type[Any]] = {}
C = TypeVar("C", bound=type[Any])


def register_native_forward(key: str) -> Callable[[C], C]:
    """Class decorator that registers a subclass under ``key``.

    The class must have a method ``adopt()``, called once on a module of the stock class right
    after its ``__class__`` was swapped and before any weight is cut.
    """

    def register(cls: C) -> C:
        _FORWARDS[key] = cls
        return cls

    return register


def native_forward(key: str) -> type[Any]:
    """The class registered under ``key``. Raises KeyError if the key is unknown."""
    return _FORWARDS[key]
