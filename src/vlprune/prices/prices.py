"""Price lists: the cost of one unit of each structure, and of all that always stays."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Floor", "Prices", "floor_cost", "least", "whole_cost"]


@dataclass(frozen=True)
class Prices:
    """The price list of a model: ``fixed`` for what always stays, ``unit`` for each unit.

    ``what`` is one of ``CURRENCIES``, the currency of all prices (seconds for latency);
    ``sizes`` are the units of each structure. A unit whose weights are stored elsewhere
    (sharing) costs ``borrowed`` instead; ``elsewhere`` lists such units of a model that shares
    already. Where the cost is not a sum over units, ``curve`` holds the cost of 0, 1, ... units of
    a structure together, and ``unit`` is the average. ``at_least`` says how many experts
    must stay of a structure whose units are experts; these go one by one, not in blocks.
    """

    what: str
    unit: Mapping[str, float]
    sizes: Mapping[str, int]
    fixed: float
    borrowed: Mapping[str, float] = field(default_factory=dict)
    elsewhere: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    curve: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    at_least: Mapping[str, int] = field(default_factory=dict)

    def last(self, name: str, round_to: int = 1) -> int:
        """How many units of a structure always stay if units go in blocks of ``round_to``."""
        return self.at_least.get(name, min(round_to, self.sizes[name]))

    def of(self, name: str) -> np.ndarray[Any, Any]:
        """The cost of each unit of a structure: (size,), float64."""
        prices = np.full(self.sizes[name], self.unit[name], dtype=np.float64)
        if name in self.elsewhere:
            prices[list(self.elsewhere[name])] = self.borrowed[name]
        return prices

    def whole(self, name: str) -> float:
        """The cost of all units of a structure together."""
        if name in self.curve:
            return self.curve[name][-1]
        return float(self.of(name).sum())

    def ranked(self, name: str, order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What each unit saves when the units go in this ``order``, one by one: (size,)."""
        if name in self.curve:
            return -np.diff(np.asarray(self.curve[name])[::-1])
        return self.of(name)[order]

    def fixing(self, names: Collection[str]) -> Prices:
        """The same prices with the structures ``names`` whole, so that they count as fixed."""
        if not names:
            return self

        def others(table: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in table.items() if name not in names}

        whole = sum(self.whole(name) for name in self.unit if name in names)
        return Prices(
            self.what,
            others(self.unit),
            others(self.sizes),
            self.fixed + whole,
            others(self.borrowed),
            others(self.elsewhere),
            others(self.curve),
            others(self.at_least),
        )

    @property
    def total(self) -> float:
        """The cost of the uncut model."""
        return self.fixed + sum(self.whole(name) for name in self.unit)

    def cost(self, kept: Mapping[str, int | Sequence[int]]) -> float:
        """The cost of the model when the units ``kept`` of each structure stay (absent: all).

        A number in place of the units means that many units, where all cost the same.
        """
        total = self.fixed
        for name, price in self.unit.items():
            units = kept.get(name, self.sizes[name])
            if name in self.curve:
                total += self.curve[name][units if isinstance(units, int) else len(units)]
            elif isinstance(units, int):
                total += price * units if name not in self.elsewhere else self.whole(name)
            else:
                total += float(self.of(name)[list(units)].sum())
        return total


@dataclass(frozen=True)
class Floor:
    """At least ``share`` of what the units of ``structures`` cost together must stay."""

    name: str
    structures: tuple[str, ...]
    share: float


def least(prices: Prices, round_to: int = 1, floors: Sequence[Floor] = ()) -> float:
    """The smallest fraction of the total in reach whatever the scores: the last units alone.

    Where the units of a structure differ in price, its dearest block counts. With ``floors`` the
    result is a lower bound: units are whole, so a plan may have to stay above it.
    """
    last = {
        name: prices.curve[name][prices.last(name, max(1, round_to))]
        if name in prices.curve
        else float(np.sort(prices.of(name))[-prices.last(name, max(1, round_to)) :].sum())
        for name in prices.sizes
    }
    lowest = prices.fixed + sum(last.values())
    for floor in floors:
        own = sum(last[name] for name in floor.structures)
        lowest += max(0.0, floor_cost(floor, prices) - own)
    # floors of 1 add up to the whole, which may round above the total
    return min(1.0, lowest / prices.total)


def whole_cost(names: Sequence[str], prices: Prices) -> float:
    """The cost of all units of these structures together."""
    return sum(prices.whole(name) for name in names)


def floor_cost(floor: Floor, prices: Prices) -> float:
    """The cost that must stay at least, in the currency of ``prices``."""
    return floor.share * whole_cost(floor.structures, prices)
