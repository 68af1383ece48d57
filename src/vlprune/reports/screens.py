"""What the other commands show, as blocks: a model, its sensitivity, timings, exports, a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import Block, Column, Sentence, Table
from .story import calibration, faster, sizes, stages
from .words import UNITS, human, metric_unit, percent, summary, where

__all__ = ["cut", "description", "exported", "measured", "result", "sensitivity", "timings"]


def description(body: Mapping[str, Any]) -> list[Block]:
    """``vlprune inspect``: structures by tower and kind, and what stays dense."""
    macs = f", {human(body['macs'])} MACs" if body["macs"] else ""
    shares = any(group["shared"] for group in body["groups"])
    rows = []
    for group in body["groups"]:
        padded = group["padded"]
        native = group["structures"] - padded
        layout = f"{native} native, {padded} padded" if padded else "native"
        rows.append(group | {"layout": layout})
    columns = (
        Column("tower", "tower"),
        Column("kind", "kind"),
        Column("structures", "structures", "number"),
        Column("units", "units", "number"),
        *([Column("shared", "shared", "number")] if shares else []),
        Column("params", "params", "count"),
        Column("macs", "MACs", "count"),
        Column("layout", "layout"),
    )
    blocks: list[Block] = [
        Sentence(f"{body['model']}: {human(body['params'])} params{macs}"),
        Table(columns, tuple(rows)),
    ]
    if body["macs_problem"]:
        blocks.append(Sentence(f"MACs are not known: {body['macs_problem'].rstrip('.')}."))
    if body["not_counted"]:
        blocks.append(Sentence(f"Not counted in MACs: {', '.join(body['not_counted'])}."))
    least = percent(body["least_params"])
    return [
        *blocks,
        Sentence(f"The smallest budget that can be reached is {least} of the params."),
        _stays_dense(body["dense"]),
    ]


def _stays_dense(dense: Mapping[str, str]) -> Table:
    """One row per reason, with a module for an example."""
    modules: dict[str, list[str]] = {}
    for path, reason in dense.items():
        modules.setdefault(reason, []).append(path)
    columns = (
        Column("reason", "stays dense because it is"),
        Column("modules", "modules", "number"),
        Column("example", "for example"),
    )
    rows = [
        {"reason": reason, "modules": len(paths), "example": paths[0]}
        for reason, paths in modules.items()
    ]
    return Table(columns, tuple(rows))


def sensitivity(body: Mapping[str, Any]) -> list[Block]:
    """``vlprune sensitivity``: loss and size with one part at a time cut to each share."""
    shares = [point["share"] for point in body["parts"][0]["points"]]
    part = Column("part", "part")
    losses = [
        {"part": one["part"], "units": one["units"]}
        | {f"keeps {point['share']}": point["loss"] for point in one["points"]}
        for one in body["parts"]
    ]
    sizes = [
        {"part": one["part"]}
        | {f"keeps {point['share']}": point["params"] / body["params"] for point in one["points"]}
        for one in body["parts"]
    ]

    def kept(unit: str) -> list[Column]:
        return [Column(f"keeps {share}", f"{share:.0%}", unit) for share in shares]

    return [
        Sentence(
            f"{body['model']}, {human(body['params'])} params: loss {body['loss']:.3f} on "
            f"{body['test_items']} test items. Loss when only this part keeps:"
        ),
        Table((part, Column("units", "units", "number"), *kept("loss")), tuple(losses)),
        Sentence("Params of the whole model that stay then:"),
        Table((part, *kept("share")), tuple(sizes)),
        Sentence(
            "Units go by |d loss / d gate|. Nothing is trained: retraining repairs a part of the "
            "damage."
        ),
        *_curve(body["curve"]),
    ]


def _curve(rows: Sequence[Mapping[str, float]]) -> list[Block]:
    """How far outputs move when the whole model is cut without training, repaired and not."""
    if not rows:
        return []
    columns = (
        Column("params", "params", "share"),
        Column("masked", "units gone", "share"),
        Column("folded", "repaired", "share"),
    )
    return [
        Sentence(
            "The whole model cut by OBS: how far its outputs move from the present ones, relative "
            "to their size:"
        ),
        Table(columns, tuple(rows)),
    ]


def timings(body: Mapping[str, Any]) -> list[Block]:
    """``vlprune bench``: size, memory and loading of each model, and how fast it answers."""
    told, models = body["conditions"], body["models"]
    names = list(body["folders"])[::-1]  # dense first
    batch = models[names[0]]["peak_batch"]
    sizes = Table(
        (
            Column("model", "model"),
            Column("folder", "folder"),
            Column("params", "params", "count"),
            Column("macs", "MACs, batch 1", "count"),
            Column("disk_bytes", "on disk", "bytes"),
            Column("load_seconds", "loading", "seconds"),
            Column("peak_bytes", f"peak memory, batch {batch}", "bytes"),
        ),
        tuple(models[name] | {"model": name, "folder": body["folders"][name]} for name in names),
    )
    return [
        Sentence(f"On {where(told)}, {told['dtype']}, torch {told['torch']}."),
        sizes,
        _runs(body),
        *(
            Sentence(f"{row['engine']}, batch {row['batch']} failed: {row['failed'].rstrip('.')}.")
            for row in body["runs"]
            if "failed" in row
        ),
        *faster(body),
    ]


def _runs(body: Mapping[str, Any]) -> Table:
    """One row per engine, batch size and model that could be timed."""
    rows = []
    for row in body["runs"]:
        if "failed" in row:
            continue
        low, middle, high = (1000 * row[key] for key in ("low", "median", "high"))
        macs = body["models"][row["model"]]["macs"]
        rows.append(
            {
                "engine": row["engine"],
                "batch": row["batch"],
                "model": row["model"],
                "latency": f"{middle:.3g} ms ({low:.3g}-{high:.3g})",
                "items": row["items_per_second"],
                "macs": macs * row["items_per_second"] if macs else None,
            }
        )
    columns = (
        Column("engine", "engine"),
        Column("batch", "batch", "number"),
        Column("model", "model"),
        Column("latency", "latency (quartiles)", "latency"),
        Column("items", "items/s", "rate"),
        Column("macs", "MACs/s", "count"),
    )
    return Table(columns, tuple(rows))


def cut(facts: Mapping[str, Any]) -> list[Block]:
    """``vlprune cut``: the sizes, the memory that was needed, and the proof."""
    size, proof = facts["weight_bytes"], facts["proof"]
    left = percent(size["small"] / size["dense"])
    blocks: list[Block] = [
        Sentence(
            f"{facts['model']} cut to {facts['out']}: {human(size['dense'])}B became "
            f"{human(size['small'])}B ({left}), in {facts['seconds']:.0f} s and "
            f"{human(facts['peak_bytes'])}B of memory at most."
        )
    ]
    if proof is None:
        blocks.append(Sentence("The cut was not proved, as asked."))
        return blocks
    rows = [{"part": part or "model", **found} for part, found in proof["passes"].items()]
    columns = (
        Column("part", "run"),
        Column("dtype", "in"),
        Column("difference", "masked and cut differ by", "difference"),
        Column("scale", "on outputs up to", "difference"),
    )
    if rows:
        blocks.append(Table(columns, tuple(rows)))
    blocks.append(
        Sentence(
            f"{proof['by_passes']} of {facts['structures']} structures were proved by passes of "
            f"both models, {proof['by_weights']} by their weights."
        )
    )
    return blocks


def exported(facts: Mapping[str, Any]) -> list[Block]:
    """``vlprune export``: what was written, and how it was checked against PyTorch."""
    int8 = "int8, " if facts["int8"] else ""
    size = human(sum(facts["files"].values()))
    compared = min(row["compared"] for row in facts["checked"])
    blocks: list[Block] = [
        Sentence(
            f"{facts['model']} as {facts['format']} in {facts['out']}: {int8}{size}B, "
            f"{facts['seconds']:.0f} s."
        ),
        Table(
            (
                Column("inputs", "checked on"),
                Column("difference", "largest difference, of the largest output", "difference"),
            ),
            tuple(
                {"inputs": _checked_on(row), "difference": row["difference"]}
                for row in facts["checked"]
            ),
        ),
    ]
    if compared < 1:
        blocks.append(Sentence(f"{percent(compared)} of the values were finite and compared."))
    return blocks


def _checked_on(row: Mapping[str, Any]) -> str:
    """The stage of generation, or the shapes of the inputs."""
    if "stage" in row:
        return f"the stage {row['stage']}"
    return ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in row["shapes"].items())


def measured(metrics: Mapping[str, float]) -> list[Block]:
    """``vlprune evaluate``: every metric."""
    columns = (Column("metric", "metric"), Column("value", "value", "text"))
    rows = [
        {"metric": name.replace("_", " "), "value": UNITS[metric_unit(name)](value)}
        for name, value in metrics.items()
    ]
    return [Table(columns, tuple(rows))]


def result(report: Mapping[str, Any], folder: object) -> list[Block]:
    """``vlprune compress`` and ``vlprune demo``: what came out, and where it is."""
    peak = report.get("peak_bytes")
    memory = f", {human(peak)}B of memory at most" if peak else ""
    what, dense = (
        ("plan", "") if not report.get("task") else ("plan, recipe", "; dense/ is the original")
    )
    return [
        stages(report) if report.get("metrics") else sizes(report),
        *(calibration(report) if report.get("calibration") else []),
        Sentence(summary(report)),
        *(Sentence(f"Note: {note}.") for note in report.get("notes", ()) if not report.get("task")),
        Sentence(f"Took {report['seconds']:.0f} s on {where(report)}{memory}."),
        Sentence(f"Saved in {folder}: the model, its {what}, report and card{dense}."),
    ]
