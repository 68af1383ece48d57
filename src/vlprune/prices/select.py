"""The one solver: it chooses the units that stay, from scores, prices and a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import BudgetError
from .prices import Floor, Prices, least, whole_cost

__all__ = ["select"]

Array = np.ndarray[Any, Any]


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

    ``scores`` holds one number per unit, (size,) per structure. All units of all structures
    compete in one ranking; the lowest scores go first until the model costs at most ``budget``
    times its total. Every structure keeps at least one unit (of experts, as many as
    ``prices.at_least`` says, and they go one by one). With ``round_to=8`` units go in
    blocks, so that every cut structure keeps a multiple of 8 (a block's score is the mean of its
    units). A block whose removal would break one of the ``floors`` stays; no two floors share a
    structure. Equal scores are settled by the order of ``scores`` and then by unit, so the result
    depends on nothing else. Structures of one of the ``groups`` {structure: group} (of the same
    size, under the same floor) keep equally many units, each its own best; the nth best units of
    all members are then ranked together by the mean of their scores. A larger budget keeps every
    unit that a smaller one keeps, because the order of removal does not depend on the budget.

    Raises BudgetError if the budget cannot be reached (with ``closest``, the choice nearest to it
    is returned instead), if ``round_to`` is not a positive whole number, if scores are not
    finite or not one per unit, or if structures of a group have different sizes.
    """
    if groups:
        return _select_groups(scores, prices, budget, round_to, floors, groups, closest)
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise BudgetError(f"round_to must be a whole number of at least 1, not {round_to!r}")
    lowest = least(prices, round_to, floors)
    if budget < lowest and not closest:
        raise _unreachable(prices, budget, lowest, round_to, floors)
    ranked = {name: _ranked(name, values, prices, round_to) for name, values in scores.items()}
    target = budget * prices.total * (1 + 1e-12)
    removed, cost = _removed(ranked, prices, target, floors)
    if cost > target * (1 + 1e-9) and not closest:  # beyond what subtracting many prices rounds
        raise _unreachable(prices, budget, cost / prices.total, round_to, floors)
    return {
        name: tuple(np.sort(blocks.order[removed[name] :]).tolist())
        for name, blocks in ranked.items()
    }


class _Blocks(NamedTuple):
    """Blocks of units of one structure, worst first, without the last, which always stay."""

    order: Array
    """All units, worst first."""
    scores: Array
    sizes: Array
    prices: Array


def _ranked(name: str, values: Sequence[float], prices: Prices, round_to: int) -> _Blocks:
    """The blocks of one structure. Raises BudgetError for scores that cannot rank its units."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (prices.sizes[name],):
        raise BudgetError(f"{name} has {prices.sizes[name]} units but {array.size} scores")
    if not np.isfinite(array).all():
        raise BudgetError(f"a score of {name} is not a finite number: did the loss become NaN?")
    order = np.argsort(array, kind="stable")
    stay = prices.at_least.get(name, 1)
    round_to = 1 if name in prices.at_least else round_to
    first = array.size % round_to or round_to

    def sums(of: Array) -> Array:
        whole = of[first:].reshape(-1, round_to).sum(axis=1)
        return np.concatenate([[of[:first].sum()], whole])[:-stay]

    sizes = np.full(1 + len(range(first, array.size, round_to)), round_to)
    sizes[0] = first
    sizes = sizes[:-stay]
    # rounding can put the mean of equal scores below that of the block before
    means = np.maximum.accumulate(sums(array[order]) / sizes)
    return _Blocks(order, means, sizes, sums(prices.ranked(name, order)))


def _removed(
    ranked: Mapping[str, _Blocks], prices: Prices, target: float, floors: Sequence[Floor]
) -> tuple[dict[str, int], float]:
    """How many units of each structure go until ``target`` is met, and the cost of the rest."""
    blocks = list(ranked.values())
    structure = np.repeat(np.arange(len(blocks)), [len(one.sizes) for one in blocks])
    sequence = np.argsort(np.concatenate([one.scores for one in blocks]), kind="stable")
    structure = structure[sequence]
    sizes = np.concatenate([one.sizes for one in blocks])[sequence]
    price = np.concatenate([one.prices for one in blocks])[sequence]
    goes = _leaving_floors(structure, price, list(ranked), prices, floors)
    structure, sizes, price = structure[goes], sizes[goes], price[goes]
    left = np.subtract.accumulate(np.concatenate([[prices.total], price]))
    # prices may be 0, and the cost may rise again by rounding: find the first hit, do not bisect
    count = int(np.argmax(left <= target)) if (left <= target).any() else len(price)
    gone = np.bincount(structure[:count], sizes[:count], minlength=len(blocks))
    return dict(zip(ranked, gone.astype(int).tolist(), strict=True)), float(left[count])


def _leaving_floors(
    structure: Array,
    price: Array,
    names: Sequence[str],
    prices: Prices,
    floors: Sequence[Floor],
) -> Array:
    """A mask of the blocks that may go: none that breaks a floor or follows one that does."""
    goes = np.ones(len(price), dtype=bool)
    numbers = {name: number for number, name in enumerate(names)}
    for floor in floors:
        under = np.isin(structure, [numbers[name] for name in floor.structures if name in numbers])
        room, closed = _room(floor, prices), set()
        for place in np.nonzero(under)[0]:
            if structure[place] in closed or price[place] > room:
                closed.add(structure[place])  # its higher-scored blocks stay as well
                goes[place] = False
            else:
                room -= price[place]
    return goes


def _select_groups(
    scores: Mapping[str, Sequence[float]],
    prices: Prices,
    budget: float,
    round_to: int,
    floors: Sequence[Floor],
    groups: Mapping[str, str],
    closest: bool,
) -> dict[str, tuple[int, ...]]:
    """As :func:`select`, with one stand-in per group: its nth unit is each member's nth worst."""
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
        at_least={
            group: max(prices.at_least[n] for n in names)
            for group, names in members.items()
            if names[0] in prices.at_least
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
    """How much of the cost of a floor's structures may go, with a tolerance for rounding."""
    whole = whole_cost(floor.structures, prices)
    return (1 - floor.share) * whole + 1e-9 * whole


def _unreachable(
    prices: Prices, budget: float, lowest: float, round_to: int, floors: Sequence[Floor]
) -> BudgetError:
    left = "unit" if round_to == 1 else f"block of {round_to} units"
    left += " (of experts: as many as a token goes to)" if prices.at_least else ""
    guards = "".join(f", {floor.share:.4g} of {floor.name}" for floor in floors)
    return BudgetError(
        f"a budget of {budget:.4g} of the {prices.what} cannot be reached: with one {left} left in "
        f"every structure{guards}, {lowest:.4g} remains (embeddings, norms and heads always stay); "
        f"ask for at least {math.ceil(lowest * 1000) / 1000:.3f}"
    )
