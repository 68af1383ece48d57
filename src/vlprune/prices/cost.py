"""The functions of ``vlprune.cost``: parameters and MACs of a plan, of gates and of a unit."""

from __future__ import annotations

from .macs import MacsProfile, macs, macs_of, measure_macs
from .params import param_prices, params
from .prices import Prices

__all__ = [
    "MacsProfile",
    "Prices",
    "macs",
    "macs_of",
    "measure_macs",
    "param_prices",
    "params",
]
