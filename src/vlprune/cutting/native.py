"""Named subclasses that accept narrower weights than the stock forward does.

A structure names its subclass by a key. The architecture that owns the forward registers the
subclass here, so that cutting, which knows no architectures, can look it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["native_forward", "register_native_forward"]

_FORWARDS: dict[str, type[Any]] = {}
_MADE: dict[tuple[str, type[Any]], type[Any]] = {}
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


def native_forward(key: str, stock: type[Any]) -> type[Any]:
    """The subclass of ``stock`` that is registered under ``key``.

    A key without a colon names a mixin for any stock class, whose subclass is made here, once.
    Raises KeyError if the key is unknown.
    """
    found = _FORWARDS[key]
    if ":" in key:
        return found
    if (key, stock) not in _MADE:
        own = {"__module__": __name__, "__reduce_ex__": _by_stock_class, "made_from": (key, stock)}
        _MADE[key, stock] = type(f"Cut{stock.__name__}", (found, stock), own)
    return _MADE[key, stock]


def _by_stock_class(module: Any, protocol: int) -> tuple[Any, ...]:
    """How a module of a class made here is pickled: no import finds its class by its name."""
    state = object.__reduce_ex__(module, protocol)[2]
    return _blank, type(module).made_from, state


def _blank(key: str, stock: type[Any]) -> Any:
    made = native_forward(key, stock)
    return nn.Module.__new__(made)
