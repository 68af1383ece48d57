"""Budgets: the fraction of the whole model that must stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BudgetError, did_you_mean
from ..files import shown

__all__ = ["Budget", "parse_budget"]


CURRENCIES = ("params", "macs", "latency")


@dataclass(frozen=True)
class Budget:
    """The fraction of the whole model's ``what`` (one of ``CURRENCIES``) that stays."""

    what: str
    fraction: float


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
