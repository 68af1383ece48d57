"""A report as one HTML page that opens without a network.

``page.html`` is a jinja2 template, which escapes every value; ``page.css`` and ``page.js`` go into
the page, and so does plotly's script, which draws the figures.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from typing import Any, ClassVar

from ..errors import UnsupportedError
from .blocks import Block, Heading, Sentence, cell
from .figures import Figure, bars, curves, groups, lines, pairs, trade
from .story import common_units, comparable, comparison, details, layers_of, opening, overview
from .words import duration, human, paper_share, percent

__all__ = ["page"]


@dataclass(frozen=True)
class _Card:
    """One figure in large type, and what it is."""

    value: str
    label: str


@dataclass(frozen=True)
class _Cards:
    kind: ClassVar[str] = "cards"
    cards: list[_Card]


@dataclass(frozen=True)
class _Plots:
    """Figures beside each other; ``key`` has a class of page.css and a text per colour."""

    kind: ClassVar[str] = "plots"
    figures: list[Figure]
    key: tuple[tuple[str, str], ...] = ()


Part = Block | _Cards | _Plots

KEPT, SHARED, PRUNED = (
    ("kept", "kept"),
    ("shared", "shared with another layer"),
    ("pruned", "pruned"),
)


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained HTML page of what :func:`vlprune.reports.read.read_report` returned.

    Raises UnsupportedError where jinja2 or plotly is missing.
    """
    try:
        jinja2 = import_module("jinja2")
        safe = import_module("markupsafe").Markup
        plotly = import_module("plotly.offline").get_plotlyjs()
    except ImportError:
        raise UnsupportedError(
            "the page needs jinja2 and plotly: pip install 'vlprune[report]', or choose "
            "--format markdown"
        ) from None
    parts = _overview(reports) if len(reports) > 1 else []
    for report in reports:
        parts += [Heading(str(report["folder"]), 1)] if len(reports) > 1 else []
        parts += _folder(report)
    if comparable(reports):
        parts += _two(*reports)
    scripts = [_one_ending(plotly), _file("page.js")]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text: str = environment.from_string(_file("page.html")).render(
        title="vlprune: " + ", ".join(str(report["folder"]) for report in reports),
        policy=_policy(scripts),
        style=safe(_file("page.css")),
        scripts=[safe(script) for script in scripts],
        parts=parts,
        deeper=int(len(reports) > 1),  # below the title come folders, or the parts of one folder
        cell=cell,
    )
    return text


def _file(name: str) -> str:
    """A file beside this module."""
    return (files("vlprune.reports") / name).read_text(encoding="utf-8")


def _one_ending(text: str) -> str:
    """The text with the line ends that a browser sees, which is what it takes the checksum of."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _policy(scripts: Sequence[str]) -> str:
    """What a browser may do with the page: run our scripts, and reach no network."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    sources = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _folder(report: Mapping[str, Any]) -> list[Part]:
    """All about one folder."""
    return [
        _Cards(_cards(report)),
        *opening(report),
        *_parameters(report),
        *_layers(report),
        *_sharing(report),
        *_course(report),
        *details(report),
    ]


def _cards(report: Mapping[str, Any]) -> list[_Card]:
    budget = report["budget"]
    asked = f"of the {budget['what']}; asked for {percent(budget['asked'])}"
    if paper_share(report) is not None:  # the budget is no fraction of the whole model
        p = f"p = {1 - budget['asked']:.3g} of the authors' prunable cost"
        asked = f"of the {budget['what']}; asked for {p}"
    cards = [
        _Card(percent(budget["reached"]), asked),
        _change("parameters", report["params"], human),
    ]
    if report.get("macs"):
        cards.append(_change("MACs", report["macs"], human))
    seconds = report.get("latency_seconds")
    if seconds:
        batch = max(seconds["dense"], key=int)
        both = {"before": seconds["dense"][batch], "after": seconds["small"][batch]}
        cards.append(_change(f"latency, batch {batch}", both, duration))
    if report.get("metrics"):
        name = report["metric"]
        both = {"before": report["metrics"]["dense"][name], "after": _last(report, name)}
        cards.append(_change(name.replace("_", " "), both, percent))
    return cards


