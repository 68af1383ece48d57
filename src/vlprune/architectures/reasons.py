"""Why modules stay dense that no row of the layout table takes."""

from __future__ import annotations

import re

from torch import nn

from ..cutting.padded import is_linear
from ..cutting.wrappers import stock_class
from . import layouts

__all__ = ["reason_of"]

_BLOCKS = {
    "a recurrent block": r"DeltaNet|Mamba|ShortConv|Recurrent|Mixer|LinearAttention",
    "an attention block": r"Atten|Attn|SelfOutput|Indexer",
    "an FFN": r"MLP|Mlp|FFN|FeedForward|Intermediate|Output$",
}


_MODELS = r"For[A-Z]|Model$"
"""The classes of whole models: what they hold themselves is no part of a block."""


def reason_of(module: nn.Module, owner: str, name: str) -> str:
    """Why a module that no row takes stays dense.

    ``owner`` is the class of the module that holds it under ``name``.
    """
    told = layouts.DENSE.get(owner) or layouts.DENSE_CHILDREN.get(name)
    if told:
        return told
    kind = stock_class(module).__name__
    if isinstance(module, nn.Embedding) or "Embedding" in kind:
        return "embedding: never pruned"
    if "Norm" in kind:
        return "normalisation: as wide as the residual stream"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution: not a transformer block"
    if "Router" in kind:
        return "which experts a token goes to, and every expert stays"
    if is_linear(module) and not re.search(_MODELS, owner):
        for part, names in _BLOCKS.items():
            if re.search(names, owner):
                return f"part of {part} ({owner}) whose layout is in no row of the table"
    if is_linear(module):
        return "a projection outside attention and FFN"
    return f"parameters of {kind} itself"
