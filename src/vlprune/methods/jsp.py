"""Joint share and prune: one hypernetwork decides what goes and what is shared, across towers.

US patent 12,386,873 B2 (Samsung Electronics, granted 2025-08-12) claims a device of this kind. So
this method is used only where it is asked for by name, and is the default nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BudgetError, RecipeError, UnsupportedError, VlpruneError
from ..recipe.options import JspOptions
from ..structures.structure import Structure
from .base import Alignment, Alternating, Method, Problem, Search
from .schedule import removed_share
from .vectors import Vectors

__all__ = ["JSP", "HyperNetwork"]

MEDIAN = -math.log(math.log(2))
"""Of Gumbel(0, 1), 0.3665: a logit above its negative is kept in more than half of all draws."""


class JSP(JspOptions, Method):
    """Joint share and prune (ICLR 2023, openreview UMERaIHMwB3), as far as it is public; see below.

    Every unit of the towers ``base`` and ``other`` has a number m, 1 where it stays. A unit of
    ``other`` may take its weights from the layer of ``base`` at equal depth (``"cross"``), a unit
    of ``base`` from the first layer of its block of ``block`` layers (``"block"``). A hypernetwork
    makes all these vectors, so it sees layers and modalities together; it is trained in turn with
    the weights, one step every ``every`` weight steps, on held-out batches: task loss plus
    ``budget_weight`` times log(max(P, target) / target), P the parameters that the vectors leave.
    The weights are trained whole, and drawn to the wanted structure: ``alignment`` times their
    distance from it (:func:`vlprune.methods.vectors.alignment`) joins the loss, and once it is
    frozen that distance also fades on UPop's schedule, to exactly 0 at the end. Then units go and
    are shared for real, which changes nothing.

    Stated in the source: sharing across backbones and inside blocks, pruning in both, one
    hypernetwork, the alignment term, training in turn. Ours, because no code is public: everything
    with a number here, the form of the network and of the losses, close to the authors' sibling
    works.

    ``families`` switches parts off for comparison. ``group_size`` units decide together.
    ``warmup``, ``align`` and ``freeze`` are progress: the hypernetwork learns from ``warmup`` to
    ``freeze``, weights are aligned from ``align`` on. ``match`` pairs units by the cosine of
    their weights (Hungarian) instead of by number. ``mismatch="skip"`` shares only where two layers
    are alike and leaves the others alone, ``"error"`` refuses.

    Needs ``held_out`` batches in the Compressor (a recipe splits them off by itself).
    """

    needs_held_out: ClassVar[bool] = True

    def start(self, problem: Problem) -> Search:
        """A search that keeps everything. Raises BudgetError if the budget cannot be reached."""
        return _JspSearch(self, problem)


@dataclass(frozen=True)
class _Vector:
    """One head of the hypernetwork: which units of a structure stay, or which it shares."""

    structure: Structure
    depth: float
    source: str = ""
    units: Tensor | None = None  # of the source, for each unit; -1: has none

    @property
    def name(self) -> str:
        """A name that no other vector has."""
        return f"{self.structure.name}<{self.source}" if self.source else self.structure.name


class HyperNetwork(nn.Module):
    """From fixed random inputs, one a vector, to a logit for each of the vector's units."""

    inputs: Tensor

    def __init__(self, sizes: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.randn(len(sizes), 32, generator=generator))
        self.rnn = nn.GRU(32, 64, bidirectional=True)
        self.norm = nn.LayerNorm(128)
        self.heads = nn.ModuleList(nn.Linear(128, size, bias=False) for size in sizes)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter is not self.norm.weight and parameter is not self.norm.bias:
                    width = 128 if parameter.dim() == 2 and parameter.shape[1] == 128 else 64
                    parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
            for head in self.heads.parameters():
                head.mul_(0.1)  # so that no draw removes anything at first

    def forward(self) -> list[Tensor]:
        """One row of logits a vector."""
        states, _ = self.rnn(self.inputs)
        states = nn.functional.gelu(self.norm(states))
        return [head(state) for head, state in zip(self.heads, states, strict=True)]


