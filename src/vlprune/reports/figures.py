"""The figures of the page, as the plain values that plotly's script draws.

Colours are Okabe and Ito's, which the colour-blind tell apart. Colour is never the only sign:
pruned parts are hatched, and lines and points differ in dashes and shapes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .story import layers_of
from .words import paper_share, tower_of

__all__ = ["Figure", "bars", "curves", "groups", "lines", "pairs", "trade"]

KEPT, SHARED, PRUNED = "#2f86c8", "#e69f00", "#9aa0a6"
LINES = ("#2f86c8", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "solid")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
HATCHED = {"color": PRUNED, "opacity": 0.35, "pattern": {"shape": "/"}}
FEW = 14
"""Up to so many points get a marker each, and up to so many layers a number each."""

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""{name: (x, y)}"""


@dataclass(frozen=True)
class Figure:
    """What ``Plotly.newPlot`` takes; ``label`` is read aloud in place of the drawing."""

    label: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def _figure(label: str, traces: list[dict[str, Any]], height: int, **layout: Any) -> Figure:
    """A figure that fills its place, in the look that all share."""
    look = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 34, "b": 44},
        "font": {"size": 13},
        "hoverlabel": {"namelength": -1},
    }
    return Figure(label, traces, look | layout)


def _label(text: str) -> str:
    """A name for a plot, where tags would be markup."""
    return html.escape(text, quote=False)


def _title(text: str, more: str = "", **place: Any) -> dict[str, Any]:
    return {"text": f"<b>{_label(text)}</b>{more}", "x": 0, "font": {"size": 14}, **place}


def _legend() -> dict[str, Any]:
    return {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}


def bars(title: str, layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Kept, shared and pruned units of every layer, first layer on top."""
    shared = [one.get("shared", 0) / one["units"] for one in layers]
    own = [one["kept"] / one["units"] - part for one, part in zip(layers, shared, strict=True)]
    gone = [1 - one["kept"] / one["units"] for one in layers]
    rows = list(range(1, len(layers) + 1))
    shown = max(3, len(layers))  # fewer bars would be as thick as a thumb
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [100 * value for value in values],
            "y": rows,
            "marker": {**look, "line": {"width": 0}},
            "customdata": [
                f"{_label(one['name'])}: {one['kept']} of {one['units']} units stay"
                for one in layers
            ],
            "hovertemplate": "%{customdata}<br>" + name + " %{x:.1f} %<extra></extra>",
        }
        for name, values, look in (
            ("kept", own, {"color": KEPT}),
            ("shared", shared, {"color": SHARED}),
            ("pruned", gone, HATCHED),
        )
        if any(values)
    ]
    stays = sum(one["kept"] for one in layers) / sum(one["units"] for one in layers)
    return _figure(
        f"{title}: {stays:.0%} of the units stay",
        traces,
        80 + 22 * shown,
        title=_title(title, f"  {stays:.0%} stays"),
        barmode="stack",
        bargap=0.25,
        showlegend=False,
        yaxis={
            "range": [shown + 0.6, 0.4],
            "tickvals": rows if len(rows) <= FEW else rows[::5],
            "title": {"text": "layer"},
            "showgrid": False,
            "zeroline": False,
        },
        xaxis={"range": [0, 100], "ticksuffix": " %", "nticks": 5},
        margin={"l": 48, "r": 16, "t": 34, "b": 30},
    )


def groups(report: Mapping[str, Any]) -> Figure | None:
    """Parameters of every tower and kind that stay and that are gone; None if nobody counted."""
    counted = [group for group in report["groups"] if group.get("params")]
    if not counted:
        return None
    after = [group["params"]["after"] for group in counted]
    gone = [group["params"]["before"] - group["params"]["after"] for group in counted]
    shares = [a / max(1, a + b) for a, b in zip(after, gone, strict=True)]
    looks: tuple[tuple[str, list[int], dict[str, Any], dict[str, Any]], ...] = (
        ("stay", after, {"color": KEPT}, {}),
        ("gone", gone, HATCHED, {"text": [f"{share:.0%} stays" for share in shares]}),
    )
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": values,
            "y": [_label(f"{tower_of(group)}, {group['kind']}") for group in counted],
            "marker": {**look, "line": {"width": 0}},
            "textposition": "outside",
            "cliponaxis": False,
            "hovertemplate": "%{y}<br>%{x:.4s} parameters " + name + "<extra></extra>",
            **text,
        }
        for name, values, look, text in looks
    ]
    return _figure(
        "parameters that stay, by tower and kind",
        traces,
        70 + 30 * len(counted),
        barmode="stack",
        bargap=0.3,
        showlegend=False,
        yaxis={"autorange": "reversed", "automargin": True, "showgrid": False},
        xaxis={"title": {"text": "parameters"}, "tickformat": "~s", "nticks": 6},
        margin={"l": 10, "r": 72, "t": 8, "b": 44},
    )


def lines(title: str, series: Series, across: str, **yaxis: Any) -> Figure:
    """One line per series."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(x) <= FEW else "lines",
            "name": _label(name),
            "x": _finite(x),
            "y": _finite(y),
            "marker": {"size": 8, "symbol": MARKERS[i % 6]},
            "line": {"color": LINES[i % 6], "dash": DASHES[i % 6], "width": 2.5},
        }
        for i, (name, (x, y)) in enumerate(series.items())
    ]
    whole = across == "layer" and all(len(x) <= FEW for x, _ in series.values())
    return _figure(
        title,
        traces,
        300,
        title=_title(title, y=0.98),
        margin={"l": 52, "r": 12, "t": 64, "b": 44},
        legend=_legend(),
        showlegend=len(series) > 1,
        xaxis={"title": {"text": across}, **({"dtick": 1} if whole else {})},
        yaxis={"rangemode": "tozero", **yaxis},
    )


