"""The order of the rows of a fused query-key-value projection, as its forward takes them apart."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

from ..cutting.wrappers import stock_class
from . import layouts

__all__ = ["row_order", "source_of"]

HEADS = r"(?:self\.)?(?:config\.)?(?:num_|n_)(?:attention_)?heads?"
SIZES = r"split\(\s*\[self\.q_dim, self\.kv_dim, self\.kv_dim\]"
BLOCKS = re.compile(rf"\b3,\s*(?:{HEADS}|-1,\s*(?:self\.)?head_(?:dim|size))|\bquery_pos\b|{SIZES}")
BY_HEAD = re.compile(rf"{HEADS},\s*3\b|\b3 \* (?:self\.)?head_(?:dim|size)\)")


def row_order(core: nn.Module) -> str:
    """``"blocks"`` for rows [q | k | v], ``"heads"`` for [q | k | v] of each head; "" if not known.

    Where the class is not in the table, the shapes in its source decide: (..., 3, heads, size) or
    (..., heads, 3, size). Where a batch is given, the proof catches a wrong guess for whole heads.
    """
    cls = stock_class(core)
    if cls.__name__ in layouts.FUSED_ORDER_KNOWN:
        return "blocks"
    if cls.__module__.partition(".")[0] not in ("transformers", "timm"):
        return ""
    text = source_of(cls)
    found = {order for order, one in (("blocks", BLOCKS), ("heads", BY_HEAD)) if one.search(text)}
    return found.pop() if len(found) == 1 else ""


def source_of(cls: Any) -> str:
    """The source of a class, read once however many layers have it; "" where there is none."""
    return _read(cls)


@cache
def _read(cls: Any) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