def _change(name: str, both: Mapping[str, float], show: Callable[[float], str]) -> _Card:
    return _Card(show(both["after"]), f"{name}; dense {show(both['before'])}")


def _last(report: Mapping[str, Any], metric: str) -> float:
    """A metric of the last stage."""
    value: float = list(report["metrics"].values())[-1][metric]
    return value


def _parameters(report: Mapping[str, Any]) -> list[Part]:
    figure = groups(report)
    if figure is None:
        return []
    return [Heading("Where the parameters went"), _Plots([figure], (KEPT, PRUNED))]


def _layers(report: Mapping[str, Any]) -> list[Part]:
    layers = layers_of(report)
    if not layers:
        return []
    towers = list(dict.fromkeys(tower for tower, _ in layers))
    ordered = sorted(layers.items(), key=lambda entry: towers.index(entry[0][0]))
    drawn = [bars(f"{tower}, {kind}", members) for (tower, kind), members in ordered]
    shares = any(one.get("shared") for members in layers.values() for one in members)
    key = (KEPT, SHARED, PRUNED) if shares else (KEPT, PRUNED)
    return [Heading("What stays, layer by layer"), _Plots(drawn, key)]


def _sharing(report: Mapping[str, Any]) -> list[Part]:
    figure = pairs(report)
    if figure is None:
        return []
    text = (
        "Each line joins a layer to the layer whose weights it takes; the wider the line, the more "
        "units. Circles and green lines are attention, squares and orange lines FFN."
    )
    return [Heading("Which layers share weights"), Sentence(text), _Plots([figure])]


def _course(report: Mapping[str, Any]) -> list[Part]:
    drawn = list(curves(report))
    return [Heading("Losses and search, step by step"), _Plots(drawn)] if drawn else []


def _overview(reports: Sequence[Mapping[str, Any]]) -> list[Part]:
    """All folders in a table, and accuracy against every cost."""
    parts: list[Part] = [Heading("Overview", 1), overview(reports)]
    scored = [report for report in reports if report.get("metrics")]
    if len({report["metric"] for report in scored}) == 1:
        parts.append(_Plots(_trades(scored, scored[0]["metric"])))
    return parts


def _trades(scored: Sequence[Mapping[str, Any]], metric: str) -> list[Figure]:
    """The metric against parameters, MACs and latency, for the dense and all small models."""
    drawn = []
    for title, unit, cost in (
        ("parameters", "million parameters", lambda r, when: r["params"][when] / 1e6),
        ("MACs", "million MACs", lambda r, when: r["macs"][when] / 1e6 if r.get("macs") else None),
        ("latency", "ms", _latency),
    ):
        first = scored[0]
        points = [("dense", cost(first, "before"), first["metrics"]["dense"][metric])]
        points += [(str(r["folder"]), cost(r, "after"), _last(r, metric)) for r in scored]
        known = [(name, x, y) for name, x, y in points if x is not None]
        drawn.append(trade(f"{metric.replace('_', ' ')} against {title}", known, unit))
    return drawn


def _latency(report: Mapping[str, Any], when: str) -> float | None:
    seconds = report.get("latency_seconds", {}).get("dense" if when == "before" else "small")
    return 1000 * seconds[max(seconds, key=int)] if seconds else None


def _two(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Part]:
    """What both plans keep of every layer, side by side."""
    rows = common_units(one, other)
    agreed = sum(row["both"] for row in rows)
    most = sum(min(row["one"], row["other"]) for row in rows)
    text = (
        f"The two plans agree on {percent(agreed / max(1, most))} of the units they could both "
        "keep."
    )
    theirs = layers_of(other)
    drawn = []
    for key, layers in layers_of(one).items():
        series = {
            str(report["folder"]): (
                list(range(1, len(members) + 1)),
                [100 * layer["kept"] / layer["units"] for layer in members],
            )
            for report, members in ((one, layers), (other, theirs.get(key, [])))
        }
        title = f"{', '.join(key)}: kept"
        drawn.append(lines(title, series, "layer", range=[0, 103], ticksuffix=" %"))
    return [Heading("The two plans", 1), Sentence(text), _Plots(drawn), comparison(one, other)]
