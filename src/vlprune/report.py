"""What a report says, as text. Needs no weights and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["human", "model_card", "percent", "stage_header", "stage_rows", "summary"]


def human(number: float) -> str:
    """1234567 as ``1.23 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"


def percent(fraction: float) -> str:
    """0.4987 as ``49.9 %``."""
    return f"{100 * fraction:.1f} %"


def stage_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """One row for dense, cut and retrained: name, params, MACs, latencies, metrics."""
    rows = []
    for stage, metrics in report["metrics"].items():
        when = "before" if stage == "dense" else "after"
        seconds = report["latency_seconds"]["dense" if stage == "dense" else "small"]
        rows.append(
            [
                stage,
                human(report["params"][when]),
                human(report["macs"][when]),
                *(f"{1000 * value:.1f} ms" for value in seconds.values()),
                *(percent(value) for value in metrics.values()),
            ]
        )
    return rows


def stage_header(report: Mapping[str, Any]) -> list[str]:
    """The titles of :func:`stage_rows`."""
    batches = next(iter(report["latency_seconds"].values()))
    metrics = next(iter(report["metrics"].values()))
    titles = [name.replace("_", " ") for name in metrics]
    return ["model", "params", "MACs", *(f"batch {size}" for size in batches), *titles]


def summary(report: Mapping[str, Any]) -> str:
    """Asked and reached, and whether the cut was proved, in one or two sentences."""
    budget, proof = report["budget"], report.get("verified")
    text = (
        f"Asked for {percent(budget['asked'])} of the {budget['what']}, reached "
        f"{percent(budget['reached'])}."
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
    if proof:
        text += (
            f" Masked and cut model differ by at most {proof['difference']:.1g} on outputs up to "
            f"{proof['scale']:.2g} ({proof['dtype']})."
        )
    else:
        text += " The cut was not compared with the masked model: no batch was seen."
    return text


def _sharing(report: Mapping[str, Any]) -> str:
    """What a card says of shared weights."""
    if not any(group.get("shared", 0) for group in report.get("groups", ())):
        return ""
    return """
Shared weights are stored once and stay tied in training. `vlprune.materialize(model)` turns them
into plain dense layers: faster, larger.
"""


def model_card(report: Mapping[str, Any], model_class: str) -> str:
    """The README.md of a saved folder."""
    header, rows = stage_header(report), stage_rows(report)
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    padded = sum(group["padded"] for group in report["groups"])
    layout = (
        "Every structure was cut natively."
        if not padded
        else f"{padded} structures were cut with padded projections: they save parameters and "
        "projection MACs, not the MACs of attention scores."
    )
    return f"""---
library_name: transformers
tags: [vlprune, pruning]
---

# A smaller {model_class}

Made by vlprune with {report["method"]} ({options}; attention unit {report["attention"]}).
{summary(report)}
{layout}

```python
import vlprune  # teaches from_pretrained the smaller shapes
from transformers import {model_class}

model = {model_class}.from_pretrained("this folder")
```
{_sharing(report)}
{chr(10).join(lines)}

Latency: median of one forward pass on {report["threads"]} CPU threads, or the GPU where there
was one. MACs: multiply-adds of one forward pass at batch 1. `plan.json` lists the units that
stay, `recipe.yaml` repeats the run, `report.json` holds every number. Versions: {versions}.
"""