class _Rounded(torch.autograd.Function):
    """Exactly 0 or 1, with the gradient of the number that was rounded (straight-through)."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor) -> Tensor:
        return soft.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _JspSearch(Alternating):
    def __init__(self, method: JSP, problem: Problem) -> None:
        super().__init__(problem)
        if problem.groups:
            raise BudgetError("JSP decides layer by layer: it cannot keep one width a tower")
        if problem.prices.curve:
            raise BudgetError(
                "JSP takes a budget in params or macs: a latency has no gradient by single units"
            )
        self.method, self.prices = method, problem.prices
        self.target = problem.budget * problem.prices.total
        self.vectors = _vectors(method, problem)
        self.generator = torch.Generator().manual_seed(method.seed)
        sizes = [math.ceil(v.structure.size / method.group_size) for v in self.vectors]
        self.network = HyperNetwork(sizes, self.generator)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=method.learning_rate, weight_decay=method.weight_decay
        )
        lowest = float(self._vectors_at(math.inf).cost(problem.prices))
        if lowest > self.target:
            raise BudgetError(
                f"a budget of {problem.budget:.4g} of the {problem.prices.what} cannot be reached "
                f"by {' and '.join(method.families)} in the towers {method.base} and "
                f"{method.other}: {lowest / problem.prices.total:.4g} remains; ask for at least "
                f"{math.ceil(1000 * lowest / problem.prices.total) / 1000:.3f}"
            )
        self.weight_steps = self.structure_steps = self.skipped = 0
        self.frozen: Vectors | None = None
        self.threshold, self.remains = 0.0, 1.0
        self.now = self._vectors_at(0.0)
        self.watched: list[dict[str, float]] = []
        self._drawn: Vectors | None = None

    @property
    def decides_on(self) -> frozenset[str]:
        return frozenset(vector.structure.name for vector in self.vectors)

    # -- logits to vectors -----------------------------------------------------------------

    def _logits(self) -> list[Tensor]:
        """o + b for each unit of each vector: (size,) each."""
        group = self.method.group_size
        return [
            row.repeat_interleave(group)[: vector.structure.size] + self.method.offset
            for row, vector in zip(self.network(), self.vectors, strict=True)
        ]

    def _assemble(self, decided: Sequence[Tensor], logits: Sequence[Tensor]) -> Vectors:
        """m and s from u; where nothing of a structure would be alive, its best unit stays."""
        keep = {s.name: torch.ones(s.size) for s in self._mine()}
        share: dict[str, tuple[str, Tensor, Tensor]] = {}
        best: dict[str, int] = {}
        for vector, u, logit in zip(self.vectors, decided, logits, strict=True):
            name = vector.structure.name
            if vector.source:
                assert vector.units is not None
                there = (vector.units >= 0).to(u)
                share[name] = (vector.source, (1 - u) * there, vector.units.clamp(min=0))
            else:
                keep[name], best[name] = u, int(logit.argmax())
        for name, unit in best.items():
            if name not in share and not bool((keep[name] > 0.5).any()):
                keep[name] = _on(keep[name], unit)
        found = Vectors(keep, share)
        for name in share:
            if not bool((found.alive()[name] > 0.5).any()):
                unit = best.get(name, 0)
                keep[name] = _on(keep[name], unit)
                source, values, units = share[name]
                share[name] = (source, 1 - _on(1 - values, unit), units)
                found = Vectors(keep, share)
        return found

    def _mine(self) -> list[Structure]:
        """The structures that have a vector, each once."""
        return list({v.structure.name: v.structure for v in self.vectors}.values())

    @torch.no_grad()
    def _vectors_at(self, threshold: float, whole: Collection[str] = ()) -> Vectors:
        """Without noise: u is 1 where the logit, with the noise's median, exceeds a threshold.

        And everywhere in the structures that stay ``whole``.
        """
        logits = self._logits()
        decided = [
            torch.ones_like(x) if v.structure.name in whole else (x + MEDIAN >= threshold).float()
            for x, v in zip(logits, self.vectors, strict=True)
        ]
        return self._assemble(decided, logits)

    @torch.no_grad()
    def _fitted(self) -> Vectors:
        """The vectors at the lowest threshold that meets the budget: exported, deterministic."""
        levels = torch.cat(self._logits()).add(MEDIAN).unique()  # ascending
        low, high = 0, len(levels)  # at levels[low] too much may remain, at +inf it fits
        found, self.threshold = self._vectors_at(math.inf, self.whole), math.inf
        if float(found.cost(self.prices)) > self.target * (1 + 1e-12):
            raise BudgetError(
                f"the loss on held-out batches does not depend on {min(self.whole)}"
                + (f" and {len(self.whole) - 1} more structures" if len(self.whole) > 1 else "")
                + ", which stay whole, and without them the budget cannot be reached: give "
                "held-out batches that need them, or ask for a larger budget"
            )
        while low < high:
            middle = (low + high) // 2
            trial = self._vectors_at(float(levels[middle]), self.whole)
            if float(trial.cost(self.prices)) <= self.target * (1 + 1e-12):
                found, self.threshold, high = trial, float(levels[middle]), middle
            else:
                low = middle + 1
        return found

    # -- in turn with the weights ------------------------------------------------------------

    def expect(self, steps: int) -> None:
        method = self.method
        every = range(method.every, steps + 1, method.every)
        if not any(method.warmup <= step / steps < method.freeze for step in every):
            raise RecipeError(
                f"a search of {steps} steps leaves JSP no step to learn in: one comes every "
                f"{method.every} steps, between {method.warmup:.0%} and {method.freeze:.0%} of the "
                f"search; lower method.every, to a hundredth of the steps or less"
            )

    def due(self, progress: float) -> bool:
        self.weight_steps += 1
        return self.weight_steps % self.method.every == 0

    def learns(self, progress: float) -> bool:
        return self.method.warmup <= progress < self.method.freeze and self.frozen is None

    def draw(self, progress: float) -> Vectors:
        if not self.learns(progress):
            return self._current(progress)
        logits = self._logits()
        decided = []
        for logit in logits:
            uniform = torch.rand(logit.shape, generator=self.generator).clamp(1e-9, 1 - 1e-7)
            soft = ((logit - (-uniform.log()).log()) / self.method.temperature).sigmoid()
            decided.append(_Rounded.apply(soft))
        self._drawn = self._assemble(decided, logits)
        return self._drawn

    def learn(
        self,
        progress: float,
        keep: Mapping[str, Tensor],
        share: Mapping[str, Tensor],
    ) -> None:
        drawn, self._drawn = self._drawn, None
        assert drawn is not None
        pulled = [(drawn.keep[name], g) for name, g in keep.items()]
        pulled += [(drawn.share[name][1], g) for name, g in share.items()]
        pulled = [(v, g.to(v)) for v, g in pulled if v.requires_grad]
        if not all(bool(g.isfinite().all()) for _, g in pulled):
            self.skipped += 1
            return
        cost = drawn.cost(self.prices)
        self.optimizer.zero_grad()
        if float(cost.detach()) > self.target:  # no pull at or below the target
            excess = self.method.budget_weight * torch.log(cost / self.target)
            pulled.append((excess, torch.ones_like(excess)))
        torch.autograd.backward([v for v, _ in pulled], [g for _, g in pulled])
        self.optimizer.step()
        self.structure_steps += 1
        self.now = self._vectors_at(0.0)

    def _current(self, progress: float) -> Vectors:
        """What the weights are aligned with: the structure as it is now, or as it was frozen."""
        if progress >= self.method.freeze and self.frozen is None and self.structure_steps:
            self.frozen = self.now = self._fitted()
        return self.now

    def alignment(self, progress: float) -> Alignment | None:
        method = self.method
        if progress < method.align or not self.structure_steps:
            return None
        vectors, factor = self._current(progress), 1.0
        if self.frozen is not None:
            after = (progress - method.freeze) / max(1e-9, 1 - method.freeze)
            remains = 1 - removed_share(min(1.0, after)) if progress < 1 else 0.0
            factor = remains / self.remains if self.remains > 0 else 0.0
            self.remains = remains
        return Alignment(vectors, method.alignment, factor)

    def watch(self, progress: float, masked: float, full: float) -> None:
        self.watched.append(
            {
                "progress": progress,
                "masked_loss": masked,
                "full_loss": full,
                **self._shares(self.now),
            }
        )

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
        return self.frozen if self.frozen is not None else self._fitted()

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
        counts = [self.weight_steps, self.structure_steps, self.skipped]
        state["counts"] = torch.tensor(counts)
        state["levels"] = torch.tensor([self.threshold, self.remains], dtype=torch.float64)
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
        self.weight_steps, self.structure_steps, self.skipped = state["counts"].tolist()
        self.threshold, self.remains = state["levels"].tolist()
        template = self._vectors_at(0.0).share
        found = {}
        for name in ("now", "frozen"):
            keep = {n: t.clone() for n, t in _below(f"{name}/keep/", state).items()}
            share = {
                n: (template[n][0], t.clone(), template[n][2])
                for n, t in _below(f"{name}/share/", state).items()
            }
            found[name] = Vectors(keep, share) if keep else None
        assert found["now"] is not None
        self.now, self.frozen = found["now"], found["frozen"]
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
        """What remains of the budget's currency, and of each tower what is kept and shared."""
        facts = {"remains": float(vectors.cost(self.prices)) / self.prices.total}
        alive, own = vectors.alive(), vectors.own()
        for tower in (self.method.base, self.method.other):
            names = [s.name for s in self._mine() if s.tower == tower]
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


