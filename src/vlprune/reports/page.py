"""A report as one HTML page that opens without a network. Plots by plotly, inside the page.

Colours are Okabe and Ito's, which the colour-blind tell apart; what is pruned is hatched as well.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from ..errors import UnsupportedError
from .report import Block, common_units, human, layers_of, percent, story

__all__ = ["page"]

KEPT, SHARED, PRUNED = "#2f86c8", "#e69f00", "#9aa0a6"
LINES = ("#2f86c8", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "solid")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")

STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f3f5f8; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --paper: #11161d; --card: #1b222b; --line: #343d49; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .4rem 0; max-width: 50rem; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1rem 0; }
.card { background: var(--card); border-radius: .6rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.2; } .card span { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: .5rem 1.25rem; }
.plots > div, .wide { min-width: 0; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.key { display: inline-flex; gap: 1.1rem; flex-wrap: wrap; margin: .25rem 0 .5rem; }
.key i { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem;
  margin-right: .4rem; vertical-align: -.1rem; }
.key .gone { background: repeating-linear-gradient(45deg, #9aa0a6 0 2px, transparent 2px 5px);
  border: 1px solid #9aa0a6; }
"""

SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const look = getComputedStyle(document.documentElement);
  const ink = look.getPropertyValue("--ink").trim(), line = look.getPropertyValue("--line").trim();
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = {"font.color": ink, "legend.font.color": ink};
    for (const axis of Object.keys(plot.layout).filter(key => /^[xy]axis/.test(key))) {
      change[axis + ".gridcolor"] = line;
      change[axis + ".zerolinecolor"] = line;
      change[axis + ".linecolor"] = line;
    }
    Plotly.relayout(plot, change);
    Plotly.Plots.resize(plot); // drawn before the page had its columns
  }
}
dark.addEventListener("change", paint);
addEventListener("load", paint);
"""


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page of what :func:`vlprune.reports.report.read_report` returned.

    Raises UnsupportedError where plotly is missing.
    """
    try:
        graphs = import_module("plotly.graph_objects")
        script = import_module("plotly.offline").get_plotlyjs()
    except ImportError:
        raise UnsupportedError(
            "the page needs plotly: pip install 'vlprune[report]', or choose --format markdown"
        ) from None
    draw = _Draw(graphs)
    title = "vlprune: " + ", ".join(str(report["folder"]) for report in reports)
    body = [f"<h1>{html.escape(title)}</h1>"]
    if len(reports) > 1:
        body += _several(reports, draw)
    for report in reports:
        body += _one(report, draw, alone=len(reports) == 1)
    if len(reports) == 2 and reports[0]["fingerprint"] == reports[1]["fingerprint"]:
        body += _two(reports[0], reports[1], draw)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><script>{script}</script></head><body>"
        + "\n".join(body)
        + f"<script>{SCRIPT}</script></body></html>\n"
    )


def _label(text: str) -> str:
    """A name for a plot, where tags would be markup."""
    return html.escape(text, quote=False)


