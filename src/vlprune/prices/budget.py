"""Budgets, price lists, and the one solver that turns scores into units that stay.

Pure: numbers in, numbers out, no torch, no model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import BudgetError, did_you_mean
from ..files import shown

__all__ = ["Budget", "Floor", "Prices", "least", "parse_budget", "select"]

CURRENCIES = ("params", "macs", "latency")


@dataclass(frozen=True)
class Budget:
    """The fraction of the whole model's ``what`` (one of ``CURRENCIES``) that stays."""

    what: str
    fraction: float


@dataclass(frozen=True)
class Prices:
    """The price list of a model: ``fixed`` for what always stays, ``unit`` for each unit.

    ``what`` is one of ``CURRENCIES``; ``sizes`` are the units of each structure. A unit whose
    weights are stored elsewhere (sharing) costs ``borrowed`` instead; ``elsewhere`` lists those of
    a model that shares already. Where prices are no sum over units, ``curve`` says what 0, 1, ...
    units of a structure cost together, and ``unit`` is the average.
    """

    what: str
    unit: Mapping[str, float]
    sizes: Mapping[str, int]
    fixed: float
    borrowed: Mapping[str, float] = field(default_factory=dict)
    elsewhere: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    curve: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, name: str) -> np.ndarray[Any, Any]:
        """What each unit of a structure costs: (size,)."""
        prices = np.full(self.sizes[name], self.unit[name], dtype=np.float64)
        if name in self.elsewhere:
            prices[list(self.elsewhere[name])] = self.borrowed[name]
        return prices

    def whole(self, name: str) -> float:
        """What all units of a structure cost together."""
        if name in self.curve:
            return self.curve[name][-1]
        return float(self.of(name).sum())

    def ranked(self, name: str, order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What each unit saves when they go in this order, those before it being gone: (size,)."""
        if name in self.curve:
            return -np.diff(np.asarray(self.curve[name])[::-1])
        return self.of(name)[order]

    def fixing(self, names: Collection[str]) -> Prices:
        """The same prices where these structures stay whole, and so count as fixed."""
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
        )

    @property
    def total(self) -> float:
        """What the uncut model costs."""
        return self.fixed + sum(self.whole(name) for name in self.unit)

    def cost(self, kept: Mapping[str, int | Sequence[int]]) -> float:
        """What the model costs when these units of each structure stay (absent: all).

        A number of units stands for any so many of a structure whose units cost the same.
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


def parse_budget(budget: Mapping[str, Any]) -> Budget:
    """The budget in a mapping such as ``{"params": 0.5}``. Raises BudgetError."""
    if not isinstance(budget, Mapping) or len(budget) != 1:
        raise BudgetError(
            f"budget must name one thing and the fraction of it that stays, as in "
            f'{{"params": 0.5}}, not {shown(budget)}'
        )
    ((what, fraction),) = budget.items()
    if what not in CURRENCIES:
        raise BudgetError(
            f"budget must be in {', '.join(CURRENCIES[:-1])} or {CURRENCIES[-1]}, not "
            f"{shown(what)}.{did_you_mean(shown(what), CURRENCIES)}"
        )
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not number or not 0 < fraction <= 1:
        raise BudgetError(
            f"budget.{what} must be the fraction that stays, a number above 0 and at most 1, "
            f"not {shown(fraction)}"
        )
    return Budget(str(what), float(fraction))


def least(prices: Prices, round_to: int = 1, floors: Sequence[Floor] = ()) -> float:
    """The smallest fraction that is reached whatever the scores: one block of each structure stays.

    Where units of a structure differ in price, that is its dearest block. With ``floors`` a lower
    bound: units are whole, so a plan may have to stay above it.
    """
    last = {
        name: prices.curve[name][min(max(1, round_to), size)]
        if name in prices.curve
        else float(np.sort(prices.of(name))[-max(1, round_to) :].sum())
        for name, size in prices.sizes.items()
    }
    lowest = prices.fixed + sum(last.values())
    for floor in floors:
        own = sum(last[name] for name in floor.structures)
        lowest += max(0.0, _floor_cost(floor, prices) - own)
    # floors of 1 add up to the whole, which may round above the total
    return min(1.0, lowest / prices.total)


def _whole(names: Sequence[str], prices: Prices) -> float:
    return sum(prices.whole(name) for name in names)


def _floor_cost(floor: Floor, prices: Prices) -> float:
    return floor.share * _whole(floor.structures, prices)


def select(
    scores: Mapping[str, Sequence[float]],
    prices: Prices,
    budget: float,
    round_to: int = 1,
    floors: Sequence[Floor] = (),
    groups: Mapping[str, str] | None = None,
    closest: bool = False,
) -> dict[str, tuple[int, ...]]:
    """The units that stay: {structure: units, ascending}.

    All units of all structures compete in one ranking; the lowest scores go first until the
    model costs at most ``budget`` times its total. Every structure keeps at least one unit.
    With ``round_to=8`` units go in blocks, so that every cut structure keeps a multiple of
    8 (a block's score is the mean of its units). A block whose removal would break one of the
    ``floors`` stays; no two floors share a structure. Equal scores are settled by the order of
    ``scores`` and then by unit, so the result depends on nothing else. Structures of one of the
    ``groups`` {structure: group} (of the same size, under the same floor) keep equally many units,
    each its own best: what goes first in all of them is then ranked by the mean of their scores.
    A larger budget keeps all that a smaller one keeps: which block goes next depends on no budget.

    Raises BudgetError if the budget cannot be reached (``closest``: what comes nearest to it is
    returned instead), or a score is not a number.
    """
    if groups:
        return _select_groups(scores, prices, budget, round_to, floors, groups, closest)
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise BudgetError(f"round_to must be a whole number of at least 1, not {round_to!r}")
    lowest = least(prices, round_to, floors)
    if budget < lowest and not closest:
        raise _unreachable(prices, budget, lowest, round_to, floors)
    orders: dict[str, np.ndarray[Any, Any]] = {}
    block_scores, block_structure, block_size, block_price = [], [], [], []
    for number, (name, values) in enumerate(scores.items()):
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (prices.sizes[name],):
            raise BudgetError(f"{name} has {prices.sizes[name]} units but {array.size} scores")
        if not np.isfinite(array).all():
            raise BudgetError(f"a score of {name} is not a finite number: did the loss become NaN?")
        order = orders[name] = np.argsort(array, kind="stable")
        first = array.size % round_to or round_to
        edges = [0, *range(first, array.size, round_to)]
        ascending, costs = array[order], prices.ranked(name, order)
        highest = -math.inf
        for start, stop in pairwise(edges):  # the last block always stays
            # rounding can put the mean of equal scores below that of the block before
            highest = max(highest, float(ascending[start:stop].mean()))
            block_scores.append(highest)
            block_structure.append(number)
            block_size.append(stop - start)
            block_price.append(float(costs[start:stop].sum()))
    names = list(scores)
    cost, target = prices.total, budget * prices.total * (1 + 1e-12)
    removed = dict.fromkeys(names, 0)
    room = {floor.name: _room(floor, prices) for floor in floors}
    guarded = {name: floor.name for floor in floors for name in floor.structures}
    closed: set[str] = set()
    for block in np.argsort(np.asarray(block_scores), kind="stable"):
        if cost <= target:
            break
        name = names[block_structure[block]]
        price = block_price[block]
        floor_name = guarded.get(name)
        if name in closed or (floor_name is not None and price > room[floor_name]):
            closed.add(name)  # its higher-scored blocks stay as well
            continue
        if floor_name is not None:
            room[floor_name] -= price
        removed[name] += block_size[block]
        cost -= price
    if cost > target * (1 + 1e-9) and not closest:  # beyond what subtracting many prices rounds
        raise _unreachable(prices, budget, cost / prices.total, round_to, floors)
    return {
        name: tuple(sorted(int(unit) for unit in orders[name][removed[name] :])) for name in names
    }


def _select_groups(
    scores: Mapping[str, Sequence[float]],
    prices: Prices,
    budget: float,
    round_to: int,
    floors: Sequence[Floor],
    groups: Mapping[str, str],
    closest: bool,
) -> dict[str, tuple[int, ...]]:
    """As :func:`select`, on one stand-in a group, whose nth unit is the nth best of each member."""
    if prices.elsewhere:
        raise BudgetError(
            "a model that shares weights cannot get one width a tower: call vlprune.materialize "
            "on it first"
        )
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(groups.get(name, name), []).append(name)
    for group, names in members.items():
        if len({prices.sizes[name] for name in names}) > 1:
            raise BudgetError(f"the structures of the group {group!r} have different sizes")
    ranked = {
        group: np.mean([np.sort(np.asarray(scores[n], dtype=np.float64)) for n in names], axis=0)
        for group, names in members.items()
    }
    together = Prices(
        prices.what,
        {group: sum(prices.unit[n] for n in names) for group, names in members.items()},
        {group: prices.sizes[names[0]] for group, names in members.items()},
        prices.fixed,
        curve={
            group: tuple(np.sum([prices.curve[n] for n in names], axis=0).tolist())
            for group, names in members.items()
            if names[0] in prices.curve
        },
    )
    merged = [
        Floor(f.name, tuple(dict.fromkeys(groups.get(n, n) for n in f.structures)), f.share)
        for f in floors
    ]
    plain = {group: values.tolist() for group, values in ranked.items()}
    chosen = select(plain, together, budget, round_to, merged, closest=closest)
    kept = {}
    for group, names in members.items():
        count = len(chosen[group])
        for name in names:
            order = np.argsort(np.asarray(scores[name], dtype=np.float64), kind="stable")
            kept[name] = tuple(sorted(int(unit) for unit in order[order.size - count :]))
    return {name: kept[name] for name in scores}


def _room(floor: Floor, prices: Prices) -> float:
    """How much of a floor's structures may go, with room for rounding."""
    whole = _whole(floor.structures, prices)
    return (1 - floor.share) * whole + 1e-9 * whole


def _unreachable(
    prices: Prices, budget: float, lowest: float, round_to: int, floors: Sequence[Floor]
) -> BudgetError:
    left = "unit" if round_to == 1 else f"block of {round_to} units"
    guards = "".join(f", {floor.share:.4g} of {floor.name}" for floor in floors)
    return BudgetError(
        f"a budget of {budget:.4g} of the {prices.what} cannot be reached: with one {left} left in "
        f"every structure{guards}, {lowest:.4g} remains (embeddings, norms and heads always stay); "
        f"ask for at least {math.ceil(lowest * 1000) / 1000:.3f}"
    )
