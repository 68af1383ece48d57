"""A report as one HTML page that opens without a network. Plots by plotly, inside the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from ..errors import UnsupportedError
from .figures import KEPT, SHARED, Figure, bars, curves, groups, lines, pairs, trade
from .story import Block, common_units, layers_of, story
from .words import human, percent

__all__ = ["page"]

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


Draw = Callable[[Figure], str]


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page of what :func:`vlprune.reports.read.read_report` returned.

    Raises UnsupportedError where plotly is missing.
    """
    try:
        write = import_module("plotly.io").to_html
        script = import_module("plotly.offline").get_plotlyjs()
    except ImportError:
        raise UnsupportedError(
            "the page needs plotly: pip install 'vlprune[report]', or choose --format markdown"
        ) from None

    def draw(figure: Figure) -> str:
        drawn = write(
            {"data": figure.traces, "layout": figure.layout},
            full_html=False,
            include_plotlyjs=False,
            config={"displayModeBar": False, "responsive": True},
        )
        return f'<div role="img" aria-label="{html.escape(figure.label)}">{drawn}</div>'

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


def _one(report: Mapping[str, Any], draw: Draw, alone: bool) -> list[str]:
    blocks = story([report])
    parts = [] if alone else [f"<h2>{html.escape(str(report['folder']))}</h2>"]
    said = 2 + len(report.get("notes", ()))
    parts.append(_cards(report))
    parts += [f'<p class="soft">{html.escape(block.text)}</p>' for block in blocks[1:said]]
    layers = layers_of(report)
    if layers:
        joined, went = pairs(report), groups(report)
        if went:
            parts.append("<h2>Where the parameters went</h2>" + _key(False) + draw(went))
        parts.append("<h2>What stays, layer by layer</h2>" + _key(joined is not None))
        towers = list(dict.fromkeys(tower for tower, _ in layers))
        ordered = sorted(layers.items(), key=lambda entry: towers.index(entry[0][0]))
        drawn = (draw(bars(f"{tower}, {kind}", group)) for (tower, kind), group in ordered)
        parts.append('<div class="plots">' + "".join(drawn) + "</div>")
        if joined:
            parts.append(
                "<h2>Who shares with whom</h2><p>Each line joins a layer to the one whose weights "
                "it takes; wide lines are many units. Circles and green are attention, squares and "
                "orange FFN.</p>"
            )
            parts.append(draw(joined))
    drawn_curves = "".join(map(draw, curves(report)))
    if drawn_curves:
        parts.append(f'<h2>As it went</h2><div class="plots">{drawn_curves}</div>')
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


def _several(reports: Sequence[Mapping[str, Any]], draw: Draw) -> list[str]:
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
        plots.append(draw(trade(f"{name} against {title}", known, unit)))
    parts.append('<div class="plots">' + "".join(plots) + "</div>")
    return parts


def _milliseconds(report: Mapping[str, Any], when: str) -> float | None:
    seconds = report.get("latency_seconds", {}).get("dense" if when == "before" else "small")
    return 1000 * seconds[max(seconds, key=int)] if seconds else None


def _two(one: Mapping[str, Any], other: Mapping[str, Any], draw: Draw) -> list[str]:
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
        plots.append(draw(lines(title, series, "layer", range=[0, 103], ticksuffix=" %")))
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
