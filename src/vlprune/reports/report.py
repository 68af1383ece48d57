"""What a report says: read from folders, compared, and put into words and tables.

Needs no weights and imports nothing heavy. A story is a list of blocks (headings, sentences,
tables) that the command line, Markdown and the page show each in its own way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, did_you_mean
from ..facts import Bench, Export, Report, check_facts
from ..files import plain, read_json
from ..structures.plan import Plan

__all__ = [
    "FORMATS",
    "Block",
    "common_units",
    "human",
    "layers_of",
    "markdown",
    "model_card",
    "percent",
    "read_report",
    "stage_header",
    "stage_rows",
    "story",
    "summary",
    "where",
]

FORMATS = ("text", "markdown", "json", "html")
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Block:
    """A heading (``level`` 1 or 2), a sentence (level 0), or a table (``rows``, first the head)."""

    text: str = ""
    level: int = 0
    rows: tuple[tuple[str, ...], ...] = ()


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a folder, with ``folder``, and ``keep``, ``exports``, ``bench`` where there.

    Raises CheckpointError for a folder without one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {plain(folder)}")
    report = _facts(folder / "report.json", Report)
    if report is None:
        raise CheckpointError(
            f"{plain(folder)} holds no report.json: `vlprune compress` writes one; after a loop of "
            'your own, vlprune.save(model, folder, extras={"report.json": '
            "json.dumps(compressor.report())})"
        )
    report["folder"] = plain(folder)
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").exists() else Plan()
    report["keep"] = {plain(name): units for name, units in plan.keep.items()}
    report["fingerprint"] = plan.fingerprint
    found = [_facts(path, Export) for path in sorted(folder.glob("*/vlprune-export.json"))]
    report["exports"] = [one for one in found if one is not None]
    report["bench"] = _facts(folder / "bench.json", Bench)
    return report


def _facts(path: Path, kind: Any) -> dict[str, Any] | None:
    """What a JSON file holds, checked, its texts without control characters; None without one.

    Raises CheckpointError that names file and key.
    """
    if not path.exists():
        return None
    facts = read_json(path)
    check_facts(kind, facts, path, advice="copy it again from where it was made")
    cleaned: dict[str, Any] = _cleaned(facts)
    return cleaned


def _cleaned(value: Any) -> Any:
    """The same JSON value, its texts without control characters."""
    if isinstance(value, dict):
        return {plain(key): _cleaned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    return plain(value) if isinstance(value, str) else value


def layers_of(report: Mapping[str, Any]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """{(tower, kind): its structures, first to last}."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer in report.get("layers", ()):
        groups.setdefault((layer["tower"] or "model", layer["kind"]), []).append(layer)
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
        key = (group["tower"] or "model", group["kind"])
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


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    parts = []
    for block in blocks:
        if block.rows:
            head, *body = block.rows
            parts.append(_table(head, body))
        else:
            text = _as_text(block.text)
            parts.append(f"{'#' * block.level} {text}" if block.level else text)
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [[_as_text(cell) for cell in row] for row in (head, *body)]
    rows.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _as_text(text: str) -> str:
    """The text so that Markdown shows it as it is: names may hold markup, links or HTML."""
    one_line = plain(" ".join(text.split()))
    return re.sub(r"([\\`*\[\]<|]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)


def check_format(name: str) -> str:
    """``name`` if it is a format. Raises CheckpointError."""
    if name not in FORMATS:
        raise CheckpointError(
            f"a report is written as {', '.join(FORMATS)}, not {name!r}."
            f"{did_you_mean(name, FORMATS)}"
        )
    return name


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


def where(told: Mapping[str, Any]) -> str:
    """On what something ran: the name of the device, or the number of CPU threads."""
    device: str = told.get("device", "cpu")  # reports of earlier versions name no device
    return device if device != "cpu" else f"{told['threads']} CPU threads"


def summary(report: Mapping[str, Any]) -> str:
    """Asked and reached, and whether the cut was proved, in one or two sentences."""
    budget, proof = report["budget"], report.get("verified")
    text = (
        f"Asked for {percent(budget['asked'])} of the {budget['what']}, reached "
        f"{percent(budget['reached'])}."
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


def _sharing(report: Mapping[str, Any]) -> str:
    """What a card says of shared weights."""
    if not any(group.get("shared", 0) for group in report.get("groups", ())):
        return ""
    return """
Shared weights are stored once and stay tied in training. `vlprune.materialize(model)` turns them
into plain dense layers: faster, larger.
"""


def model_card(report: Mapping[str, Any], model_class: str) -> str:
    """The README.md of a saved folder: what it is, how it was made, figures, limits."""
    header, rows = stage_header(report), stage_rows(report)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    told = f"{report['method']} ({options}; attention unit {report['attention']})"
    return f"""---
library_name: transformers
tags: [vlprune, pruning]
---

# A smaller {model_class}

Made by vlprune with {_as_text(told)}.
{_as_text(summary(report))}

```python
import vlprune  # teaches from_pretrained the smaller shapes
from transformers import {model_class}

model = {model_class}.from_pretrained("this folder")
```
{_sharing(report)}
{_table(header, rows)}

Latency: median of one forward pass on {where(report)}.
MACs: multiply-adds of one forward pass at batch 1.

## How it was made

    vlprune compress recipe.yaml -o small

with the `recipe.yaml` of this folder; `plan.json` lists the units that stay, `report.json` holds
every number, and `vlprune report` draws it. Versions: {versions}.

## Limits

{chr(10).join(f"- {_as_text(limit)}" for limit in _limits(report))}
"""


def _limits(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures should know."""
    padded = sum(group["padded"] for group in report["groups"])
    limits = [
        "It is an ordinary model: it loads without vlprune."
        if report.get("ordinary") == ""
        else "Loading needs import vlprune in the process; exports of vlprune export do not.",
        f"The figures are of one run of the task {report['task']} with one seed.",
        "It was trained on the data of its recipe and inherits the biases of that data and of the "
        "dense model; what was pruned may have mattered for inputs that were not tested.",
    ]
    if padded:
        limits.append(
            f"{padded} structures were cut with padded projections: they save parameters and "
            "projection MACs, not the MACs of attention scores."
        )
    uncounted = (report.get("macs") or {}).get("not_counted")
    if uncounted:
        limits.append(f"Not counted in MACs: {', '.join(uncounted)}.")
    limits += [f"{note[:1].upper()}{note[1:]}." for note in report.get("notes", ())]
    if not report.get("verified"):
        limits.append("The cut was not compared with the masked model.")
    return limits
