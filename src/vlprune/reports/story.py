"""What is told of one or several folders: headings, sentences and tables as plain values.

Needs no weights and imports nothing heavy. The command line, Markdown and the page show the same
blocks, each in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .blocks import Block, Column, Heading, Sentence, Table
from .words import duration, human, metric_unit, percent, summary, tower_of, where

__all__ = [
    "calibration",
    "common_units",
    "comparable",
    "comparison",
    "details",
    "faster",
    "layers_of",
    "opening",
    "overview",
    "sizes",
    "speed",
    "stages",
    "story",
]

BARS = " ▁▂▃▄▅▆▇█"


def story(reports: Sequence[Mapping[str, Any]]) -> list[Block]:
    """All that is to be said of one or several folders."""
    blocks: list[Block] = []
    if len(reports) > 1:
        blocks += [Heading("Overview", 1), overview(reports)]
    for report in reports:
        blocks += [Heading(str(report["folder"]), 1), *opening(report), *details(report)]
    if comparable(reports):
        blocks += [Heading("The two plans", 1), comparison(*reports)]
    return blocks


def opening(report: Mapping[str, Any]) -> list[Block]:
    """Asked and reached, the notes (an unfinished search, say), and a table of the stages."""
    notes = (Sentence(f"Note: {note}.") for note in report.get("notes", ()))
    table = stages(report) if report.get("metrics") else sizes(report)
    return [Sentence(summary(report)), *notes, table]


def details(report: Mapping[str, Any]) -> list[Block]:
    """The other tables of one folder: where the budget went, exports, speed."""
    blocks: list[Block] = [Heading("Where the budget went"), _groups(report)]
    if report.get("calibration"):
        blocks += [Heading("Calibration"), *calibration(report)]
        if report.get("peak_bytes"):
            blocks.append(Sentence(f"Memory: {human(report['peak_bytes'])}B at most."))
    if report.get("exports"):
        blocks += [Heading("Exports"), _exports(report["exports"])]
    if isinstance(report.get("bench"), dict):
        blocks += speed(report["bench"])
    return blocks


def stages(report: Mapping[str, Any]) -> Table:
    """The dense, the cut and the retrained model: size, speed and metrics."""
    batches = next(iter(report["latency_seconds"].values()))
    metrics = next(iter(report["metrics"].values()))
    rows = []
    for stage, values in report["metrics"].items():
        when = "before" if stage == "dense" else "after"
        seconds = report["latency_seconds"]["dense" if stage == "dense" else "small"]
        row = {"stage": stage, "params": report["params"][when], "macs": report["macs"][when]}
        row |= {f"batch {batch}": took for batch, took in seconds.items()}
        rows.append(row | {f"metric {name}": value for name, value in values.items()})
    columns = (
        Column("stage", "model"),
        Column("params", "params", "count"),
        Column("macs", "MACs", "count"),
        *(Column(f"batch {batch}", f"batch {batch}", "latency") for batch in batches),
        *(Column(f"metric {name}", name.replace("_", " "), metric_unit(name)) for name in metrics),
    )
    return Table(columns, tuple(rows))


def sizes(report: Mapping[str, Any]) -> Table:
    """The dense and the small model, where no task has measured what they can do."""
    macs = report.get("macs")
    rows = [
        {"model": name, "params": report["params"][when]} | ({"macs": macs[when]} if macs else {})
        for name, when in (("dense", "before"), ("small", "after"))
    ]
    columns = (
        Column("model", "model"),
        Column("params", "params", "count"),
        *([Column("macs", "MACs", "count")] if macs else []),
    )
    return Table(columns, tuple(rows))


def calibration(report: Mapping[str, Any]) -> list[Block]:
    """What the cut was calibrated on, and how far outputs and layers are from the dense model's."""
    facts = report["calibration"]
    items = f"{facts['items']:,} items in " if facts.get("items") else ""
    told = f"Calibrated on {items}{facts['batches']:,} batches, without labels."
    left = facts.get("not_rotated", {})
    if facts.get("rotated"):
        told += " Heads were turned to their free basis first"
        told += f", except in {len(left)} attention blocks." if left else "."
    blocks: list[Block] = [Sentence(told)]
    outputs = facts.get("outputs")
    if not outputs:
        return [*blocks, Sentence("The weights that stay were not repaired.")]
    rows = [
        {"what": f"output {name}", "before": outputs["before"][name], "after": after}
        for name, after in outputs["after"].items()
    ]
    for tower, error in facts.get("towers", {}).items():
        name = f"layers of {tower_of({'tower': tower})}"
        rows.append({"what": name, "before": error["before"], "after": error["after"]})
    columns = (
        Column("what", "relative error of"),
        Column("before", "cut", "share"),
        Column("after", "cut and repaired", "share"),
    )
    meaning = (
        "Errors are against the dense model: of its outputs on held-out batches, and of the layers "
        "that read what was cut, as the root mean square of a tower's layers."
    )
    return [*blocks, Table(columns, tuple(rows)), Sentence(meaning)]


def _groups(report: Mapping[str, Any]) -> Table:
    layers = layers_of(report)
    rows = []
    for group in report["groups"]:
        key = (tower_of(group), group["kind"])
        shares = [layer["kept"] / layer["units"] for layer in layers.get(key, [])]
        cost, shared = group.get("params"), group.get("shared")
        rows.append(
            {
                "tower": tower_of(group),
                "kind": group["kind"],
                "layers": group["structures"],
                "kept": group["kept"] / group["units"],
                "shared": shared / group["units"] if shared else None,
                "params": (cost["before"], cost["after"]) if cost else None,
                "profile": "".join(BARS[max(1, round(8 * share))] for share in shares) or None,
            }
        )
    columns = (
        Column("tower", "tower"),
        Column("kind", "kind"),
        Column("layers", "layers", "number"),
        Column("kept", "kept", "share"),
        *([Column("shared", "shared", "share")] if any(row["shared"] for row in rows) else []),
        Column("params", "params", "count"),
        Column("profile", "layer by layer"),
    )
    return Table(columns, tuple(rows))


