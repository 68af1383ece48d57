"""What is told of one or several folders: headings, sentences and tables as plain values.

Needs no weights and imports nothing heavy. The command line, Markdown and the page show the same
blocks, each in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .words import human, percent, summary, tower_of, where

__all__ = ["Block", "common_units", "layers_of", "stage_header", "stage_rows", "story"]

BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Block:
    """A heading (``level`` 1 or 2), a sentence (level 0), or a table (``rows``, first the head)."""

    text: str = ""
    level: int = 0
    rows: tuple[tuple[str, ...], ...] = ()


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


def story(reports: Sequence[Mapping[str, Any]]) -> list[Block]:
    """All that is to be said of one or several folders."""
    blocks: list[Block] = []
    if len(reports) > 1:
        blocks += [Block("Overview", 1), _overview(reports)]
    for report in reports:
        blocks += _one(report)
    if len(reports) == 2 and reports[0]["fingerprint"] == reports[1]["fingerprint"]:
        blocks += _comparison(*reports)
    return blocks


def _one(report: Mapping[str, Any]) -> list[Block]:
    blocks = [Block(str(report["folder"]), 1), Block(summary(report)), *_notes(report)]
    if report.get("metrics"):
        names, *figures = zip(stage_header(report), *stage_rows(report), strict=True)
        blocks.append(Block(rows=(tuple(names), *map(tuple, figures))))
    blocks.append(Block("Where the budget went", 2))
    rows = [("tower", "kind", "layers", "kept", "shared", "params", "layer by layer")]
    for group in report["groups"]:
        key = (tower_of(group), group["kind"])
        layers = layers_of(report).get(key, [])
        shares = [layer["kept"] / layer["units"] for layer in layers]
        cost = group.get("params")
        rows.append(
            (
                *key,
                str(group["structures"]),
                percent(group["kept"] / group["units"]),
                percent(group["shared"] / group["units"]) if group.get("shared") else "-",
                f"{human(cost['before'])} -> {human(cost['after'])}" if cost else "-",
                "".join(BARS[max(1, round(8 * share))] for share in shares) or "-",
            )
        )
    blocks.append(Block(rows=tuple(rows)))
    blocks += _exports(report) + _bench(report)
    return blocks


def _notes(report: Mapping[str, Any]) -> list[Block]:
    """What the compression itself had to say: an unfinished search, structures left dense."""
    return [Block(f"Note: {note}.") for note in report.get("notes", ())]


def _exports(report: Mapping[str, Any]) -> list[Block]:
    if not report.get("exports"):
        return []
    rows = [("format", "size", "largest difference to PyTorch")]
    for one in report["exports"]:
        worst = max(row["difference"] for row in one["checked"])
        kind = f"{one['format']}{', int8' if one['int8'] else ''}"
        compared = min(row.get("compared", 1) for row in one["checked"])
        share = "" if compared == 1 else f", {percent(compared)} of the values compared"
        rows.append((kind, f"{human(sum(one['files'].values()))}B", f"{worst:.1g}{share}"))
    return [Block("Exports", 2), Block(rows=tuple(rows))]


def _bench(report: Mapping[str, Any]) -> list[Block]:
    bench = report.get("bench")
    if not isinstance(bench, dict):
        return []
    rows = [("engine", "batch", "model", "latency", "items a second")]
    for row in bench["runs"]:
        if "failed" not in row:
            speed = f"{row['items_per_second']:,.0f}"
            took = f"{1000 * row['median']:.3g} ms"
            rows.append((row["engine"], str(row["batch"]), row["model"], took, speed))
    blocks = [Block(f"Speed on {where(bench['conditions'])}", 2), Block(rows=tuple(rows))]
    for row in bench["faster"]:
        ideal = f", {percent(row['of_ideal'])} of the MACs saved" if "of_ideal" in row else ""
        text = f"{row['engine']}, batch {row['batch']}: {row['times']:.2f} times as fast{ideal}."
        blocks.append(Block(text))
    return blocks


def _overview(reports: Sequence[Mapping[str, Any]]) -> Block:
    metrics = list(dict.fromkeys(r["metric"] for r in reports if r.get("metric")))
    rows = [("model", "method", "params", "MACs", "latency", *metrics)]
    for report in reports:
        rows.append(_line(report, str(report["folder"]), "after", "small", metrics))
    dense = [r for r in reports if r.get("metrics")]
    if dense:
        rows.append(_line(dense[0], "dense", "before", "dense", metrics))
    return Block(rows=tuple(rows))


def _line(
    report: Mapping[str, Any], name: str, when: str, which: str, metrics: Sequence[str]
) -> tuple[str, ...]:
    seconds = report.get("latency_seconds", {}).get(which, {})
    batch = max(seconds, key=int) if seconds else ""
    stages = report.get("metrics") or {}
    stage = stages.get("dense") if which == "dense" else list(stages.values() or [None])[-1]
    return (
        name,
        "-" if which == "dense" else str(report["method"]),
        human(report["params"][when]),
        human(report["macs"][when]) if report.get("macs") else "-",
        f"{1000 * seconds[batch]:.3g} ms (batch {batch})" if batch else "-",
        *(percent(stage[m]) if stage and m in stage else "-" for m in metrics),
    )


def _comparison(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Block]:
    names = one["folder"], other["folder"]
    rows = [("tower", "kind", "units", f"kept by {names[0]}", f"by {names[1]}", "by both")]
    for row in common_units(one, other):
        kept = (row["one"], row["other"], row["both"])
        counts = (percent(count / row["units"]) for count in kept)
        rows.append((row["tower"], row["kind"], str(row["units"]), *counts))
    return [Block("The two plans", 1), Block(rows=tuple(rows))]


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
