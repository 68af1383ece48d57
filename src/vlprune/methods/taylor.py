"""Keep the units whose removal would change the loss most, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..device import all_finite
from ..errors import VlpruneError
from .base import OneShot, Problem, Search

__all__ = ["Taylor"]


class Taylor(OneShot):
    """One-shot baseline: |d loss / d gate| at gate 1, averaged over the steps of training.

    With gates at 1 the gradient of a gate is the sum of weight times gradient over the unit,
    the first-order change of the loss when the unit is removed. Source: Molchanov et al.
    (ICLR 2017), criterion of equation 8, on gates. Non-finite steps are left out.
    """

    uses_gates: ClassVar[bool] = True

    def start(self, problem: Problem) -> Search:
        """A search that watches gate gradients while training runs."""
        return _TaylorSearch(self, problem)


class _TaylorSearch(Search):
    def __init__(self, method: Taylor, problem: Problem) -> None:
        super().__init__(problem)
        self.method = method
        self.steps = 0
        self.sums = {s.name: torch.zeros(s.size) for s in problem.structures}

    def after_backward(self, progress: float, gradients: Mapping[str, Tensor]) -> None:
        if not all_finite(gradients.values()):
            return
        self.steps += 1
        for name, gradient in gradients.items():
            self.sums[name] = self.sums[name].to(gradient.device) + gradient.abs().float()

    def state(self) -> dict[str, Tensor]:
        return {**self.sums, "": torch.tensor(self.steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.steps = int(state[""])
        self.sums = {name: state[name].clone() for name in self.sums}

    def facts(self) -> dict[str, float]:
        return {"steps": self.steps}

    def keep(self) -> dict[str, tuple[int, ...]]:
        if self.steps == 0:
            raise VlpruneError(
                "Taylor has seen no finite gradient yet: train at least one step with "
                "compressor.callback(), or call compressor.step(progress) after each backward"
            )
        problem = self.open
        scores = {s.name: self.sums[s.name].cpu() / self.steps for s in problem.structures}
        return self.method.best(problem, scores)
