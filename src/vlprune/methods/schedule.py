"""How much is removed when: pure functions of progress in [0, 1]."""

from __future__ import annotations

import math

__all__ = ["removed_share"]


def removed_share(progress: float) -> float:
    """The share of the final removal that is reached at ``progress``, from 0 to 1.

    sqrt((1 - cos(pi t)) / 2): fast at first, flat at the end. Source: UPop, section 3.3, where
    it multiplies p, the fraction to be removed, and gives p_t.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress runs from 0 to 1, not {progress!r}")
    return math.sqrt((1 - math.cos(math.pi * progress)) / 2)
