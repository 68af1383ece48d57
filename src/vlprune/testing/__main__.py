"""``python -m vlprune.testing`` prints the tables of supported families (docs/supported.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from ..architectures import discover
from ..structures.structure import AttentionUnit
from .families import FAMILIES, VARIANTS, build

__all__ = ["table"]


def table(families: Iterable[str]) -> str:
    """One Markdown row per family: its class, and how each attention unit is cut."""
    units = get_args(AttentionUnit)
    lines = [
        "| family | class tested | FFN | " + " | ".join(f"`{unit}`" for unit in units) + " |",
        "|---|---|---|" + "---|" * len(units),
    ]
    for family in families:
        model = build(family).model
        cells = []
        for unit in units:
            layouts = [s.layout for s in discover(model, unit) if s.kind != "ffn"]
            padded = layouts.count("padded")
            if not layouts:
                cells.append("dense")
            elif not padded:
                cells.append("native")
            elif padded == len(layouts):
                cells.append("padded")
            else:
                cells.append(f"{len(layouts) - padded} native, {padded} padded")
        ffn = "native" if any(s.kind == "ffn" for s in discover(model)) else "dense"
        row = [f"`{family}`", type(model).__name__, ffn, *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(FAMILIES), table(VARIANTS), sep="\n\n")
