"""Structured pruning for vision-language transformers.

A Hugging Face model in, a smaller one out, that plain ``from_pretrained`` loads.
Importing this package is what teaches ``from_pretrained`` to do so; torch and transformers
are imported when a name is first used, so that the command's help appears at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .folders import hook

if TYPE_CHECKING:
    from . import errors, testing
    from .architectures import discover
    from .calibration.session import Calibration, fold, rotate
    from .cutting.gates import gated
    from .cutting.rewrite import rewrite
    from .cutting.sharing.materialize import materialize
    from .errors import VlpruneError
    from .folders.load import load
    from .folders.ordinary import ordinary
    from .folders.save import save
    from .methods import JSP, OBS, Magnitude, Random, Taylor, UPop
    from .prices import cost
    from .prices.latency import latency_prices
    from .prices.round_to import best_round_to
    from .prices.select import select
    from .structures.plan import Plan
    from .structures.structure import Attr, Description, Gate, Slot, Structure
    from .training.compressor import Compressor

__version__ = "0.1.0"

__all__ = [
    "JSP",
    "OBS",
    "Attr",
    "Calibration",
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
    "fold",
    "gated",
    "latency_prices",
    "load",
    "materialize",
    "ordinary",
    "rewrite",
    "rotate",
    "save",
    "select",
    "testing",
]

_HOME = {
    "architectures": ("discover",),
    "calibration.session": ("Calibration", "fold", "rotate"),
    "cutting.gates": ("gated",),
    "cutting.rewrite": ("rewrite",),
    "cutting.sharing.materialize": ("materialize",),
    "errors": ("VlpruneError",),
    "folders.load": ("load",),
    "folders.save": ("save",),
    "folders.ordinary": ("ordinary",),
    "methods": ("JSP", "OBS", "Magnitude", "Random", "Taylor", "UPop"),
    "prices.latency": ("latency_prices",),
    "prices.round_to": ("best_round_to",),
    "prices.select": ("select",),
    "structures.plan": ("Plan",),
    "structures.structure": ("Attr", "Description", "Gate", "Slot", "Structure"),
    "training.compressor": ("Compressor",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_MODULES = {
    "compressor": "training.compressor",  # for trainer.remove_callback(CompressorCallback)
    "cost": "prices.cost",
    "errors": "errors",
    "testing": "testing",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{_MODULES[name]}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


hook.install()
