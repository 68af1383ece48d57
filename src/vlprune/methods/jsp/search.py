"""The search of JSP: its hypernetwork learns in turn with the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BudgetError, RecipeError, VlpruneError
from ...recipe.options import JspOptions
from ..base import Alignment, Problem, Search, Weights
from ..schedule import removed_share
from ..vectors import Vectors
from .network import MEDIAN, HyperNetwork, drawn, level_for, odds
from .pairs import assembled, combined, structures_of, vectors_of

__all__ = ["JspSearch"]

MOST = 3.0
"""The strongest pull on a logit that counts, in units of the mean."""
SELDOM = 5
"""Every so many looks the model is compared with and without its vectors."""
COUNTS = ("weight_steps", "structure_steps", "skipped", "looks", "looked_step")
LEVELS = ("looked_at", "learnt_at", "usual", "remains")


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
        self.savings = self._savings()
        self.generator = torch.Generator().manual_seed(method.seed)
        sizes = [math.ceil(v.structure.size / method.group_size) for v in self.vectors]
        self.network = HyperNetwork(sizes, self.generator)
        heads = set(self.network.heads.parameters())
        self.optimizer = torch.optim.AdamW(
            [p for p in self.network.parameters() if p not in heads],
            lr=method.learning_rate,
            weight_decay=method.weight_decay,
        )
        lowest = float(self.vectors_at(math.inf).cost(problem.prices))
        if lowest > self.target:
            raise BudgetError(
                f"a budget of {problem.budget:.4g} of the {problem.prices.what} cannot be reached "
                f"by {' and '.join(method.families)} in the towers {method.base} and "
                f"{method.other}: {lowest / problem.prices.total:.4g} remains; ask for at least "
                f"{math.ceil(1000 * lowest / problem.prices.total) / 1000:.3f}"
            )
        self.weight_steps = self.looked_step = self.looks = 0
        self.structure_steps = self.skipped = 0
        self.looked_at = self.learnt_at = 0.0
        self.usual, self.remains = 0.0, 1.0
        self.frozen: Vectors | None = None
        self.now = self.vectors_at(-math.inf)
        self.watched: list[dict[str, float]] = []

    @property
    def decides_on(self) -> frozenset[str]:
        return frozenset(vector.structure.name for vector in self.vectors)

    def _savings(self) -> list[float]:
        """The cost of a unit's own weights, for each vector, in that of an average unit."""
        prices = self.prices
        own = [
            prices.unit[v.structure.name]
            - (prices.borrowed.get(v.structure.name, 0.0) if v.source else 0.0)
            for v in self.vectors
        ]
        sizes = [v.structure.size for v in self.vectors]
        mean = sum(a * b for a, b in zip(own, sizes, strict=True)) / sum(sizes)
        return [value / mean if mean > 0 else 0.0 for value in own]

    # -- logits to vectors -----------------------------------------------------------------

    def _logits(self) -> list[Tensor]:
        """The network's output for each unit of each vector: (size,) each.

        Where nothing is saved by a 0, such as by sharing under a budget in MACs, it is out of reach
        of any level.
        """
        group = self.method.group_size
        return [
            row.repeat_interleave(group)[: vector.structure.size] + (0 if saves > 0 else math.inf)
            for row, vector, saves in zip(self.network(), self.vectors, self.savings, strict=True)
        ]

    @torch.no_grad()
    def vectors_at(self, threshold: float, whole: Collection[str] = ()) -> Vectors:
        """The vectors without noise: u is 1 where logit plus median noise reaches the threshold.

        In structures that stay ``whole``, u is 1 everywhere.
        """
        return self._at(self._logits(), threshold, whole)

    def _at(self, logits: Sequence[Tensor], threshold: float, whole: Collection[str]) -> Vectors:
        decided = [
            torch.ones_like(x) if v.structure.name in whole else (x + MEDIAN >= threshold).float()
            for x, v in zip(logits, self.vectors, strict=True)
        ]
        return assembled(self.vectors, decided, logits)

    @torch.no_grad()
    def fitted(self, goal: float) -> Vectors:
        """The vectors without noise at the lowest threshold that costs at most ``goal``.

        Raises BudgetError if no threshold does because structures stay whole.
        """
        logits = self._logits()
        levels = torch.cat(logits).add(MEDIAN).unique()  # ascending
        low, high = 0, len(levels)  # at levels[low] too much may remain, at +inf the budget is met
        best = self._at(logits, math.inf, self.whole)
        if float(best.cost(self.prices)) > goal * (1 + 1e-12):
            raise BudgetError(
                f"the loss on held-out batches does not depend on {min(self.whole)}"
                + (f" and {len(self.whole) - 1} more structures" if len(self.whole) > 1 else "")
                + ", which stay whole, and without them the budget cannot be reached: give "
                "held-out batches that need them, or ask for a larger budget"
            )
        while low < high:
            middle = (low + high) // 2
            trial = self._at(logits, float(levels[middle]), self.whole)
            if float(trial.cost(self.prices)) <= goal * (1 + 1e-12):
                best, high = trial, middle
            else:
                low = middle + 1
        return best

    @torch.no_grad()
    def _level(self, logits: Sequence[Tensor], goal: float) -> float:
        """The level at which draws cost ``goal`` on average, but for last units, which stay."""
        known = [logit.detach() for logit in logits]

        def cost(level: float) -> float:
            return float(combined(self.vectors, odds(known, level)).cost(self.prices))

        finite = [logit for logit in known if bool(logit.isfinite().all())]
        return level_for(cost, goal, finite)

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
            self.frozen = self.now = self.fitted(self.target)
        wanted = self._alignment(progress)
        if wanted is not None:
            weights.align(wanted)
        self.weight_steps += 1
        learns = self._learns(progress)
        if not self._due(progress, learns):
            return
        compares = not learns or self.looks % SELDOM == 0
        vectors = self.draw(progress)
        look = weights.look(vectors, learns, compares)
        self.looked_step, self.looked_at = self.weight_steps, progress
        self.looks += 1
        if look.full is not None:
            losses = {"masked_loss": look.masked, "full_loss": look.full}
            self.watched.append({"progress": progress, **losses, **self._shares(self.now)})
        if learns:
            self.learn(vectors, look.keep, look.share, progress)

    def _due(self, progress: float, learns: bool) -> bool:
        """Whether to look at a held-out batch: seldom, while the search does not learn."""
        method, rarely = self.method, 1 if learns else SELDOM
        if learns and not self.structure_steps + self.skipped:
            return True
        return (
            self.weight_steps - self.looked_step >= rarely * method.every
            or progress - self.looked_at
            >= rarely * (method.freeze - method.warmup) / method.turns * (1 - 1e-9)
        )

    def _alignment(self, progress: float) -> Alignment | None:
        """The structure, as it is now or was frozen, to draw the weights to; None if too early."""
        method = self.method
        if progress < method.align or not self.structure_steps:
            return None
        if self.frozen is None:
            return Alignment(self.now, method.alignment)
        after = (progress - method.freeze) / max(1e-9, 1 - method.freeze)
        remains = 1 - removed_share(min(1.0, after)) if progress < 1 else 0.0
        factor = remains / self.remains if self.remains > 0 else 0.0
        self.remains = remains
        return Alignment(self.frozen, method.alignment, factor)

    def _learns(self, progress: float) -> bool:
        return self.method.warmup <= progress < self.method.freeze and self.frozen is None

    def goal(self, progress: float) -> float:
        """The cost that draws have on average: falls from all to the budget while it learns."""
        method, total = self.method, self.prices.total
        passed = (progress - method.warmup) / (method.freeze - method.warmup)
        return total - (total - self.target) * removed_share(min(1.0, max(0.0, passed)))

    def draw(self, progress: float) -> Vectors:
        """The vectors to compute a loss with: a random draw while the search learns."""
        if not self._learns(progress):
            return self.now
        logits = self._logits()
        level = self._level(logits, self.goal(progress))
        return assembled(self.vectors, drawn(logits, level, self.generator), logits)

    def learn(
        self,
        vectors: Vectors,
        keep: Mapping[str, Tensor],
        share: Mapping[str, Tensor],
        progress: float,
    ) -> None:
        """Take a step, with the gradients of the loss by the vectors that were drawn.

        What a unit's weights are worth is how far they lower the loss, divided by their cost, in
        units of the mean over all units and turns.
        """
        pulled = []
        for vector, saves in zip(self.vectors, self.savings, strict=True):
            name = vector.structure.name
            values = vectors.share[name][1] if vector.source else vectors.keep[name]
            gradient = (share if vector.source else keep).get(name)
            if gradient is not None and values.requires_grad and saves > 0:
                pulled.append((values, gradient.to(values) / saves))
        together = torch.cat([gradient for _, gradient in pulled])
        if not bool(together.isfinite().all()):
            self.skipped += 1
            return
        self.structure_steps += 1
        mean = float(together.abs().mean())
        self.usual += (mean - self.usual) / min(self.structure_steps, 20)
        scale = 1 / self.usual if self.usual > 0 else 0.0
        self.network.zero_grad()
        torch.autograd.backward(
            [values for values, _ in pulled],
            [(scale * gradient).clamp(-MOST, MOST) for _, gradient in pulled],
        )
        self.optimizer.step()
        method = self.method
        passed = progress - max(self.learnt_at, method.warmup)
        step = method.reach * passed / (method.freeze - method.warmup)
        with torch.no_grad():
            for head in self.network.heads.parameters():
                if head.grad is not None:
                    head.sub_(step * head.grad)
        self.learnt_at = progress
        self.now = self.fitted(self.goal(progress))

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
        return self.frozen if self.frozen is not None else self.fitted(self.target)

    def keep(self) -> dict[str, tuple[int, ...]]:
        plan = self.chosen().plan(self.problem.structures, "", "")
        return dict(plan.keep)

    def share(self) -> dict[str, tuple[Any, ...]]:
        return dict(self.chosen().plan(self.problem.structures, "", "").share)

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
        template = self.vectors_at(-math.inf).share
        restored = {}
        for name in ("now", "frozen"):
            keep = {n: t.clone() for n, t in _below(f"{name}/keep/", state).items()}
            share = {
                n: (template[n][0], t.clone(), template[n][2])
                for n, t in _below(f"{name}/share/", state).items()
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
            "spread": self._spread(),
            **self._shares(self.now),
        }
        if self.watched:
            last = self.watched[-1]
            facts |= {name: last[name] for name in ("masked_loss", "full_loss")}
            facts["gap"] = last["masked_loss"] - last["full_loss"]
        return facts

    def history(self) -> list[dict[str, float]]:
        return [{**e, "gap": e["masked_loss"] - e["full_loss"]} for e in self.watched]

    @torch.no_grad()
    def _spread(self) -> float:
        """The standard deviation of the logits, against that of the noise in a draw (1.28)."""
        return float(torch.cat(self.network()).std(correction=0))

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
