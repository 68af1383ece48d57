"""The schedule of removal, a pure function of progress in [0, 1]."""

from __future__ import annotations

import math

__all__ = ["removed_share"]


def removed_share(progress: float) -> float:
    """The share of the final removal that is reached at ``progress``, from 0 to 1.

    sqrt((1 - cos(pi t)) / 2): fast at first, flat at the end. Source: UPop, section 3.3, where this
    share times p, the fraction to be removed, is p_t. Raises ValueError outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress runs from 0 to 1, not {progress!r}")
    return math.sqrt((1 - math.cos(math.pi * progress)) / 2)