class _Draw:
    """Figures in one look, as pieces of HTML."""

    def __init__(self, graphs: Any) -> None:
        self.graphs = graphs

    def figure(self, traces: Sequence[Any], height: int, label: str, **layout: Any) -> str:
        """A plot that fills its place; ``label`` is read aloud in place of it."""
        figure = self.graphs.Figure(traces)
        figure.update_layout(
            template="none",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            height=height,
            margin={"l": 48, "r": 12, "t": 34, "b": 44},
            font={"size": 13},
            legend={"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0},
            hoverlabel={"namelength": -1},
        )
        figure.update_layout(**layout)
        drawn = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"displayModeBar": False, "responsive": True},
        )
        return f'<div role="img" aria-label="{html.escape(label)}">{drawn}</div>'

    def bars(self, title: str, layers: Sequence[Mapping[str, Any]]) -> str:
        """Kept, shared and pruned of every layer, first layer on top."""
        go = self.graphs
        own = [(r["kept"] - r.get("shared", 0)) / r["units"] for r in layers]
        shared = [r.get("shared", 0) / r["units"] for r in layers]
        gone = [1 - a - b for a, b in zip(own, shared, strict=True)]
        names = [f"{_label(r['name'])}: {r['kept']} of {r['units']} units stay" for r in layers]
        rows = list(range(1, len(layers) + 1))
        looks = (
            ("kept", own, {"color": KEPT}),
            ("shared", shared, {"color": SHARED}),
            ("pruned", gone, {"color": PRUNED, "opacity": 0.35, "pattern": {"shape": "/"}}),
        )
        traces = [
            go.Bar(
                y=rows,
                x=[100 * value for value in values],
                name=name,
                orientation="h",
                marker={**look, "line": {"width": 0}},
                customdata=names,
                hovertemplate="%{customdata}<br>" + name + " %{x:.1f} %<extra></extra>",
            )
            for name, values, look in looks
            if any(values)
        ]
        total = sum(r["kept"] for r in layers) / sum(r["units"] for r in layers)
        return self.figure(
            traces,
            80 + 22 * max(3, len(layers)),
            f"{title}: {total:.0%} of the units stay",
            title={
                "text": f"<b>{_label(title)}</b>  {total:.0%} stays",
                "x": 0,
                "font": {"size": 14},
            },
            barmode="stack",
            bargap=0.25,
            showlegend=False,
            yaxis={
                "range": [max(3, len(layers)) + 0.6, 0.4],
                "tickvals": rows if len(rows) <= 14 else rows[::5],
                "title": "layer",
                "showgrid": False,
                "zeroline": False,
            },
            xaxis={"range": [0, 100], "ticksuffix": " %", "nticks": 5},
            margin={"l": 48, "r": 16, "t": 34, "b": 30},
        )

    def groups(self, report: Mapping[str, Any]) -> str:
        """Parameters of every tower and kind that stay and that are gone, one bar each."""
        go = self.graphs
        groups = [g for g in report["groups"] if g.get("params")]
        names = [_label(f"{g['tower'] or 'model'}, {g['kind']}") for g in groups]
        after = [g["params"]["after"] for g in groups]
        gone = [g["params"]["before"] - g["params"]["after"] for g in groups]
        shares = [a / max(1, a + b) for a, b in zip(after, gone, strict=True)]
        looks = (
            ("stay", after, {"color": KEPT}),
            ("gone", gone, {"color": PRUNED, "opacity": 0.35, "pattern": {"shape": "/"}}),
        )
        traces = [
            go.Bar(
                y=names,
                x=values,
                name=name,
                orientation="h",
                marker={**look, "line": {"width": 0}},
                text=[f"{share:.0%} stays" for share in shares] if name == "gone" else None,
                textposition="outside",
                cliponaxis=False,
                hovertemplate="%{y}<br>%{x:.4s} parameters " + name + "<extra></extra>",
            )
            for name, values, look in looks
        ]
        return self.figure(
            traces,
            70 + 30 * len(groups),
            "parameters that stay, by tower and kind",
            barmode="stack",
            bargap=0.3,
            showlegend=False,
            yaxis={"autorange": "reversed", "automargin": True, "showgrid": False},
            xaxis={"title": "parameters", "tickformat": "~s", "nticks": 6},
            margin={"l": 10, "r": 72, "t": 8, "b": 44},
        )

    def lines(
        self,
        title: str,
        series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        across: str,
        **yaxis: Any,
    ) -> str:
        """One line a series of (x, y)."""
        few = all(len(x) <= 14 for x, _ in series.values())
        traces = [
            self.graphs.Scatter(
                x=list(x),
                y=list(y),
                name=_label(name),
                mode="lines+markers" if len(x) <= 14 else "lines",
                marker={"size": 8, "symbol": MARKERS[i % 6]},
                line={"color": LINES[i % 6], "dash": DASHES[i % 6], "width": 2.5},
            )
            for i, (name, (x, y)) in enumerate(series.items())
        ]
        return self.figure(
            traces,
            300,
            title,
            title={"text": f"<b>{_label(title)}</b>", "x": 0, "font": {"size": 14}, "y": 0.98},
            margin={"l": 52, "r": 12, "t": 64, "b": 44},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            showlegend=len(series) > 1,
            xaxis={"title": across, **({"dtick": 1} if across == "layer" and few else {})},
            yaxis={"rangemode": "tozero", **yaxis},
        )

    def trade(self, title: str, points: Sequence[tuple[str, float, float]], unit: str) -> str:
        """A figure of merit against a cost: one named point a model."""
        traces = [
            self.graphs.Scatter(
                x=[x],
                y=[100 * y],
                name=_label(name),
                mode="markers",
                marker={"size": 13, "symbol": MARKERS[i % 6], "color": LINES[i % 6]},
                hovertemplate=f"%{{x:.4g}} {unit}, %{{y:.1f}} %<extra>{html.escape(name)}</extra>",
            )
            for i, (name, x, y) in enumerate(points)
        ]
        return self.figure(
            traces,
            320,
            title,
            title={"text": f"<b>{_label(title)}</b>", "x": 0, "font": {"size": 14}, "y": 0.98},
            margin={"l": 52, "r": 16, "t": 84, "b": 44},
            legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
            xaxis={"title": unit, "rangemode": "tozero"},
            yaxis={"ticksuffix": " %", "nticks": 5, "tickformat": ".1f"},
        )

    def pairs(self, layers: Sequence[Mapping[str, Any]]) -> str:
        """A line from every layer to the one whose weights it takes, wider for more units."""
        go = self.graphs
        towers = list(dict.fromkeys(layer["tower"] or "model" for layer in layers))
        place: dict[str, tuple[float, float]] = {}
        for column, tower in enumerate(towers):
            members = [one for one in layers if (one["tower"] or "model") == tower]
            for row, one in enumerate(members):
                place[one["name"]] = (column, (row + 0.5) / len(members))
        traces = []
        for one in layers:
            if not one.get("shared") or one.get("source") not in place:
                continue
            (x0, y0), (x1, y1) = place[one["name"]], place[one["source"]]
            inside = x0 == x1
            share = one["shared"] / one["units"]
            told = (
                f"{one['name']} takes {one['shared']} of {one['units']} units from {one['source']}"
            )
            bend = x0 + (0.25 if x0 == 0 else -0.25)
            traces.append(
                go.Scatter(
                    x=[x0, bend, x1] if inside else [x0, x1],
                    y=[y0, (y0 + y1) / 2, y1] if inside else [y0, y1],
                    mode="lines",
                    line={
                        "width": 1.5 + 6 * share,
                        "color": SHARED if one["kind"] == "ffn" else LINES[2],
                        "shape": "spline" if inside else "linear",
                    },
                    opacity=0.75,
                    hovertext=_label(told),
                    hoverinfo="text",
                    showlegend=False,
                )
            )
        for tower in towers:
            members = [one for one in layers if (one["tower"] or "model") == tower]
            traces.append(
                go.Scatter(
                    x=[place[one["name"]][0] for one in members],
                    y=[place[one["name"]][1] for one in members],
                    mode="markers",
                    marker={
                        "size": 9,
                        "color": PRUNED,
                        "symbol": ["square" if o["kind"] == "ffn" else "circle" for o in members],
                    },
                    hovertext=[_label(one["name"]) for one in members],
                    hoverinfo="text",
                    showlegend=False,
                )
            )
        most = max(sum((o["tower"] or "model") == t for o in layers) for t in towers)
        return self.figure(
            traces,
            110 + 20 * most,
            "which layers take weights from which",
            xaxis={
                "tickvals": list(range(len(towers))),
                "ticktext": [_label(tower) for tower in towers],
                "range": [-0.4, max(0.6, len(towers) - 0.6)],
                "side": "top",
                "showgrid": False,
                "zeroline": False,
            },
            yaxis={"range": [1.02, -0.02], "visible": False},
        )