def _on(values: Tensor, unit: int) -> Tensor:
    """The values with one unit at 1, differentiable in the others."""
    mask = torch.zeros_like(values)
    mask[unit] = 1
    return values * (1 - mask) + mask


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


# -- which vectors there are ---------------------------------------------------------------


def _vectors(method: JSP, problem: Problem) -> list[_Vector]:
    """All heads, by depth, the towers taking turns."""
    layers = {tower: _layers(problem.structures, tower) for tower in (method.base, method.other)}
    for tower, found in layers.items():
        if not found and (tower == method.base or "cross" in method.families):
            towers = sorted({s.tower for s in problem.structures})
            raise UnsupportedError(
                f"this model has no structures in the tower {tower!r}, which JSP shares with: its "
                f"towers are {', '.join(towers)}; name them with base= and other="
            )
    vectors = []
    for tower, kinds in layers.items():
        for members in kinds.values():
            for number, structure in enumerate(members):
                depth = (number + 1) / len(members)
                if "prune" in method.families:
                    vectors.append(_Vector(structure, depth))
                source = _source(method, tower, kinds, layers, structure, number)
                if source is not None:
                    shared = _shared(method, problem, structure, source, depth)
                    vectors += [shared] if shared else []
    if "prune" not in method.families and not vectors:
        raise UnsupportedError("no two layers of this model can share: allow prune as well")
    return sorted(vectors, key=lambda v: (v.depth, v.structure.tower != method.base))


