"""Keep units drawn at random."""

from __future__ import annotations

import torch

from ..recipe.options import RandomOptions
from .base import OneShot, Problem, Search

__all__ = ["Random"]


class Random(RandomOptions, OneShot):
    """One-shot baseline: every unit has the same chance. Any method must beat this."""

    def start(self, problem: Problem) -> Search:
        """A search whose plan depends on the seed alone."""
        return _RandomSearch(self, problem)


class _RandomSearch(Search):
    def __init__(self, method: Random, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method

    def keep(self) -> dict[str, tuple[int, ...]]:
        generator = torch.Generator().manual_seed(self.method.seed)
        scores = {
            s.name: torch.rand(s.size, generator=generator, dtype=torch.float64)
            for s in self.problem.structures
        }
        return self.method.best(self.problem, scores)
