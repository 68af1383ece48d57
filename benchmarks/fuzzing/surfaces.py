"""Where damage comes in: how cases of each kind are made, and how many they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .cases import Case, Maker
from .data import data, images
from .folders import config, exports, index, plans, processors, reports, weights
from .recipes import checkpoints, overrides, recipes, runs

__all__ = ["SURFACES", "Surface"]


@dataclass(frozen=True)
class Surface:
    """How cases of one kind are made, of what, and how many of 100 they are."""

    make: Callable[[Maker], Case]
    needs: tuple[str, ...]
    share: float
    slower: float = 1.0
    used: int = 1
    """How many sound cases touch all that is imported."""


FOLDERS = ("scenes", "small", "shared", "sharded")
SURFACES: dict[str, Surface] = {
    "recipes": Surface(recipes, ("scenes",), 18, used=12),
    "overrides": Surface(overrides, (), 12, used=6),
    "runs": Surface(runs, (), 1, 3, used=0),
    "plans": Surface(plans, ("scenes", "small", "shared"), 10),
    "config": Surface(config, FOLDERS, 15, used=8),
    "processors": Surface(processors, ("scenes", "small"), 4),
    "weights": Surface(weights, FOLDERS, 8),
    "index": Surface(index, ("scenes", "small", "sharded"), 3),
    "exports": Surface(exports, ("scenes", "exported"), 2, used=4),
    "reports": Surface(reports, ("scenes", "small", "shared"), 10, used=6),
    "data": Surface(data, ("scenes",), 11, used=12),
    "images": Surface(images, ("scenes",), 5, used=4),
    "checkpoints": Surface(checkpoints, ("stopped", "whole"), 1, 3, used=0),
}
