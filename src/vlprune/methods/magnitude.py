"""Keep the units with the largest weights."""

from __future__ import annotations

from .base import OneShot, Problem, Search

__all__ = ["Magnitude"]


class Magnitude(OneShot):
    """One-shot baseline: a unit's score is the root of its summed squared weights.

    Source: the group magnitude criterion of Li et al. (ICLR 2017), over all slices of the
    unit. Needs no data and no training.
    """

    def start(self, problem: Problem) -> Search:
        """A search that reads the weights when the plan is made."""
        return _MagnitudeSearch(self, problem)


class _MagnitudeSearch(Search):
    def __init__(self, method: Magnitude, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method

    def keep(self) -> dict[str, tuple[int, ...]]:
        scores = {name: squares.sqrt() for name, squares in self.problem.squares().items()}
        return self.method.best(self.problem, scores)