def _one(report: Mapping[str, Any], draw: _Draw, alone: bool) -> list[str]:
    blocks = story([report])
    parts = [] if alone else [f"<h2>{html.escape(str(report['folder']))}</h2>"]
    said = 2 + len(report.get("notes", ()))
    parts.append(_cards(report))
    parts += [f'<p class="soft">{html.escape(block.text)}</p>' for block in blocks[1:said]]
    layers = layers_of(report)
    if layers:
        shares = any(one.get("shared") for group in layers.values() for one in group)
        if any(group.get("params") for group in report["groups"]):
            parts.append("<h2>Where the parameters went</h2>" + _key(False) + draw.groups(report))
        parts.append("<h2>What stays, layer by layer</h2>" + _key(shares))
        towers = list(dict.fromkeys(tower for tower, _ in layers))
        ordered = sorted(layers.items(), key=lambda entry: towers.index(entry[0][0]))
        drawn = (draw.bars(f"{tower}, {kind}", group) for (tower, kind), group in ordered)
        parts.append('<div class="plots">' + "".join(drawn) + "</div>")
        if shares:
            parts.append(
                "<h2>Who shares with whom</h2><p>Each line joins a layer to the one whose weights "
                "it takes; wide lines are many units. Circles and green are attention, squares and "
                "orange FFN.</p>"
            )
            parts.append(draw.pairs([one for group in layers.values() for one in group]))
    curves = _curves(report, draw)
    if curves:
        parts.append('<h2>As it went</h2><div class="plots">' + "".join(curves) + "</div>")
    parts += [_html(block) for block in blocks[said:]]
    return parts


def _cards(report: Mapping[str, Any]) -> str:
    budget = report["budget"]
    cards = [
        (f"{percent(budget['reached'])}", f"of the {budget['what']}; asked {budget['asked']:.4g}"),
        _change("parameters", report["params"], human),
    ]
    if report.get("macs"):
        cards.append(_change("MACs", report["macs"], human))
    seconds = report.get("latency_seconds")
    if seconds:
        batch = max(seconds["dense"], key=int)
        both = {"before": seconds["dense"][batch], "after": seconds["small"][batch]}
        cards.append(_change(f"latency, batch {batch}", both, lambda s: f"{1000 * s:.3g} ms"))
    if report.get("metrics"):
        first, last = report["metrics"]["dense"], list(report["metrics"].values())[-1]
        name = report["metric"]
        both = {"before": first[name], "after": last[name]}
        cards.append(_change(name.replace("_", " "), both, percent))
    inside = (
        f'<div class="card"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>'
        for a, b in cards
    )
    return '<div class="cards">' + "".join(inside) + "</div>"