def _finite(values: Sequence[float]) -> list[float | None]:
    """The values, with a gap where a loss was no number: JSON knows no NaN."""
    return [value if math.isfinite(value) else None for value in values]


def curves(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The losses of every phase, and how the search went."""
    titles = {"train": "dense", "search": "search", "retrain": "retraining"}
    losses = {}
    for phase, rows in report.get("history", {}).items():
        steps = [row for row in rows if "loss" in row]
        if steps:
            series = [row["step"] for row in steps], [row["loss"] for row in steps]
            losses[titles.get(phase, phase)] = series
    if losses:
        yield lines("Training loss", losses, "step")
    turns = report.get("search_history") or []
    cost = "authors' prunable cost" if paper_share(report) is not None else report["budget"]["what"]
    for title, names in (
        (f"What the search leaves of the {cost}", ("remains",)),
        ("Gates of fading units", ("gate_of_fading_units",)),
        ("Held-out loss, with and without the structure", ("masked_loss", "full_loss", "gap")),
    ):
        watched = {
            name.replace("_", " "): (
                [turn["progress"] for turn in turns],
                [turn[name] for turn in turns],
            )
            for name in names
            if turns and name in turns[0]
        }
        if watched:
            yield lines(title, watched, "progress of the search")


def trade(title: str, points: Sequence[tuple[str, float, float]], unit: str) -> Figure:
    """A figure of merit against a cost: one named point per model."""
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": _label(name),
            "x": [x],
            "y": [100 * y],
            "marker": {"size": 13, "symbol": MARKERS[i % 6], "color": LINES[i % 6]},
            "hovertemplate": f"%{{x:.4g}} {unit}, %{{y:.1f}} %<extra>{_label(name)}</extra>",
        }
        for i, (name, x, y) in enumerate(points)
    ]
    return _figure(
        title,
        traces,
        320,
        title=_title(title, y=0.98),
        margin={"l": 52, "r": 16, "t": 84, "b": 44},
        legend=_legend(),
        showlegend=True,
        xaxis={"title": {"text": unit}, "rangemode": "tozero"},
        yaxis={"ticksuffix": " %", "nticks": 5, "tickformat": ".1f"},
    )


def pairs(report: Mapping[str, Any]) -> Figure | None:
    """A line from every layer to the one whose weights it takes; None if no layer shares."""
    layers = [one for members in layers_of(report).values() for one in members]
    if not any(one.get("shared") for one in layers):
        return None
    towers: dict[str, list[Mapping[str, Any]]] = {}
    for one in layers:
        towers.setdefault(tower_of(one), []).append(one)
    place = {
        one["name"]: (column, (row + 0.5) / len(members))
        for column, members in enumerate(towers.values())
        for row, one in enumerate(members)
    }
    joined = [one for one in layers if one.get("shared") and one.get("source") in place]
    return _figure(
        "which layers take weights from which",
        [
            *(_joint(one, place[one["name"]], place[one["source"]]) for one in joined),
            *(_column(members, place) for members in towers.values()),
        ],
        110 + 20 * max(map(len, towers.values())),
        xaxis={
            "tickvals": list(range(len(towers))),
            "ticktext": [_label(tower) for tower in towers],
            "range": [-0.4, max(0.6, len(towers) - 0.6)],
            "side": "top",
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"range": [1.02, -0.02], "visible": False},
        showlegend=False,
    )


def _joint(
    layer: Mapping[str, Any], start: tuple[float, float], end: tuple[float, float]
) -> dict[str, Any]:
    """The line from a layer to the one whose weights it takes, wider for more units."""
    (x0, y0), (x1, y1) = start, end
    inside = x0 == x1  # within one tower: bent, or it would lie on the tower's own points
    bend = x0 + (0.25 if x0 == 0 else -0.25)
    text = (
        f"{layer['name']} takes {layer['shared']} of {layer['units']} units from {layer['source']}"
    )
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x0, bend, x1] if inside else [x0, x1],
        "y": [y0, (y0 + y1) / 2, y1] if inside else [y0, y1],
        "line": {
            "width": 1.5 + 6 * layer["shared"] / layer["units"],
            "color": SHARED if layer["kind"] == "ffn" else LINES[2],
            "shape": "spline" if inside else "linear",
        },
        "opacity": 0.75,
        "hovertext": _label(text),
        "hoverinfo": "text",
    }


def _column(
    members: Sequence[Mapping[str, Any]], place: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """The layers of one tower as points, first layer on top."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [place[one["name"]][0] for one in members],
        "y": [place[one["name"]][1] for one in members],
        "marker": {
            "size": 9,
            "color": PRUNED,
            "symbol": ["square" if one["kind"] == "ffn" else "circle" for one in members],
        },
        "hovertext": [_label(one["name"]) for one in members],
        "hoverinfo": "text",
    }
