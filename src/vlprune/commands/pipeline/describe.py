"""The description of a model that ``vlprune inspect`` shows."""

from __future__ import annotations

from typing import Any

from ...architectures import discover
from ...prices import cost
from ...prices.prices import (
    Prices,
    least,
)
from ...structures.structure import Description

__all__ = ["describe"]


def describe(
    model: Any, example_inputs: Any, attention: str, experts: str = "neuron"
) -> dict[str, Any]:
    """Structures, units, params and MACs of a model by tower and kind: plain values.

    MACs are counted on ``example_inputs``, the keywords of a forward pass; without inputs, or where
    the forward pass does not take them, the MACs are None and ``macs_problem`` says why.
    """
    description = discover(model, attention, experts)  # type: ignore[arg-type]
    prices = cost.param_prices(model, description.structures)
    macs, problem = _macs(model, description, example_inputs)
    return {
        "model": type(model).__name__,
        "attention": description.attention,
        "experts": description.experts,
        "fingerprint": description.fingerprint,
        "params": round(prices.total),
        "macs": macs.total if macs else None,
        "macs_problem": problem,
        "not_counted": list(macs.not_counted) if macs else [],
        "groups": _groups(description, prices, macs),
        "least_params": least(prices),
        "dense": dict(description.dense),
    }


def _macs(
    model: Any, description: Description, example_inputs: Any
) -> tuple[cost.MacsProfile | None, str]:
    """The MACs of a forward pass, and why they cannot be counted ("" if they can)."""
    if example_inputs is None:
        return None, ""
    try:
        return cost.measure_macs(model, description.structures, example_inputs), ""
    except Exception as error:
        if next(model.parameters()).is_meta:
            return None, "its forward pass looks at values, so inspect it with its weights"
        return None, f"made-up inputs do not fit it ({str(error).splitlines()[0]})"


def _groups(
    description: Description, prices: Prices, macs: cost.MacsProfile | None
) -> list[dict[str, Any]]:
    """One row per tower and kind of structure."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for structure in description:
        row = groups.setdefault(
            (structure.tower, structure.kind),
            {
                "tower": structure.tower,
                "kind": structure.kind,
                "structures": 0,
                "units": 0,
                "params": 0,
                "macs": 0 if macs else None,
                "padded": 0,
                "shared": 0,
            },
        )
        row["structures"] += 1
        row["units"] += structure.size
        row["params"] += round(prices.whole(structure.name))
        row["shared"] += len(prices.elsewhere.get(structure.name, ()))
        row["padded"] += structure.layout == "padded"
        if macs:
            row["macs"] += round(macs.unit[structure.name] * structure.size)
    return list(groups.values())
