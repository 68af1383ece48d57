"""Structured pruning for vision-language transformers.

A Hugging Face model in, a smaller one out, that plain ``from_pretrained`` loads.
Importing this package is what teaches ``from_pretrained`` to do so; torch and transformers
are imported when a name is first used, so that the command's help appears at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import transformers_hook

if TYPE_CHECKING:
    from . import cost, errors, testing
    from .architectures import discover
    from .budget import select
    from .checkpoint import load, save
    from .compressor import Compressor
    from .cutting import rewrite
    from .errors import VlpruneError
    from .gate import gated
    from .latency import best_round_to, latency_prices
    from .methods import JSP, Magnitude, Random, Taylor, UPop
    from .plan import Plan
    from .share import materialize
    from .stock import ordinary
    from .structure import Attr, Description, Gate, Slot, Structure

__version__ = "0.1.0"

__all__ = [
    "JSP",
    "Attr",
    "Compressor",
    "Description",
    "Gate",
    "Magnitude",
    "Plan",
    "Random",
    "Slot",
    "Structure",
    "Taylor",
    "UPop",
    "VlpruneError",
    "best_round_to",
    "cost",
    "discover",
    "errors",
    "gated",
    "latency_prices",
    "load",
    "materialize",
    "ordinary",
    "rewrite",
    "save",
    "select",
    "testing",
]

_HOME = {
    "architectures": ("discover",),
    "budget": ("select",),
    "checkpoint": ("load", "save"),
    "compressor": ("Compressor",),
    "errors": ("VlpruneError",),
    "gate": ("gated",),
    "latency": ("best_round_to", "latency_prices"),
    "methods": ("JSP", "Magnitude", "Random", "Taylor", "UPop"),
    "stock": ("ordinary",),
    "plan": ("Plan",),
    "share": ("materialize",),
    "cutting": ("rewrite",),
    "structure": ("Attr", "Description", "Gate", "Slot", "Structure"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    elif name in __all__:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


transformers_hook.install()
