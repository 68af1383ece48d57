"""The report of a compression, asked and reached, as plain values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from ..prices import cost
from ..prices.prices import Prices
from ..structures.plan import Plan
from ..structures.structure import Structure

if TYPE_CHECKING:
    from .compressor import Compressor

__all__ = ["figures", "summary"]


def figures(compressor: Compressor) -> dict[str, float]:
    """Figures of a search as it stands; see :meth:`vlprune.Compressor.figures`."""
    values = {name: float(value) for name, value in compressor.search.facts().items()}
    gates = compressor.gates
    if gates and "remains" not in values:
        left = {name: float(gate.detach().sum()) for name, gate in gates.items()}
        unit = compressor.prices.unit
        gone = sum(unit[s.name] * (s.size - left[s.name]) for s in compressor.structures)
        values["remains"] = 1 - gone / compressor.prices.total
    return values


def summary(compressor: Compressor) -> dict[str, Any]:
    """The report of a compression: asked and reached, by tower and kind; ready for JSON."""
    plan, structures = compressor.plan(), compressor.structures
    total = compressor.params_before
    after = compressor.params_after or int(
        cost.params(compressor.model, compressor.description.structures, plan)
    )
    shared = any(plan.shared(s) for s in structures)
    proof, method = compressor.verification, compressor.method
    report: dict[str, Any] = {
        "method": type(method).__name__,
        "options": asdict(method) if is_dataclass(method) else {},
        "attention": compressor.description.attention,
        "experts": compressor.description.experts,
        "budget": _budget(compressor, plan, after / total),
        "params": {
            "before": total,
            "after": after,
            **({"materialised": _materialised(compressor, plan, after)} if shared else {}),
        },
        "groups": _groups(compressor, plan),
        "layers": [
            {
                "name": s.name,
                "tower": s.tower,
                "kind": s.kind,
                "units": s.size,
                "kept": len(plan.kept(s)),
                "shared": len(plan.shared(s)),
                "source": plan.share[s.name][0] if plan.shared(s) else None,
            }
            for s in structures
        ],
        "verified": asdict(proof) if proof else None,
        "notes": compressor.notes(),
        "search": {
            **compressor.search.facts(),
            **({"progress": compressor.progress} if method.needs_training else {}),
        },
        "search_history": compressor.search.history(),
    }
    if compressor.session is not None:
        report["calibration"] = compressor.session.facts()
    if compressor.costs.macs is not None:
        report["macs"] = {
            "before": compressor.costs.macs.total,
            "after": cost.macs_of(compressor.costs.macs, structures, plan),
            "not_counted": list(compressor.costs.macs.not_counted),
        }
    return report


def _budget(compressor: Compressor, plan: Plan, params_left: float) -> dict[str, Any]:
    """The fractions asked and reached, in the budget's own currency."""
    budget, prices = compressor.budget, compressor.prices
    units = {s.name: plan.kept(s) for s in compressor.structures}
    reached = params_left if budget.what == "params" else prices.cost(units) / prices.total
    facts: dict[str, Any] = {"what": budget.what, "asked": budget.fraction, "reached": reached}
    if prunable := compressor.search.prunable(units):  # asked is then 1 - p, and reached no goal
        facts["prunable_cost"] = {**prunable, "params_left": params_left}
    if budget.what == "latency":
        dense = prices.total
        seconds = {**compressor.costs.conditions, "dense": dense, "expected": reached * dense}
        if compressor.seconds is not None:
            seconds["small"] = compressor.seconds
            facts["reached"] = compressor.seconds / dense
        facts["seconds"] = seconds
    return facts


def _groups(compressor: Compressor, plan: Plan) -> list[dict[str, Any]]:
    """One row per tower and kind of structure."""
    groups: dict[tuple[str, str], list[Structure]] = defaultdict(list)
    for structure in compressor.structures:
        groups[structure.tower, structure.kind].append(structure)
    return [
        {
            "tower": tower,
            "kind": kind,
            "structures": len(members),
            "units": sum(s.size for s in members),
            "kept": sum(len(plan.kept(s)) for s in members),
            "shared": sum(len(plan.shared(s)) for s in members),
            "padded": sum(s.layout == "padded" for s in members),
            "params": _cost(compressor.costs.param_prices, members, plan),
        }
        for (tower, kind), members in groups.items()
    ]


def _cost(prices: Prices, members: Sequence[Structure], plan: Plan) -> dict[str, int]:
    """The cost of these structures before and after the cut."""
    after = 0.0
    for s in members:
        borrowed = (prices.unit[s.name] - prices.borrowed[s.name]) * len(plan.shared(s))
        after += float(prices.of(s.name)[list(plan.kept(s))].sum()) - borrowed
    before = sum(prices.whole(s.name) for s in members)
    return {"before": round(before), "after": round(after)}


def _materialised(compressor: Compressor, plan: Plan, stored: int) -> int:
    """Parameters of the small model when shared units are plain copies again."""
    borrowed, unit = compressor.costs.param_prices.borrowed, compressor.costs.param_prices.unit
    saved = sum(
        (unit[s.name] - borrowed[s.name]) * len(plan.shared(s)) for s in compressor.structures
    )
    return stored + round(saved)
