"""Numbers, units and facts of a report as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "UNITS",
    "duration",
    "human",
    "metric_unit",
    "paper_share",
    "percent",
    "summary",
    "tower_of",
    "where",
]


def human(number: float) -> str:
    """1234567 as ``1.23 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"


def percent(fraction: float) -> str:
    """0.4987 as ``49.9 %``."""
    return f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """0.0123 as ``12.3 ms``."""
    return f"{1000 * seconds:.3g} ms"


UNITS: dict[str, Callable[[Any], str]] = {
    "": str,
    "text": str,  # figures that are text already
    "number": "{:,}".format,
    "count": human,
    "share": percent,
    "seconds": "{:.2f} s".format,
    "latency": duration,
    "bytes": lambda size: f"{human(size)}B",
    "rate": lambda number: f"{number:,.{0 if number >= 100 else 1}f}",
    "loss": "{:.3f}".format,
    "difference": "{:.1g}".format,
}
"""How a number of each unit is written."""


def metric_unit(name: str) -> str:
    """The unit of a metric: all are fractions, but for a loss."""
    return "loss" if name == "loss" else "share"


def tower_of(row: Mapping[str, Any]) -> str:
    """The tower of a group or a layer; a model without towers is called model."""
    tower: str = row["tower"]
    return tower or "model"


def where(told: Mapping[str, Any]) -> str:
    """On what something ran: the name of the device, or the number of CPU threads."""
    device: str = told.get("device", "cpu")  # reports of earlier versions name no device
    threads = told["threads"]
    return device if device != "cpu" else f"{threads} CPU thread{'s' if threads != 1 else ''}"


def paper_share(report: Mapping[str, Any]) -> float | None:
    """The share of the authors' prunable cost that went, where a budget was counted in it.

    Then 1 - budget was the p of UPop's paper: no fraction of the whole model. Reports of earlier
    versions do not say the share, which follows from what each layer keeps.
    """
    said = report["budget"].get("prunable_cost")
    if said:
        return float(said["removed"])
    options = report.get("options", {})
    ratio = options.get("paper_ratio")
    if options.get("cost") != "paper" or not isinstance(ratio, int | float):
        return None
    rows = [(1.0 if row["kind"] == "ffn" else ratio, row) for row in report.get("layers", ())]
    whole = sum(cost * row["units"] for cost, row in rows)
    return 1 - sum(cost * row["kept"] for cost, row in rows) / whole if whole > 0 else None


def summary(report: Mapping[str, Any]) -> str:
    """Asked and reached, and whether the cut was proved, in one or two sentences."""
    budget, proof = report["budget"], report.get("verified")
    removed = paper_share(report)
    text = (
        f"Asked for {percent(budget['asked'])} of the {budget['what']}, reached "
        f"{percent(budget['reached'])}."
        if removed is None
        else f"Asked for p = {1 - budget['asked']:.3g} of the authors' prunable cost, removed "
        f"{removed:.3g} of it; {percent(budget['reached'])} of all {budget['what']} stay."
    )
    timed = budget.get("seconds")
    if timed and "small" in timed:
        batch = next(iter(timed["shapes"].values()))[0]
        text += (
            f" On {where(timed)}, batch {batch}: {1000 * timed['dense']:.3g} ms before, "
            f"{1000 * timed['small']:.3g} ms after."
        )
    groups = report.get("groups", ())
    shared = sum(group.get("shared", 0) for group in groups)
    if shared:
        units = sum(group["units"] for group in groups)
        text += (
            f" {percent(shared / units)} of the units take their weights from another layer's; "
            "this saves parameters, not MACs."
        )
        size = report.get("weight_bytes")
        if size:
            text += (
                f" Weights are {human(size['small'])}B tied, {human(size['materialised'])}B "
                f"materialised, {human(size['dense'])}B dense."
            )
    if report.get("ordinary") == "":
        text += " Every tower has one width: the folder is an ordinary model of transformers."
    elif report.get("ordinary"):
        text += f" It needs vlprune to load: {report['ordinary']}."
    if proof:
        text += (
            f" Masked and cut model differ by at most {proof['difference']:.1g} on outputs up to "
            f"{proof['scale']:.2g} ({_proved_in(proof)})."
        )
    else:
        text += " The cut was not compared with the masked model: no batch was seen."
    return text


def _proved_in(proof: Mapping[str, Any]) -> str:
    """The dtype of a proof, and what else a reader must know of it."""
    how = str(proof["dtype"])
    if proof.get("kernel"):
        how += f", with {proof['kernel']} attention in place of the model's own"
    if proof.get("compared", 1.0) < 1:
        how += f"; {proof['compared']:.1%} of the values are finite and were compared"
    return how
