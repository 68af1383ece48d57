"""UPop: one ranking over all towers and structures, pruned progressively while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import RecipeError, VlpruneError, did_you_mean
from ..prices.prices import Floor, Prices, least
from ..prices.select import select
from ..recipe.options import UPopOptions
from .base import Method, Problem, Search, family, standardised
from .schedule import removed_share
from .walk import walk

__all__ = ["IMPORTANCE", "UPop"]

IMPORTANCE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "signed": (lambda gradient, gate: gradient, -1.0),
    "squared": (lambda gradient, gate: gradient.square(), 1.0),
    "gradient_x_gate": (lambda gradient, gate: (gradient * gate).abs(), 1.0),
}
"""The term added up over the steps, and whether large (1) or small (-1) totals stay.

``signed`` is from the paper: a gate whose increase raises the loss goes first. The other two are
for comparison and not from the paper: the empirical Fisher information, and Taylor's first-order
change."""


class UPop(UPopOptions, Method):
    """Unified and progressive pruning (Shi et al., ICML 2023, arXiv 2301.13741, section 3).

    While the model trains, the gradients G of all gates are added up, in float32, from the first
    step on; steps that are not finite are left out and counted. At every ``interval`` steps G is
    standardised over all attention gates and over all FFN gates of all towers (so that one ranking
    holds for everything). Units are then taken from the bottom of the ranking until the scheduled
    share of the cost is reached (:func:`vlprune.methods.schedule.removed_share`), and all of them
    get the same gate, which fades to exactly 0 at the end. A unit may come back while the search
    runs; every structure keeps at least one unit.

    ``interval`` counts optimizer steps; ``"auto"`` (not from the paper) decides at every hundredth
    of the search, about as often as the authors on each task. ``cost="exact"`` counts a unit's true
    cost in the budget's currency.

    ``cost="paper"`` removes what the authors' code removes: it counts ``paper_ratio`` for an
    attention unit and 1 for an FFN unit (36 for BLIP and CLIP; 12 for DeiT-S and Segmenter, where
    9234/769 is written into whole numbers), and takes 1 - budget as the paper's p, a fraction of
    the prunable cost, so the cost reached differs from the budget. The removal ends next to the
    share rather than beyond it (:func:`vlprune.methods.walk.walk`), the spread is that of a
    sample (n - 1), and decisions fall after steps 1, 1 + ``interval``, 1 + 2 ``interval`` and so
    on; ``first_step=False`` leaves out the first of them, as the authors do for DeiT and
    Segmenter. ``bill_last`` adds up a structure's last unit, too, though it stays, as their code
    does: fewer units go than the paper's p asks for. Blocks, floors and groups, which their code
    lacks, bring back the rule of exact costs.

    ``importance`` is a name of :data:`IMPORTANCE`. ``l1`` adds the authors' L1 term, as in
    ``{"attention": 1.44e-2, "ffn": 5e-4}``; its gradient is the same for every gate of a kind, so
    standardisation cancels it while no gate is 0, and it is left out by default. ``round_to`` (keep
    multiples of this number) and ``floors`` (``{"vision": 0.3}``: that share of the tower's
    prunable cost stays) hold for every decision, so that exactly the units that fade are removed;
    neither is from the paper.
    """

    uses_gates: ClassVar[bool] = True

    def start(self, problem: Problem) -> Search:
        """A search with all gates at 1. Raises BudgetError if the budget cannot be reached."""
        return _UPopSearch(self, problem)


class _UPopSearch(Search):
    def __init__(self, method: UPop, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.structures = problem.structures
        self.sizes = [s.size for s in self.structures]
        self.prices = problem.prices if method.cost == "exact" else self._paper_prices()
        self.budget = problem.budget  # under paper costs: 1 - p
        self.floors = self._floors()
        lowest = least(self.prices, method.round_to, self.floors)
        if self.budget < lowest:
            # raises the same error as the end of the search, but before hours of training
            self._select({s.name: [0.0] * s.size for s in self.structures}, 1.0)
        self.total = torch.zeros(sum(self.sizes))  # G, in the order of the structures
        self.values = torch.ones(sum(self.sizes))  # the gates
        self.steps = self.skipped = self.decided = 0
        self.watched: list[dict[str, float]] = []

    def reprice(self, prices: Prices) -> None:
        super().reprice(prices)
        if self.method.cost == "exact":
            self.prices = prices

    def _paper_prices(self) -> Prices:
        unit = {
            s.name: 1.0 if s.kind == "ffn" else self.method.paper_ratio for s in self.structures
        }
        sizes = {s.name: s.size for s in self.structures}
        at_least = self.problem.prices.at_least
        return Prices("paper's cost", unit, sizes, 0.0, at_least=at_least)

    def _floors(self) -> tuple[Floor, ...]:
        towers: dict[str, list[str]] = {}
        for structure in self.structures:
            towers.setdefault(structure.tower, []).append(structure.name)
        for tower in self.method.floors:
            _one_of("a floor's tower", tower, tuple(towers))
        return tuple(
            Floor(tower, tuple(towers[tower]), share) for tower, share in self.method.floors.items()
        )

    # -- while training ------------------------------------------------------------------

    def after_backward(self, progress: float, gradients: Mapping[str, Tensor]) -> None:
        """Add to G, and decide anew if a decision is due."""
        device = next(iter(gradients.values())).device
        self.total, self.values = self.total.to(device), self.values.to(device)
        gradient = torch.cat(
            [
                gradients[s.name].float() if s.name in gradients else self.total.new_zeros(s.size)
                for s in self.structures
            ]
        )
        if bool(gradient.isfinite().all()):
            self.steps += 1
            for kind, weight in self.method.l1.items():
                gradient = gradient + weight * self.values.sign() * self._mask(kind)
            measure, _ = IMPORTANCE[self.method.importance]
            self.total += measure(gradient, self.values)
        else:
            self.skipped += 1
        if self._due(progress) and self.steps:
            self._decide(progress)

    def _due(self, progress: float) -> bool:
        if self.method.interval == "auto":
            hundredth = int(100 * progress + 1e-9)
            due = hundredth > self.decided
            self.decided = max(self.decided, hundredth)
            return due
        step, interval = self.steps + self.skipped, int(self.method.interval)
        if self.method.cost == "paper":
            due = (step - 1) % interval == 0 and (step > 1 or self.method.first_step)
        else:
            due = step % interval == 0
        return due or progress >= 1

    def _decide(self, progress: float) -> None:
        """Rank all units, and let the lowest fade until the scheduled share is reached."""
        kept = self._select(self.scores(), progress)
        fading = 1 - removed_share(progress) if progress < 1 else 0.0
        values = torch.full((sum(self.sizes),), fading)
        start = 0
        for structure in self.structures:
            units = kept.get(structure.name, range(structure.size))
            values[start + torch.tensor([*units])] = 1
            start += structure.size
        self.values = values.to(self.total.device)
        facts = self.facts()
        self.watched.append(
            {
                "progress": progress,
                "remains": 1 - (1 - self.budget) * removed_share(progress),
                "fading_units": facts["fading_units"],
                "gate_of_fading_units": facts["gate_of_fading_units"],
            }
        )

    def history(self) -> list[dict[str, float]]:
        return self.watched

    def scores(self) -> dict[str, list[float]]:
        _, sign = IMPORTANCE[self.method.importance]
        totals = self._split(sign * self.total)
        correction = 1 if self.method.cost == "paper" else 0
        scores = standardised(self.open.structures, totals, correction)
        return {name: values.tolist() for name, values in scores.items()}

    def _select(
        self, scores: Mapping[str, list[float]], progress: float
    ) -> dict[str, tuple[int, ...]]:
        """The units that stay at ``progress``, as near the schedule as blocks and floors allow.

        Raises BudgetError at the end of the search if the budget cannot be reached.
        """
        share = (1 - self.budget) * removed_share(progress)
        if self._walks() and self.budget >= self.least_left():
            prices = self.prices.fixing(self.whole)
            return walk(scores, prices, share, self.method.bill_last)
        floors = [
            replace(floor, structures=tuple(n for n in floor.structures if n not in self.whole))
            for floor in self.floors
        ]
        return select(
            scores,
            self.prices.fixing(self.whole),
            1 - share,
            self.method.round_to,
            floors,
            self.open.groups,
            closest=progress < 1,
        )

    def _walks(self) -> bool:
        """Whether the authors' walk chooses the units."""
        asked = self.method
        plain = asked.round_to == 1 and not self.floors and not self.open.groups
        return asked.cost == "paper" and plain

    def prunable(self, kept: Mapping[str, Sequence[int]]) -> dict[str, float]:
        if self.method.cost == "exact":
            return {}
        return {"p": 1 - self.budget, "removed": 1 - self.prices.cost(kept) / self.prices.total}

    def least_left(self) -> float:
        return least(self.prices.fixing(self.whole), self.method.round_to)

    def gates(self, progress: float) -> Mapping[str, Tensor]:
        return self._split(self.values)

    def keep(self) -> dict[str, tuple[int, ...]]:
        if self.steps == 0:
            raise VlpruneError(
                "UPop has seen no finite gradient yet: train with compressor.callback(), or call "
                "compressor.step(progress) after each backward"
                + (f" ({self.skipped} steps were not finite)" if self.skipped else "")
            )
        return self._select(self.scores(), 1.0)

    # -- state ---------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        rows = [list(entry.values()) for entry in self.watched]
        return {
            "watched": torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 4),
            "total": self.total.cpu(),
            "values": self.values.cpu(),
            "counts": torch.tensor([self.steps, self.skipped, self.decided]),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state["total"].shape != self.total.shape:
            raise VlpruneError("the state of this search belongs to another model")
        self.total, self.values = state["total"].clone(), state["values"].clone()
        self.steps, self.skipped, self.decided = state["counts"].tolist()
        names = ("progress", "remains", "fading_units", "gate_of_fading_units")
        rows = state["watched"].tolist() if "watched" in state else []
        self.watched = [dict(zip(names, row, strict=True)) for row in rows]

    def facts(self) -> dict[str, float]:
        faded = self.values < 1
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped,
            "fading_units": int(faded.sum()),
            "gate_of_fading_units": float(self.values[faded][0]) if bool(faded.any()) else 1.0,
        }

    # -- layout --------------------------------------------------------------------------

    def _split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(self.sizes)
        return {s.name: part for s, part in zip(self.structures, parts, strict=True)}

    def _mask(self, kind: str) -> Tensor:
        """1 for the units of a kind, 0 for all others: (all units,)."""
        parts = [torch.full((s.size,), float(family(s) == kind)) for s in self.structures]
        return torch.cat(parts).to(self.total.device)


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(
            f"{what} must be one of {', '.join(known)}, not {value!r}."
            f"{did_you_mean(str(value), known)}"
        )
