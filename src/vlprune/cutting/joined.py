"""Weights that a class saves as one tensor, and takes apart in equal pieces as it loads.

transformers saves the query, key and value projections of many vision towers as one tensor, as
their published checkpoints have them. A cut may leave more rows of one than of another, which no
equal pieces fit, or other heads than those that the config counts. A cut model saves such weights
under their own names, which the class loads as well.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

__all__ = ["save_apart"]

EQUAL = ("Chunk", "PermuteForRope")
"""The conversions that count on equal pieces, or on the heads that the config counts."""


def save_apart(model: nn.Module, undo: ExitStack) -> None:
    """Let ``save_pretrained`` of the model, and of the models in it, keep such weights apart."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _keep_apart(module, undo)


def _keep_apart(model: Any, undo: ExitStack) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    rules = model.__dict__.get("_weight_conversions")
    if rules is None:  # as transformers does for a model that it has not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        rules = [rule for rule in found if not isinstance(rule, PrefixChange)]
    apart = [rule for rule in rules if not _needs_equal_pieces(rule)]
    if len(apart) < len(rules):
        undo.callback(_put_back, model, model.__dict__.get("_weight_conversions"))
        model._weight_conversions = apart


def _put_back(model: Any, rules: list[Any] | None) -> None:
    if rules is None:
        del model._weight_conversions
    else:
        model._weight_conversions = rules


def _needs_equal_pieces(rule: Any) -> bool:
    return any(type(one).__name__ in EQUAL for one in getattr(rule, "operations", ()))
