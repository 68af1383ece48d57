"""Comparing short answers of chat models."""

from __future__ import annotations

import math

from .vqa_metric import normalise

__all__ = ["relaxed_match"]

TOLERANCE = 0.05


def relaxed_match(said: str, answer: str) -> float:
    """1 if the answers are the same after VQA's normalisation, or numbers within 5 %; else 0.

    The tolerance is relative to the right answer, as in PlotQA (Methani et al., WACV 2020) and
    ChartQA (Masry et al., ACL 2022, section 5). A per cent sign divides by 100.
    """
    if normalise(said) == normalise(answer):
        return 1.0
    own, right = _number(said), _number(answer)
    if own is None or right is None or right == 0:
        return 0.0
    return float(abs(own - right) / abs(right) <= TOLERANCE)


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return number / 100 if text.endswith("%") else number
