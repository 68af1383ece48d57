"""The search of JSP: its hypernetwork learns in turn with the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...device import all_finite
from ...errors import BudgetError, RecipeError, VlpruneError
from ...recipe.options import JspOptions
from ..base import Alignment, Problem, Search, Weights
from ..schedule import removed_share
from ..vectors import Vectors
from .network import MEDIAN, HyperNetwork, drawn
from .pairs import assembled, structures_of, vectors_of

__all__ = ["JspSearch"]

SELDOM = 5
"""Every so many looks the model is compared with and without its vectors."""
FADES = 200
"""At most so many moves take the weights to the frozen structure: each one reads and rewrites all
of them, which costs a fifth of a step of a small model."""
COUNTS = ("weight_steps", "structure_steps", "skipped", "looks", "looked_step")
LEVELS = ("threshold", "remains", "looked_at")


class JspSearch(Search):
    """The hypernetwork and its optimizer, which take turns with the weights."""

    def __init__(self, method: JspOptions, problem: Problem) -> None:
        super().__init__(problem)
        if problem.groups:
            raise BudgetError("JSP decides layer by layer: it cannot keep one width a tower")
        if problem.prices.curve:
            raise BudgetError(
                "JSP takes a budget in params or macs: a latency has no gradient by single units"
            )
        self.method, self.prices = method, problem.prices
        self.target = problem.budget * problem.prices.total
        self.vectors = vectors_of(method, problem)
        self.generator = torch.Generator().manual_seed(method.seed)
        sizes = [math.ceil(v.structure.size / method.group_size) for v in self.vectors]
        self.network = HyperNetwork(sizes, self.generator)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=method.learning_rate, weight_decay=method.weight_decay
        )
        lowest = float(self.vectors_at(math.inf).cost(problem.prices))
        if lowest > self.target:
            raise BudgetError(
                f"a budget of {problem.budget:.4g} of the {problem.prices.what} cannot be reached "
                f"by {' and '.join(method.families)} in the towers {method.base} and "
                f"{method.other}: {lowest / problem.prices.total:.4g} remains; ask for at least "
                f"{math.ceil(1000 * lowest / problem.prices.total) / 1000:.3f}"
            )
        self.weight_steps = self.structure_steps = self.skipped = 0
        self.looks = self.looked_step = 0
        self.looked_at = 0.0
        self.frozen: Vectors | None = None
        self.threshold, self.remains = 0.0, 1.0
        self.now = self.vectors_at(0.0)
        self.watched: list[dict[str, float]] = []

    @property
    def decides_on(self) -> frozenset[str]:
        return frozenset(vector.structure.name for vector in self.vectors)

    # -- logits to vectors -----------------------------------------------------------------

    def _logits(self) -> list[Tensor]:
        """The network's output plus ``offset`` for each unit of each vector: (size,) each."""
        group = self.method.group_size
        return [
            row.repeat_interleave(group)[: vector.structure.size] + self.method.offset
            for row, vector in zip(self.network(), self.vectors, strict=True)
        ]

    @torch.no_grad()
    def vectors_at(self, threshold: float, whole: Collection[str] = ()) -> Vectors:
        """The vectors without noise: u is 1 where logit plus median noise reaches the threshold.

        In structures that stay ``whole``, u is 1 everywhere.
        """
        logits = self._logits()
        decided = [
            torch.ones_like(x) if v.structure.name in whole else (x + MEDIAN >= threshold).float()
            for x, v in zip(logits, self.vectors, strict=True)
        ]
        return assembled(self.vectors, decided, logits)

    @torch.no_grad()
    def fitted(self) -> Vectors:
        """The vectors of the plan, without noise: at the lowest threshold that meets the budget.

        Raises BudgetError if no threshold does because structures stay whole.
        """
        levels = torch.cat(self._logits()).add(MEDIAN).unique()  # ascending
        low, high = 0, len(levels)  # at levels[low] too much may remain, at +inf the budget is met
        best, self.threshold = self.vectors_at(math.inf, self.whole), math.inf
        if float(best.cost(self.prices)) > self.target * (1 + 1e-12):
            raise BudgetError(
                f"the loss on held-out batches does not depend on {min(self.whole)}"
                + (f" and {len(self.whole) - 1} more structures" if len(self.whole) > 1 else "")
                + ", which stay whole, and without them the budget cannot be reached: give "
                "held-out batches that need them, or ask for a larger budget"
            )
        while low < high:
            middle = (low + high) // 2
            trial = self.vectors_at(float(levels[middle]), self.whole)
            if float(trial.cost(self.prices)) <= self.target * (1 + 1e-12):
                best, self.threshold, high = trial, float(levels[middle]), middle
            else:
                low = middle + 1
        return best

    # -- in turn with the weights ------------------------------------------------------------

    def expect(self, steps: int) -> None:
        method = self.method
        if not any(method.warmup <= step / steps < method.freeze for step in range(1, steps + 1)):
            raise RecipeError(
                f"a search of {steps} steps leaves JSP no step to learn in, between "
                f"{method.warmup:.0%} and {method.freeze:.0%} of the search: take more steps, at "
                f"best {math.ceil(method.turns / (method.freeze - method.warmup))} or more"
            )

    def turn(self, progress: float, weights: Weights) -> None:
        """Draw the weights near, and learn from a held-out batch when it is due."""
        if progress >= self.method.freeze and self.frozen is None and self.structure_steps:
            self.frozen = self.now = self.fitted()
        wanted = self._alignment(progress)
        if wanted is not None:
            weights.align(wanted)
        self.weight_steps += 1
        learns = self._learns(progress)
        if not self._due(progress, learns):
            return
        vectors = self.draw(progress)
        look = weights.look(vectors, learns, compares=not learns or self.looks % SELDOM == 0)
        self.looks += 1
        self.looked_step, self.looked_at = self.weight_steps, progress
        if look.full is not None:
            losses = {"masked_loss": look.masked, "full_loss": look.full}
            self.watched.append({"progress": progress, **losses, **self._shares(self.now)})
        if learns:
            self.learn(vectors, look.keep, look.share)

    def _due(self, progress: float, learns: bool) -> bool:
        """Whether to look at a held-out batch: seldom, while the search does not learn."""
        method, rarely = self.method, 1 if learns else SELDOM
        if learns and not self.structure_steps + self.skipped:
            return True
        between = (method.freeze - method.warmup) / method.turns
        return (
            self.weight_steps - self.looked_step >= rarely * method.every
            or progress - self.looked_at >= rarely * between * (1 - 1e-9)
        )

    def _alignment(self, progress: float) -> Alignment | None:
        """The structure, as it is now or was frozen, to draw the weights to; None if not yet."""
        method = self.method
        if progress < method.align or not self.structure_steps:
            return None
        if self.frozen is None:
            return Alignment(self.now, method.alignment)
        after = (progress - method.freeze) / max(1e-9, 1 - method.freeze)
        remains = 1 - removed_share(min(1.0, after)) if progress < 1 else 0.0
        if remains > 0 and self.remains - remains < 1 / FADES:
            return None
        factor = remains / self.remains if self.remains > 0 else 0.0
        self.remains = remains
        return Alignment(self.frozen, method.alignment, factor)

    def _learns(self, progress: float) -> bool:
        return self.method.warmup <= progress < self.method.freeze and self.frozen is None

    def draw(self, progress: float) -> Vectors:
        """The vectors to compute a loss with: a random draw while the search learns."""
        if not self._learns(progress):
            return self.now
        logits = self._logits()
        decided = drawn(logits, self.method.temperature, self.generator)
        return assembled(self.vectors, decided, logits)

    def learn(
        self, vectors: Vectors, keep: Mapping[str, Tensor], share: Mapping[str, Tensor]
    ) -> None:
        """Take a step, with the gradients of the loss by the vectors that were drawn."""
        pulled = [(vectors.keep[name], g) for name, g in keep.items()]
        pulled += [(vectors.share[name][1], g) for name, g in share.items()]
        pulled = [(v, g.to(v)) for v, g in pulled if v.requires_grad]
        if not all_finite(g for _, g in pulled):
            self.skipped += 1
            return
        cost = vectors.cost(self.prices)
        self.optimizer.zero_grad()
        if float(cost.detach()) > self.target:  # no pull at or below the target
            excess = self.method.budget_weight * torch.log(cost / self.target)
            pulled.append((excess, torch.ones_like(excess)))
        torch.autograd.backward([v for v, _ in pulled], [g for _, g in pulled])
        self.optimizer.step()
        self.structure_steps += 1
        self.now = self.vectors_at(0.0)

    # -- the end ---------------------------------------------------------------------------

    def chosen(self) -> Vectors:
        """The vectors of the plan, within the budget."""
        if not self.structure_steps:
            raise VlpruneError(
                "JSP has not made a structure step yet: train with compressor.callback(), or call "
                f"compressor.step(progress) after each backward, at least {self.method.every} of "
                f"them between {self.method.warmup} and {self.method.freeze} of the search"
                + (f" ({self.skipped} steps were not finite)" if self.skipped else "")
            )
        return self.frozen if self.frozen is not None else self.fitted()

    def keep(self) -> dict[str, tuple[int, ...]]:
        plan = self.chosen().plan(self.problem.structures)
        return dict(plan.keep)

    def share(self) -> dict[str, tuple[Any, ...]]:
        return dict(self.chosen().plan(self.problem.structures).share)

    def state(self) -> dict[str, Tensor]:
        state = {f"network/{n}": t.detach().clone() for n, t in self.network.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer/{number}/{n}": torch.as_tensor(t) for n, t in moments.items()}
        state["generator"] = self.generator.get_state()
        state["counts"] = torch.tensor([getattr(self, name) for name in COUNTS])
        levels = [getattr(self, name) for name in LEVELS]
        state["levels"] = torch.tensor(levels, dtype=torch.float64)
        for name, vectors in (("now", self.now), ("frozen", self.frozen)):
            if vectors is not None:
                state |= {f"{name}/keep/{n}": t.clone() for n, t in vectors.keep.items()}
                state |= {f"{name}/share/{n}": s[1].clone() for n, s in vectors.share.items()}
        if self.watched:
            rows = [list(entry.values()) for entry in self.watched]
            state["watched"] = torch.tensor(rows, dtype=torch.float64)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        network = _below("network/", state)
        own = {n: t.shape for n, t in self.network.state_dict().items()}
        if {n: t.shape for n, t in network.items()} != own:
            raise VlpruneError("the state of this search belongs to another model")
        self.network.load_state_dict(network)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimizer/", state).items():
            number, _, what = name.partition("/")
            moments.setdefault(int(number), {})[what] = value.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(state["generator"])
        for known, key in ((COUNTS, "counts"), (LEVELS, "levels")):
            for name, value in zip(known, state[key].tolist(), strict=True):
                setattr(self, name, value)
        template = self.vectors_at(0.0)
        restored = {}
        for name in ("now", "frozen"):
            kept, shared = (_below(f"{name}/{what}/", state) for what in ("keep", "share"))
            # in the template's order: sums depend on it, and a file is read in any order
            keep = {n: kept[n].clone() for n in template.keep if n in kept}
            share = {
                n: (source, shared[n].clone(), units)
                for n, (source, _, units) in template.share.items()
                if n in shared
            }
            restored[name] = Vectors(keep, share) if keep else None
        assert restored["now"] is not None
        self.now, self.frozen = restored["now"], restored["frozen"]
        names = ["progress", "masked_loss", "full_loss", *self._shares(self.now)]
        rows = state["watched"].tolist() if "watched" in state else []
        self.watched = [dict(zip(names, row, strict=True)) for row in rows]

    def facts(self) -> dict[str, float]:
        facts: dict[str, float] = {
            "steps": self.weight_steps,
            "structure_steps": self.structure_steps,
            "skipped_steps": self.skipped,
            "threshold": self.threshold,
            **self._shares(self.now),
        }
        if self.watched:
            last = self.watched[-1]
            facts |= {name: last[name] for name in ("masked_loss", "full_loss")}
            facts["gap"] = last["masked_loss"] - last["full_loss"]
        return facts

    def history(self) -> list[dict[str, float]]:
        return [{**e, "gap": e["masked_loss"] - e["full_loss"]} for e in self.watched]

    def _shares(self, vectors: Vectors) -> dict[str, float]:
        """Fractions: of the cost that remains; per tower, of units kept, shared and pruned."""
        facts = {"remains": float(vectors.cost(self.prices)) / self.prices.total}
        alive, own = vectors.alive(), vectors.own()
        for tower in (self.method.base, self.method.other):
            names = [s.name for s in structures_of(self.vectors) if s.tower == tower]
            units = sum(self.prices.sizes[name] for name in names)
            if units:
                living = sum(float(alive[name].sum()) for name in names) / units
                kept = sum(float((own[name] * alive[name]).sum()) for name in names) / units
                facts |= {
                    f"{tower}_kept": kept,
                    f"{tower}_shared": living - kept,
                    f"{tower}_pruned": 1 - living,
                }
        return facts


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