def _layers(structures: Sequence[Structure], tower: str) -> dict[str, list[Structure]]:
    """{kind: the tower's structures of that kind, first layer first}."""
    kinds: dict[str, list[Structure]] = {}
    for structure in structures:
        if structure.tower == tower:
            kinds.setdefault(structure.kind, []).append(structure)
    return kinds


def _source(
    method: JSP,
    tower: str,
    kinds: Mapping[str, list[Structure]],
    layers: Mapping[str, Mapping[str, list[Structure]]],
    structure: Structure,
    number: int,
) -> Structure | None:
    """The layer that the units of a structure may take their weights from."""
    if tower == method.other and tower != method.base:
        over = layers[method.base].get(structure.kind, [])
        if "cross" not in method.families or not over:
            return None
        own = len(kinds[structure.kind])
        return over[math.ceil((number + 1) * len(over) / own) - 1]
    if "block" not in method.families or number % method.block == 0:
        return None
    return kinds[structure.kind][number - number % method.block]


def _shared(
    method: JSP, problem: Problem, structure: Structure, source: Structure, depth: float
) -> _Vector | None:
    """The vector that shares, or None where the layers are unlike and that is allowed."""
    why = problem.shareable(structure, source)
    if why:
        if method.mismatch == "skip":
            return None
        raise UnsupportedError(
            f"JSP cannot share {structure.name} with {source.name}: {why}; give mismatch='skip' to "
            "share only where layers are alike, or leave that family out"
        )
    if not method.match:
        units = torch.arange(structure.size)
        units[source.size :] = -1
        return _Vector(structure, depth, source.name, units)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UnsupportedError("match=True needs scipy: pip install 'vlprune[grounding]'") from None
    alike = problem.similarity(structure, source)
    units = torch.full((structure.size,), -1)
    rows, columns = linear_sum_assignment(alike.numpy(), maximize=True)
    units[torch.as_tensor(rows)] = torch.as_tensor(columns)
    return _Vector(structure, depth, source.name, units)
