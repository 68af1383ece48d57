"""Budgets, price lists, and the one solver that turns scores into units that stay.

Pure: numbers in, numbers out, no torch, no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .errors import BudgetError, did_you_mean

__all__ = ["Budget", "Prices", "least", "parse_budget", "select"]

CURRENCIES = ("params", "macs")


@dataclass(frozen=True)
class Budget:
    """The fraction of the whole model's ``what`` (``"params"`` or ``"macs"``) that stays."""

    what: str
    fraction: float


@dataclass(frozen=True)
class Prices:
    """The price list of a model: ``fixed`` for what always stays, ``unit`` for each unit.

    ``what`` is ``"params"`` or ``"macs"``; ``sizes`` are the units of each structure.
    """

    what: str
    unit: Mapping[str, float]
    sizes: Mapping[str, int]
    fixed: float

    @property
    def total(self) -> float:
        """What the uncut model costs."""
        return self.fixed + sum(self.unit[name] * self.sizes[name] for name in self.unit)

    def cost(self, kept: Mapping[str, int]) -> float:
        """What the model costs with ``kept`` units of each structure (absent: all)."""
        return self.fixed + sum(
            price * kept.get(name, self.sizes[name]) for name, price in self.unit.items()
        )


def parse_budget(budget: Mapping[str, Any]) -> Budget:
    """The budget in ``{"params": 0.5}`` or ``{"macs": 0.5}``. Raises BudgetError."""
    if not isinstance(budget, Mapping) or len(budget) != 1:
        raise BudgetError(
            f"a budget names one thing and the fraction of it that stays, as in "
            f'{{"params": 0.5}}, not {budget!r}'
        )
    ((what, fraction),) = budget.items()
    if what not in CURRENCIES:
        raise BudgetError(
            f"a budget is in {' or '.join(CURRENCIES)}, not {what!r}."
            f"{did_you_mean(str(what), CURRENCIES)}"
        )
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not number or not 0 < fraction <= 1:
        raise BudgetError(
            f"the budget for {what} is the fraction that stays, a number above 0 and at most 1, "
            f"not {fraction!r}"
        )
    return Budget(str(what), float(fraction))


def least(prices: Prices, round_to: int = 1) -> float:
    """The smallest fraction that any plan can reach: one block of each structure stays."""
    kept = {name: min(size, max(1, round_to)) for name, size in prices.sizes.items()}
    return prices.cost(kept) / prices.total


def select(
    scores: Mapping[str, Sequence[float]],
    prices: Prices,
    budget: float,
    round_to: int = 1,
) -> dict[str, tuple[int, ...]]:
    """The units that stay: {structure: units, ascending}.

    All units of all structures compete in one ranking; the lowest scores go first until the
    model costs at most ``budget`` times its total. Every structure keeps at least one unit.
    With ``round_to=8`` units go in blocks, so that every cut structure keeps a multiple of
    8 (a block's score is the mean of its units). Equal scores are settled by the order of
    ``scores`` and then by unit, so the result depends on nothing else.

    Raises BudgetError if the budget cannot be reached, or a score is not a number.
    """
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise BudgetError(f"round_to must be a whole number of at least 1, not {round_to!r}")
    lowest = least(prices, round_to)
    if budget < lowest:
        raise BudgetError(
            f"a budget of {budget:.4g} of the {prices.what} cannot be reached: with one "
            f"{'unit' if round_to == 1 else f'block of {round_to} units'} left in every structure, "
            f"{lowest:.4g} remains (embeddings, norms and heads always stay); ask for at least "
            f"{math.ceil(lowest * 1000) / 1000:.3f}"
        )
    orders: dict[str, np.ndarray[Any, Any]] = {}
    block_scores, block_structure, block_size = [], [], []
    for number, (name, values) in enumerate(scores.items()):
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (prices.sizes[name],):
            raise BudgetError(f"{name} has {prices.sizes[name]} units but {array.size} scores")
        if not np.isfinite(array).all():
            raise BudgetError(f"a score of {name} is not a finite number: did the loss become NaN?")
        order = orders[name] = np.argsort(array, kind="stable")
        first = array.size % round_to or round_to
        edges = [0, *range(first, array.size, round_to)]
        ascending = array[order]
        for start, stop in pairwise(edges):  # the last block always stays
            block_scores.append(ascending[start:stop].mean())
            block_structure.append(number)
            block_size.append(stop - start)
    names = list(scores)
    cost, target = prices.total, budget * prices.total * (1 + 1e-12)
    removed = dict.fromkeys(names, 0)
    for block in np.argsort(np.asarray(block_scores), kind="stable"):
        if cost <= target:
            break
        name = names[block_structure[block]]
        removed[name] += block_size[block]
        cost -= prices.unit[name] * block_size[block]
    return {
        name: tuple(sorted(int(unit) for unit in orders[name][removed[name] :])) for name in names
    }