def _exports(exports: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for one in exports:
        worst = max(row["difference"] for row in one["checked"])
        compared = min(row.get("compared", 1) for row in one["checked"])
        left = "" if compared == 1 else f", {percent(compared)} of the values compared"
        rows.append(
            {
                "format": f"{one['format']}{', int8' if one['int8'] else ''}",
                "size": sum(one["files"].values()),
                "difference": f"{worst:.1g}{left}",
            }
        )
    columns = (
        Column("format", "format"),
        Column("size", "size", "bytes"),
        Column("difference", "largest difference to PyTorch", "difference"),
    )
    return Table(columns, tuple(rows))


def speed(bench: Mapping[str, Any]) -> list[Block]:
    """How long each model took in each engine, and how much faster the smaller one is."""
    rows = [row for row in bench["runs"] if "failed" not in row]
    columns = (
        Column("engine", "engine"),
        Column("batch", "batch", "number"),
        Column("model", "model"),
        Column("median", "latency", "latency"),
        Column("items_per_second", "items/s", "rate"),
    )
    heading = Heading(f"Speed on {where(bench['conditions'])}")
    return [heading, Table(columns, tuple(rows)), *faster(bench)]


def faster(bench: Mapping[str, Any]) -> list[Sentence]:
    """How many times as fast the smaller model is, per engine and batch size."""
    sentences = []
    for row in bench["faster"]:
        range_ = f" ({row['low']:.2f}-{row['high']:.2f})" if {"low", "high"} <= row.keys() else ""
        share = row.get("of_ideal")
        ideal = f", {percent(share)} of the ideal (the MACs saved)" if share is not None else ""
        text = f"{row['engine']}, batch {row['batch']}: {row['times']:.2f} times as fast"
        sentences.append(Sentence(f"{text}{range_}{ideal}."))
    return sentences


def overview(reports: Sequence[Mapping[str, Any]]) -> Table:
    """All folders beside each other, and the dense model of the first that measured its own."""
    metrics = list(dict.fromkeys(r["metric"] for r in reports if r.get("metric")))
    columns = (
        Column("model", "model"),
        Column("method", "method"),
        Column("params", "params", "count"),
        Column("macs", "MACs", "count"),
        Column("latency", "latency", "latency"),
        *(Column(f"metric {name}", name.replace("_", " "), metric_unit(name)) for name in metrics),
    )
    rows = [_line(report, "after") | {"method": report["method"]} for report in reports]
    dense = [report for report in reports if report.get("metrics")]
    if dense:
        rows.append(_line(dense[0], "before") | {"model": "dense"})
    return Table(columns, tuple(rows))


def _line(report: Mapping[str, Any], when: str) -> dict[str, Any]:
    """One row of the overview: the dense model ``before`` or the small one ``after``."""
    seconds = report.get("latency_seconds", {}).get("dense" if when == "before" else "small", {})
    batch = max(seconds, key=int, default="")
    stages = list((report.get("metrics") or {}).values())
    metrics = stages[0 if when == "before" else -1] if stages else {}
    return {
        "model": str(report["folder"]),
        "params": report["params"][when],
        "macs": report["macs"][when] if report.get("macs") else None,
        "latency": f"{duration(seconds[batch])} (batch {batch})" if batch else None,
        **{f"metric {name}": value for name, value in metrics.items()},
    }


def comparable(reports: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are two folders that were cut from one dense model."""
    first = reports[0]["fingerprint"]
    return len(reports) == 2 and bool(first) and first == reports[1]["fingerprint"]


def comparison(one: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    """What both plans keep of every tower and kind."""
    columns = (
        Column("tower", "tower"),
        Column("kind", "kind"),
        Column("units", "units", "number"),
        Column("one", f"kept by {one['folder']}", "share"),
        Column("other", f"by {other['folder']}", "share"),
        Column("both", "by both", "share"),
    )
    rows = [
        row | {key: row[key] / row["units"] for key in ("one", "other", "both")}
        for row in common_units(one, other)
    ]
    return Table(columns, tuple(rows))


def layers_of(report: Mapping[str, Any]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """{(tower, kind): its structures, first to last}."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer in report.get("layers", ()):
        groups.setdefault((tower_of(layer), layer["kind"]), []).append(layer)
    return groups


def common_units(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How two plans for one dense model differ, by tower and kind.

    Rows of ``tower``, ``kind``, ``units``, what ``one`` and ``other`` keep, and what ``both`` keep.
    Raises CheckpointError if they were made for different models.
    """
    if not one["fingerprint"] or one["fingerprint"] != other["fingerprint"]:
        raise CheckpointError(
            f"{one['folder']} and {other['folder']} were not cut from models of one shape, so "
            "their plans cannot be compared"
        )
    rows = []
    for (tower, kind), layers in layers_of(one).items():
        row: dict[str, Any] = {"tower": tower, "kind": kind}
        row |= dict.fromkeys(("units", "one", "other", "both"), 0)
        for layer in layers:
            every = range(layer["units"])
            ours = set(one["keep"].get(layer["name"], every))
            theirs = set(other["keep"].get(layer["name"], every))
            row["units"] += layer["units"]
            row["one"] += len(ours)
            row["other"] += len(theirs)
            row["both"] += len(ours & theirs)
        rows.append(row)
    return rows
