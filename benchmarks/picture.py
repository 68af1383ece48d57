"""The picture in the README: where the budget of a run went, as one SVG for light and one for dark.

    vlprune demo -o demo-output
    python benchmarks/picture.py demo-output/report.json

The numbers that the picture needs are kept beside it, in ``docs/pictures/demo.json``; without an
argument the picture is drawn from them again. Colours are Okabe and Ito's, as in ``vlprune
report``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
WIDTH, ROW, TOP = 760, 46, 92
NAME, BAR, LAYERS = 8, 178, 560  # where the three columns begin
BAR_WIDTH, LAYER, GAP = 300, 32, 8


@dataclass(frozen=True)
class Look:
    """Colours of one picture."""

    ink: str
    soft: str
    kept: str
    gone: str


LOOKS = {
    "light": Look("#1b1f24", "#57606a", "#2f86c8", "#8b949e"),
    "dark": Look("#e6edf3", "#9da7b3", "#56b4e9", "#7d8590"),
}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """What the picture needs of a report."""
    groups = []
    for group in report["groups"]:
        layers = [
            layer
            for layer in report["layers"]
            if (layer["tower"], layer["kind"]) == (group["tower"], group["kind"])
        ]
        groups.append(
            {
                "name": f"{group['tower'] or 'model'}, {group['kind'].replace('ffn', 'FFN')}",
                "params": group["params"],
                "units": [layer["units"] for layer in layers],
                "kept": [layer["kept"] for layer in layers],
            }
        )
    return {
        "method": report["method"],
        "budget": {key: report["budget"][key] for key in ("what", "asked", "reached")},
        "params": {key: report["params"][key] for key in ("before", "after")},
        "groups": groups,
    }


def draw(facts: dict[str, Any], look: Look) -> str:
    """One row per tower and kind: parameters before and after, then what each layer keeps."""
    groups, total = facts["groups"], facts["params"]
    dense = {key: total[key] - sum(g["params"][key] for g in groups) for key in total}
    rows = [*groups, {"name": "never cut", "params": dense, "units": [], "kept": []}]
    scale = BAR_WIDTH / max(row["params"]["before"] for row in rows)
    title = (
        f"{facts['method']} on the demo: {_short(total['before'])} parameters, "
        f"{_short(total['after'])} stay"
    )
    body = [
        _text(NAME, 26, title, "t"),
        _text(BAR, 58, "parameters: solid stays, hatched is gone", "s"),
        _text(LAYERS, 58, "units kept, layer by layer", "s"),
    ]
    for number, row in enumerate(rows):
        body += _row(row, TOP + ROW * number - 14, scale)
    height = TOP + ROW * len(rows) - 14
    label = f"{title}. " + "; ".join(_aloud(row) for row in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img"><title>{escape(label)}</title>\n'
        f"<style>text{{font:15px system-ui,-apple-system,'Segoe UI',sans-serif;fill:{look.ink}}}"
        f".t{{font-size:17px;font-weight:600}}.s{{font-size:13px;fill:{look.soft}}}"
        f".k{{fill:{look.kept}}}.g{{fill:url(#gone);stroke:{look.gone}}}</style>\n"
        '<pattern id="gone" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><path d="M0 0V6" stroke="{look.gone}" stroke-width="2"/>'
        "</pattern>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _row(row: dict[str, Any], y: int, scale: float) -> list[str]:
    """The name, the bar of parameters, and a column per layer."""
    before, after = (scale * row["params"][key] for key in ("before", "after"))
    share = row["params"]["after"] / row["params"]["before"]
    body = [
        _text(NAME, y + 14, row["name"]),
        _text(NAME, y + 31, f"{100 * share:.0f} % of {_short(row['params']['before'])}", "s"),
        f'<rect class="k" x="{BAR}" y="{y + 4}" width="{after:.1f}" height="24"/>',
    ]
    if before - after >= 1:
        left = BAR + after + 0.5
        wide = before - after
        body.append(f'<rect class="g" x="{left:.1f}" y="{y + 4}" width="{wide:.1f}" height="24"/>')
    for number, (units, kept) in enumerate(zip(row["units"], row["kept"], strict=True)):
        x, high = LAYERS + (LAYER + GAP) * number, 32 * kept / units
        body += [
            f'<rect class="g" x="{x}" y="{y}" width="{LAYER}" height="{32 - high:.1f}"/>',
            f'<rect class="k" x="{x - 0.5}" y="{y + 32 - high:.1f}" width="{LAYER + 1}" '
            f'height="{high:.1f}"><title>{kept} of {units} units</title></rect>',
        ]
    return body


def _aloud(row: dict[str, Any]) -> str:
    share = row["params"]["after"] / row["params"]["before"]
    return (
        f"{row['name']}: {100 * share:.0f} % of {_short(row['params']['before'])} parameters stay"
    )


def _text(x: int, y: int, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{escape(text)}</text>'


def _short(count: float) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", help="report.json of a run")
    parser.add_argument("-o", "--output", type=Path, default=PICTURES, help="folder to write to")
    asked = parser.parse_args()
    kept = asked.output / "demo.json"
    if asked.report:
        facts = numbers(json.loads(asked.report.read_text()))
        kept.write_text(json.dumps(facts, indent=1) + "\n")
    facts = json.loads(kept.read_text())
    for name, look in LOOKS.items():
        (asked.output / f"demo-{name}.svg").write_text(draw(facts, look))


if __name__ == "__main__":
    main()
