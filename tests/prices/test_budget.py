"""The solver and the price list, on cases worked out by hand."""

from __future__ import annotations

import random

import pytest

from vlprune import select
from vlprune.errors import BudgetError
from vlprune.prices.budget import parse_budget
from vlprune.prices.prices import Prices, least

# 10 fixed + 4 units at 5 + 4 units at 10 = 70
PRICES = Prices("params", {"a": 5.0, "b": 10.0}, {"a": 4, "b": 4}, 10.0)


def test_the_lowest_scores_go_first_until_the_budget_is_met() -> None:
    scores = {"a": [0.1, 0.9, 0.2, 0.8], "b": [0.3, 0.7, 0.6, 0.5]}
    # order: a0 (65), a2 (60), b0 (50), b3 (40), ...
    assert select(scores, PRICES, 65 / 70) == {"a": (1, 2, 3), "b": (0, 1, 2, 3)}
    assert select(scores, PRICES, 50 / 70) == {"a": (1, 3), "b": (1, 2, 3)}
    assert select(scores, PRICES, 49 / 70) == {"a": (1, 3), "b": (1, 2)}
    assert select(scores, PRICES, 1.0) == {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}


def test_no_structure_loses_its_last_unit() -> None:
    scores = {"a": [0.0, 0.0, 0.0, 0.0], "b": [9.0, 9.0, 9.0, 9.0]}
    kept = select(scores, PRICES, 25 / 70)  # the least: 10 + 5 + 10
    assert kept == {"a": (3,), "b": (3,)}


def test_equal_scores_are_settled_by_order() -> None:
    scores = {"a": [1.0] * 4, "b": [1.0] * 4}
    assert select(scores, PRICES, 60 / 70) == {"a": (2, 3), "b": (0, 1, 2, 3)}


def test_blocks_keep_multiples() -> None:
    prices = Prices("params", {"a": 1.0, "b": 1.0}, {"a": 10, "b": 8}, 0.0)
    rng = random.Random(0)
    scores = {name: [rng.random() for _ in range(n)] for name, n in prices.sizes.items()}
    for budget in (0.95, 0.8, 0.6, 0.5):
        kept = select(scores, prices, budget, round_to=4)
        for name, units in kept.items():
            assert len(units) % 4 == 0 or len(units) == prices.sizes[name]
            assert list(units) == sorted(units)
        assert prices.cost({n: len(u) for n, u in kept.items()}) <= budget * 18


def test_the_result_agrees_with_a_slow_reference() -> None:
    rng = random.Random(1)
    for _ in range(50):
        names = [f"s{i}" for i in range(rng.randint(1, 4))]
        prices = Prices(
            "macs",
            {n: float(rng.randint(1, 9)) for n in names},
            {n: rng.randint(1, 7) for n in names},
            float(rng.randint(0, 20)),
        )
        scores = {n: [rng.random() for _ in range(prices.sizes[n])] for n in names}
        budget = least(prices) + (1 - least(prices)) * rng.random()
        kept = {n: set(range(prices.sizes[n])) for n in names}
        for _score, n, u in sorted((s, m, u) for m in names for u, s in enumerate(scores[m])):
            if prices.cost({m: len(k) for m, k in kept.items()}) <= budget * prices.total + 1e-9:
                break
            if len(kept[n]) > 1:
                kept[n].remove(u)
        assert {n: set(u) for n, u in select(scores, prices, budget).items()} == kept


def test_a_budget_below_the_least_names_the_least() -> None:
    with pytest.raises(BudgetError, match=r"cannot be reached.*ask for at least 0\.358"):
        select({"a": [1.0] * 4, "b": [1.0] * 4}, PRICES, 0.2)


@pytest.mark.parametrize(
    "budget",
    [{"params": 0}, {"params": 1.5}, {"params": "half"}, {"params": True}, {"params": -0.5}, {},
     {"params": 0.5, "macs": 0.5}, {"flops": 0.5}, 0.5, {"params": float("nan")}, {"params": None}],
)  # fmt: skip
def test_what_is_no_budget_is_refused(budget: object) -> None:
    with pytest.raises(BudgetError):
        parse_budget(budget)  # type: ignore[arg-type]


def test_a_misspelt_currency_gets_a_hint() -> None:
    with pytest.raises(BudgetError, match="Did you mean 'params'"):
        parse_budget({"param": 0.5})


@pytest.mark.parametrize("scores", [{"a": [1.0, float("nan"), 1, 1], "b": [1.0] * 4}])
def test_a_score_that_is_no_number_is_refused(scores: dict[str, list[float]]) -> None:
    with pytest.raises(BudgetError, match="NaN"):
        select(scores, PRICES, 0.5)


@pytest.mark.parametrize("round_to", [0, -1, 2.5, True])
def test_round_to_must_be_a_whole_number(round_to: object) -> None:
    with pytest.raises(BudgetError, match="round_to"):
        select({"a": [1.0] * 4, "b": [1.0] * 4}, PRICES, 0.9, round_to=round_to)  # type: ignore[arg-type]