def _change(name: str, both: Mapping[str, float], show: Any) -> tuple[str, str]:
    return show(both["after"]), f"{name}; dense {show(both['before'])}"


def _key(shares: bool) -> str:
    keys = [f'<span><i style="background:{KEPT}"></i>kept</span>']
    if shares:
        keys.append(f'<span><i style="background:{SHARED}"></i>shared with another layer</span>')
    keys.append('<span><i class="gone"></i>pruned</span>')
    return f'<div class="key">{"".join(keys)}</div>'


def _curves(report: Mapping[str, Any], draw: _Draw) -> list[str]:
    """Losses of every phase, what the search watched, in plots of their own."""
    drawn = []
    losses = {
        {"train": "dense", "search": "search", "retrain": "retraining"}.get(phase, phase): (
            [row["step"] for row in rows if "loss" in row],
            [row["loss"] for row in rows if "loss" in row],
        )
        for phase, rows in report.get("history", {}).items()
    }
    losses = {name: both for name, both in losses.items() if both[0]}
    if losses:
        drawn.append(draw.lines("Training loss", losses, "step"))
    watched = report.get("search_history") or []
    for title, names in (
        ("What the search leaves", ("remains",)),
        ("Gates of fading units", ("gate_of_fading_units",)),
        ("Held-out loss, with and without the structure", ("masked_loss", "full_loss", "gap")),
    ):
        series = {
            name.replace("_", " "): (
                [row["progress"] for row in watched],
                [row[name] for row in watched],
            )
            for name in names
            if watched and name in watched[0]
        }
        if series:
            drawn.append(draw.lines(title, series, "progress of the search"))
    return drawn


def _several(reports: Sequence[Mapping[str, Any]], draw: _Draw) -> list[str]:
    """Accuracy against every cost, for all folders and the dense model."""
    parts = ["<h2>Overview</h2>", _html(story(reports)[1])]
    scored = [r for r in reports if r.get("metrics")]
    metrics = {r["metric"] for r in scored}
    if not scored or len(metrics) > 1:
        return parts
    (metric,) = metrics
    plots = []
    for title, unit, get in (
        ("parameters", "million parameters", lambda r, w: r["params"][w] / 1e6),
        ("MACs", "million MACs", lambda r, w: r["macs"][w] / 1e6 if r.get("macs") else None),
        ("latency", "ms", _milliseconds),
    ):
        points = [("dense", get(scored[0], "before"), scored[0]["metrics"]["dense"][metric])]
        for report in scored:
            last = list(report["metrics"].values())[-1][metric]
            points.append((str(report["folder"]), get(report, "after"), last))
        known = [(name, x, y) for name, x, y in points if x is not None]
        name = metric.replace("_", " ")
        plots.append(draw.trade(f"{name} against {title}", known, unit))
    parts.append('<div class="plots">' + "".join(plots) + "</div>")
    return parts


def _milliseconds(report: Mapping[str, Any], when: str) -> float | None:
    seconds = report.get("latency_seconds", {}).get("dense" if when == "before" else "small")
    return 1000 * seconds[max(seconds, key=int)] if seconds else None


def _two(one: Mapping[str, Any], other: Mapping[str, Any], draw: _Draw) -> list[str]:
    """What both plans keep of every layer, side by side."""
    parts = ["<h2>The two plans</h2>"]
    rows = common_units(one, other)
    agreed = sum(row["both"] for row in rows)
    least = sum(min(row["one"], row["other"]) for row in rows)
    parts.append(
        f"<p>Of the units that could be in both plans, {percent(agreed / max(1, least))} are.</p>"
    )
    theirs = layers_of(other)
    plots = []
    for key, layers in layers_of(one).items():
        series = {
            str(report["folder"]): (
                list(range(1, len(group) + 1)),
                [100 * layer["kept"] / layer["units"] for layer in group],
            )
            for report, group in ((one, layers), (other, theirs.get(key, [])))
        }
        title = f"{', '.join(key)}: kept"
        plots.append(draw.lines(title, series, "layer", range=[0, 103], ticksuffix=" %"))
    return [
        *parts,
        '<div class="plots">' + "".join(plots) + "</div>",
        _html(story([one, other])[-1]),
    ]


def _html(block: Block) -> str:
    if not block.rows:
        text = html.escape(block.text)
        return (
            f"<h{block.level + 1}>{text}</h{block.level + 1}>" if block.level else f"<p>{text}</p>"
        )
    head, *body = block.rows
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{rows}</table></div>'
