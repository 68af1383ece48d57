"""The authors' own walk down the ranking, for comparison with UPop's published results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..prices.prices import Prices

__all__ = ["walk"]


def walk(
    scores: Mapping[str, Sequence[float]], prices: Prices, share: float, bill_last: bool = False
) -> dict[str, tuple[int, ...]]:
    """The units that stay: {structure: units, ascending}, as in the code of UPop's authors.

    ``scores`` holds one number per unit, (size,) per structure; the lowest go first. Costs are
    added up from the bottom of the ranking. The unit at which the sum, its own cost included, is
    nearest to ``share`` of ``prices.total`` stays, as does every unit that scores no less; so do
    the best units of a structure that would lose all. With ``bill_last`` a structure's last unit
    is added up like any other, though it stays; without, it is passed over, as the paper has it.

    :func:`vlprune.prices.select.select` goes on until the share is reached instead, with exact
    costs, blocks, floors and groups.
    """
    values = {name: np.asarray(row, dtype=np.float64) for name, row in scores.items()}
    flat = np.concatenate([*values.values()])
    cost = np.concatenate([np.full(row.size, prices.unit[name]) for name, row in values.items()])
    order = np.argsort(flat, kind="stable")
    if not bill_last:
        ends = np.cumsum([row.size for row in values.values()])
        starts = ends - [row.size for row in values.values()]
        best = [
            start + np.argsort(row, kind="stable")[-prices.last(name) :]
            for start, (name, row) in zip(starts, values.items(), strict=True)
        ]
        order = order[~np.isin(order, np.concatenate(best))]
    if order.size == 0:
        return {name: (*range(row.size),) for name, row in values.items()}
    # single precision, as theirs: two sums may be equally near to the goal
    goal = np.float32(prices.total) * np.float32(share)
    distance = np.abs(np.cumsum(cost[order]).astype(np.float32) - goal)
    bound = flat[order[int(distance.argmin())]]
    return {
        name: tuple(np.flatnonzero(row >= min(bound, np.sort(row)[-prices.last(name)])).tolist())
        for name, row in values.items()
    }
