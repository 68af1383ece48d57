"""Keep the units whose removal, once repaired, changes the outputs least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BudgetError, VlpruneError
from ..prices.select import select
from ..recipe.options import ObsOptions
from .base import Layer, Method, Problem, Search, Statistics

__all__ = ["OBS", "removal"]


class OBS(ObsOptions, Method):
    """Compression without training: optimal brain surgeon on units, for ``calibration`` batches.

    A unit costs what its removal adds to the error of the layer that reads it, after the best
    repair of that layer by the units that are left; query-key dimensions, which no layer reads,
    cost what the model's outputs change without them. With ``across="outputs"`` the errors of all
    layers are compared by what they do to the relative squared error of the model's outputs
    (:mod:`vlprune.calibration.influence`), per price; with ``"layers"`` by the relative error of
    the layer itself; with ``"uniform"`` every structure loses the same share. With ``rotate`` heads
    are first turned to their free basis (:func:`vlprune.rotate`); off unless asked for. With
    ``fold`` the plan is repaired before it is cut (:func:`vlprune.fold`).

    Source: the optimal brain surgeon (Hassibi et al., 1993), greedy in blocks of columns; the
    comparison across layers by ``"outputs"`` is not from a paper.
    """

    uses_calibration: ClassVar[bool] = True

    def start(self, problem: Problem) -> Search:
        """A search that learns from the statistics of calibration batches."""
        return _ObsSearch(self, problem)


class _ObsSearch(Search):
    def __init__(self, method: OBS, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.errors: dict[str, Tensor] = {}

    def calibrate(self, statistics: Statistics) -> None:
        influence = self.method.across == "outputs"
        idle = set()
        for layer in statistics.layers():
            if influence and not layer.influence.any():  # no chosen output depends on it
                idle.add(layer.structure)
                continue
            order, errors = removal(layer.second, _weighed(layer, influence), layer.columns)
            rising = torch.tensor(errors, dtype=torch.float64).cummax(0).values
            found = torch.zeros(len(order), dtype=torch.float64)
            found[order] = rising
            self.errors[layer.structure] = self.errors.get(layer.structure, 0) + found
        for name, scores in statistics.scores().items():
            if influence or name not in self.errors:
                self.errors[name] = self.errors.get(name, 0) + scores.double().cpu()
        self.errors = {name: e for name, e in self.errors.items() if name not in idle}
        missing = {s.name for s in self.problem.structures} - self.errors.keys()
        self.leave_whole(frozenset(missing))

    def state(self) -> dict[str, Tensor]:
        return dict(self.errors)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.errors = dict(state)
        self.leave_whole(frozenset({s.name for s in self.problem.structures} - state.keys()))

    def keep(self) -> dict[str, tuple[int, ...]]:
        if not self.errors:
            raise VlpruneError(
                "OBS has seen no calibration batch: give Compressor(..., calibration=[batch, ...])"
            )
        problem = self.open
        scores = {s.name: self._scores(s.name) for s in problem.structures}
        try:
            return select(
                scores, problem.prices, problem.budget, self.method.round_to, groups=problem.groups
            )
        except BudgetError as error:
            if not self.whole:
                raise
            raise BudgetError(
                f"{error}. {len(self.whole)} structures stay whole, because no calibration batch "
                "reaches them, the chosen outputs have no gradient there, or they are whole "
                "experts, or experts of a kind that cannot be taken apart: "
                f"{', '.join(sorted(self.whole))}"
            ) from None

    def _scores(self, name: str) -> list[float]:
        errors = self.errors[name]
        if self.method.across == "uniform":
            ranks = torch.empty_like(errors)
            ranks[torch.argsort(errors, stable=True)] = torch.arange(len(errors)).double()
            return (ranks / len(errors)).tolist()
        return (errors / max(self.problem.prices.unit[name], 1e-30)).tolist()


def _weighed(layer: Layer, influence: bool) -> Tensor:
    """The layer's weight, its outputs in the unit in which layers are compared: (out, width)."""
    weight = layer.weight.double()
    if influence:
        return weight * layer.influence.to(weight).sqrt()[:, None]
    power = ((weight @ layer.second) * weight).sum()
    return weight / power.sqrt() if power > 0 else weight


DAMPING = 1e-3
"""What the diagonal of the second moments is raised by, as a part of its mean."""


PACKED = 0.75
"""The part of the columns that may be left before the matrices shrink to them."""


def removal(
    second: Tensor, weight: Tensor, columns: Tensor, share: float = 1 / 16
) -> tuple[list[int], list[float]]:
    """The order in which units go, cheapest first, and what each removal adds to the error.

    ``second`` (width, width) are second moments of a layer's input, ``weight`` (out, width) is its
    weight, ``columns`` (units, columns per unit) are the units' places in the input. The error is
    that of the outputs after the best repair by the columns that are left; removing columns P adds
    tr(W_P (H^-1_PP)^-1 W_P^T), where H is the damped ``second``. Units go in groups of ``share`` of
    those left: the error of a group is exact, and is divided among its units in proportion to the
    error of each alone. The last unit is in the order, too.
    """
    hessian = second.double().clone()
    ridge = DAMPING * hessian.diagonal().mean()
    ridge = ridge if ridge > 0 else torch.ones_like(ridge)  # an input that is always the same
    hessian.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    while failed:  # rounding errors, where the mean of the input is large and its spread small
        hessian.diagonal().add_(ridge)
        ridge = 2 * ridge
        lower, failed = torch.linalg.cholesky_ex(hessian)
    del hessian  # a layer of 4,096 units has matrices of 134 MB: as few as can be at once
    inverse = torch.cholesky_inverse(lower)
    del lower
    weight, columns = weight.double().clone(), columns.to(weight.device)
    alive = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    left = list(range(len(columns)))
    order: list[int] = []
    errors: list[float] = []
    while left:
        here = columns[left]
        each = _alone(weight, inverse, here).clamp(min=0)
        count = max(1, int(len(left) * share))
        worst = torch.argsort(each, stable=True)[:count].tolist()
        gone = here[worst].reshape(-1)
        # columns of H^-1 that go, solved against their own block, serve both updates
        spread = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        block = torch.linalg.solve(inverse[gone][:, gone], weight[:, gone].T)
        joint = max(0.0, float((block.T * weight[:, gone]).sum()))
        parts = each[worst]
        whole = parts.sum()
        parts = parts / whole if whole > 0 else torch.full_like(parts, 1 / count)
        order += [left[place] for place in worst]
        errors += (joint * parts).tolist()
        weight.addmm_(weight[:, gone], spread, alpha=-1)
        inverse.addmm_(inverse[:, gone], spread, alpha=-1)
        alive[gone] = False
        if alive.sum() <= PACKED * len(alive):
            weight, inverse = weight[:, alive], inverse[alive][:, alive]
            columns = (torch.cumsum(alive, 0) - 1)[columns]  # units that are gone go unread
            alive = alive[alive]
        chosen = set(worst)
        left = [unit for place, unit in enumerate(left) if place not in chosen]
    return order, errors


def _alone(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """The error that each unit's removal adds if no other unit goes: (units,)."""
    if columns.shape[1] == 1:
        single = columns[:, 0]
        return weight[:, single].square().sum(0) / inverse.diagonal()[single]
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    lost = weight.T[columns]  # (units, columns per unit, out)
    return (torch.linalg.solve(blocks, lost) * lost).sum((1, 2))
